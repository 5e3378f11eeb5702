"""Jobs on a Ray cluster: a task each, with its threads and its predicted memory as resources.

A task runs the same process as a sweep on one machine does. Ray runs it again when its worker or its node dies. The
library is imported when a sweep asks for it, and nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError
from compress.fleet import jobs as commands
from compress.fleet.board import Board
from compress.fleet.local import Task, cores, worth_another
from compress.fleet.model import Outcome
from compress.fleet.place import Place
from compress.fleet.process import Ended, Running, end_all, tail
from compress.package import manifest

#: How often Ray begins a task again whose worker or node died.
MAX_DEATHS = 3
_WAIT_SECONDS = 1.0
#: Ray gives a cluster of this machine 30 seconds to start, whatever else the machine has to do.
_STARTS = 3


@dataclass(frozen=True)
class Request:
    """What a task is given: where the artifact goes, the words after ``compress`` and what Python runs them with."""

    name: str
    output: str
    launcher: tuple[str, ...]
    words: tuple[str, ...]
    threads: int
    attempt: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """What a task found out; ``outcome`` is ``None`` where the job left nothing."""

    ended: Ended
    outcome: Outcome | None
    log: str


def work(request: Request) -> Answer:
    """Run a job on this node: what a task does."""
    here = manifest.tool_versions()
    if here != request.versions:
        other = next(name for name in {**here, **request.versions} if here.get(name) != request.versions.get(name))
        problem = (
            f"this node has {other} {here.get(other, '(none)')}, the sweep was started with "
            f"{request.versions.get(other, '(none)')}: the artifacts would differ"
        )
        return Answer(Ended(2, None, problem, os.uname().nodename), None, "")
    place = Place(request.output)
    # A file of this node: the task returns what it says.
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"compress-sweep-{os.getpid()}-{request.name}.log"
    words = [str(place.directory(request.name)) if word == OUTPUT else word for word in request.words]
    try:
        if place.made(request.name):  # by an attempt whose worker died before it could say so
            ended = Ended(0, None, None, os.uname().nodename)
        else:
            place.directory(request.name).parent.mkdir(parents=True, exist_ok=True)
            ended = _run(Running(request.launcher, words, log, request.attempt, request.threads))
        outcome = place.settle(request.name) if place.made(request.name) else None
        return Answer(ended, outcome, tail(log))
    except CompressError as error:
        return Answer(Ended(1, None, str(error), os.uname().nodename), None, tail(log))
    finally:
        log.unlink(missing_ok=True)


#: Stands in a request's words for where a node makes the artifact.
OUTPUT = "{output}"


def _run(job: Running) -> Ended:
    try:
        return job.wait()
    except BaseException:
        end_all([job])
        raise
    finally:
        job.kill()


@contextmanager
def crew(
    place: Place, address: str, at_once: int, threads: int | None, max_memory: int | None, retries: int
) -> Iterator[RayCrew]:
    """Yield who runs jobs on a cluster; ``local`` makes one of this machine, for as long as this lasts.

    Raises:
        UsageError: Ray is missing, the output is one that only this process sees, or no node has the threads.
        CompressError: There is no cluster at the address.
    """
    if place.store is not None and place.store.within_process:
        raise UsageError(
            "memory:// lives in one process, which Ray's workers are not",
            where=place.output,
            hint="a directory that all nodes share, or another URL",
        )
    # Ray says what happens to its workers on standard output, which belongs to results.
    with contextlib.redirect_stdout(sys.stderr):
        ray = _connect(address, max_memory)
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            if not nodes:
                raise CompressError("the cluster has no node with a processor", where=address)
            wanted = threads or max(1, int(min(node["CPU"] for node in nodes)) // at_once)
            memories = [int(node.get("memory", 0)) for node in nodes if node["CPU"] >= wanted]
            if not memories:
                raise UsageError(f"no node has {wanted} cores", where=address, hint="lower --threads")
            limits = memories if max_memory is None else [min(memory, max_memory) for memory in memories]
            yield RayCrew(ray, place, retries, wanted, max(limits), min(limits) // at_once)
        finally:
            ray.shutdown()


@dataclass(frozen=True)
class RayCrew:
    """Runs jobs as Ray tasks.

    Attributes:
        ray: The library, connected.
        place: The sweep's output.
        retries: Attempts after a first one that failed.
        threads: Of each job.
        memory: What a job may take at most: what the largest node has.
        share: What each job may take at least.
    """

    ray: Any
    place: Place
    retries: int
    threads: int
    memory: int | None
    share: int | None

    def run(self, tasks: Sequence[Task], board: Board) -> None:
        """Run jobs to their ends; an interruption ends those that run."""
        waiting = {self._submit(task, board): task for task in tasks}
        try:
            while waiting:
                ended, _ = self.ray.wait(list(waiting), num_returns=1, timeout=_WAIT_SECONDS)
                for reference in ended:
                    task = waiting.pop(reference)
                    if not self._settle(task.job.name, reference, board):
                        waiting[self._submit(task, board)] = task
        finally:
            for reference in waiting:
                with contextlib.suppress(Exception):  # the cluster may be what has gone
                    self.ray.cancel(reference)
            if waiting:
                self.ray.wait(list(waiting), num_returns=len(waiting), timeout=12)
                board.stopped(task.job.name for task in waiting.values())

    def _submit(self, task: Task, board: Board) -> Any:
        name = task.job.name
        request = Request(
            name,
            self.place.output if self.place.store else str(self.place.desk),
            tuple(commands.LAUNCHER),
            tuple(task.job.words(OUTPUT, self.threads, task.reserved)),
            self.threads,
            board.started(name, "handed to the cluster"),
            manifest.tool_versions(),
        )
        remote = self.ray.remote(work).options(
            name=name, num_cpus=self.threads, memory=task.reserved, max_retries=MAX_DEATHS, retry_exceptions=False
        )
        return remote.remote(request)

    def _settle(self, name: str, reference: Any, board: Board) -> bool:
        """Note how a job ended; return whether that is final."""
        try:
            answer: Answer = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            board.failed(name, _first(error), None)
            return True
        log = self.place.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as stream:
            stream.write(answer.log)
        if answer.outcome is not None:
            if self.place.store is None and not self.place.made(name):
                problem = "the node wrote its artifact to a place that this machine does not see"
                board.failed(
                    name, f"{problem}\n  try: -o with a directory that all nodes share, or a URL", answer.ended
                )
                return True
            board.done(name, answer.outcome, answer.ended)
            return True
        if worth_another(answer.ended.code) and board[name].attempts <= self.retries:
            board.say(f"{name}: {answer.ended.error}: once more")
            return False
        board.failed(name, answer.ended.error, answer.ended)
        return True


def _connect(address: str, max_memory: int | None) -> Any:
    # Said before the import, which reads it: nothing is told to anybody about this run.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UsageError("Ray is not installed", hint="pip install 'compress-slm[ray]'") from None
    # A cluster of this machine alone has nobody to give way to, and its jobs measure speed; Ray's own choice is 15.
    os.environ.setdefault("RAY_worker_niceness", "0")
    how: dict[str, Any] = {}
    if address == "local":
        how = {"include_dashboard": False, "num_cpus": cores()}
        how |= {} if max_memory is None else {"_memory": max_memory}
    terminate = signal.getsignal(signal.SIGTERM)
    started = time.monotonic()
    for left in range(_STARTS - 1 if address == "local" else 0, -1, -1):
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **how)
            # Ray has put a handler of its own, and one behind Python's back, in the place of what ends a sweep.
            if terminate is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, terminate)
            break
        except ImportError as error:
            raise UsageError(
                f"{address} needs more of Ray: {_first(error)}", hint="pip install 'ray[client]', or give HOST:PORT"
            ) from None
        except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError and its own
            ray.shutdown()
            if left and "timed out during startup" in str(error):
                continue
            raise CompressError(
                f"no Ray cluster answers: {_first(error)} ({time.monotonic() - started:.0f} s)",
                where=address,
                hint="auto, local, HOST:PORT or ray://HOST:PORT; `ray status` shows whether there is one",
            ) from None
    return ray


def _first(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
