"""Jobs on this machine: one after the other or several at once, never more than the promised memory holds."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from compress.errors import CompressError
from compress.fleet import jobs as commands
from compress.fleet.board import Board
from compress.fleet.jobs import Job
from compress.fleet.place import Place
from compress.fleet.process import Ended, Running, end_all
from compress.validation.memory import available_memory
from compress.validation.protocol import peak_rss_bytes

_POLL_SECONDS = 0.05
#: Exit codes that another attempt may change: a failure, an interruption by somebody else; and every signal.
_AGAIN = (1, 130)


@dataclass(frozen=True)
class Task:
    """A job that is to be run; ``reserved`` bytes are its share of a machine, ``None`` where nothing is known."""

    job: Job
    reserved: int | None


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worth_another(code: int) -> bool:
    """Return whether a job that ended so may end otherwise when it is run again."""
    return code < 0 or code in _AGAIN


class LocalCrew:
    """Runs jobs in processes of their own.

    Attributes:
        threads: Of each job.
        memory: What all jobs together may take, in bytes; ``None`` where nobody knows.
        share: What each job may take at least.
    """

    def __init__(self, place: Place, at_once: int, threads: int | None, max_memory: int | None, retries: int) -> None:
        """Plan for ``at_once`` jobs that share the machine; see :func:`compress.sweep` for the rest."""
        self._place, self._at_once, self._retries = place, at_once, retries
        self.threads = threads or max(1, cores() // at_once)
        limit = available_memory() if max_memory is None else max_memory
        # This process stays beside its jobs.
        self.memory = None if limit is None else max(0, limit - (peak_rss_bytes() if max_memory is not None else 0))
        self.share = None if self.memory is None else self.memory // at_once

    def run(self, tasks: Sequence[Task], board: Board) -> None:
        """Run jobs to their ends; an interruption ends those that run."""
        waiting = list(tasks)
        running: dict[str, tuple[Task, Running]] = {}
        try:
            while waiting or running:
                self._fill(waiting, running, board)
                ended = {name: end for name, (_, job) in running.items() if (end := job.poll()) is not None}
                for name, end in ended.items():
                    task, job = running.pop(name)
                    job.kill()  # what it may have left in its group
                    if not self._settle(name, end, board):
                        waiting.insert(0, task)
                if not ended:
                    time.sleep(_POLL_SECONDS)
        finally:
            if running:
                end_all([job for _, job in running.values()])
                board.stopped(running)

    def _fill(self, waiting: list[Task], running: dict[str, tuple[Task, Running]], board: Board) -> None:
        """Start what there is room for, in the grid's order; a smaller job may overtake one that has to wait."""
        for task in list(waiting):
            if len(running) >= self._at_once:
                return
            if running and self.memory is not None and task.reserved is not None:
                taken = sum(other.reserved or 0 for other, _ in running.values())
                if taken + task.reserved > self.memory:
                    continue
            waiting.remove(task)
            name = task.job.name
            attempt = board.started(name)
            words = task.job.words(str(self._place.directory(name)), self.threads, task.reserved)
            log = self._place.log(name)
            running[name] = (task, Running(commands.LAUNCHER, words, log, attempt, self.threads))

    def _settle(self, name: str, ended: Ended, board: Board) -> bool:
        """Note how a job ended; return whether that is final."""
        if self._place.made(name):
            try:
                board.done(name, self._place.settle(name), ended)
            except CompressError as error:
                board.failed(name, str(error), ended)
            return True
        if worth_another(ended.code) and board[name].attempts <= self._retries:
            board.say(f"{name}: {ended.error}: once more")
            return False
        board.failed(name, ended.error, ended)
        return True
