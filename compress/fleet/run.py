"""A sweep, start to end: what is done already, what fits, running the rest, comparing all of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from compress.errors import CompressError, ResourceError, UsageError
from compress.fleet import best, journal, pages
from compress.fleet.board import Board
from compress.fleet.grid import Loaded
from compress.fleet.jobs import Job, make_jobs, predicted_peak
from compress.fleet.local import LocalCrew, Task
from compress.fleet.model import JobRecord, Sweep
from compress.fleet.place import Place
from compress.package import manifest
from compress.report.environment import created
from compress.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Options:
    """How to run a sweep; see :func:`compress.sweep`. ``say`` takes a line for whoever is watching."""

    output: str
    at_once: int = 1
    ray: str | None = None
    retries: int = 1
    max_memory: int | None = None
    fresh: bool = False
    validate: bool = True
    threads: int | None = None
    say: Callable[[str], None] = lambda line: None


class Crew(Protocol):
    """Who runs the jobs; ``memory`` is the most that one job may take, ``share`` the least that each may."""

    @property
    def threads(self) -> int:
        """Return the threads of each job."""

    @property
    def memory(self) -> int | None:
        """Return bytes, ``None`` where nobody knows."""

    @property
    def share(self) -> int | None:
        """Return bytes, ``None`` where nobody knows."""

    def run(self, tasks: Sequence[Task], board: Board) -> None:
        """Run jobs to their ends."""


def sweep(loaded: Loaded, options: Options) -> Sweep:
    """Run a grid's jobs, but for those that an earlier sweep has finished; see :func:`compress.sweep`.

    Raises:
        UsageError: The output is in use, or holds something that no sweep has made.
        CompressError: The output cannot be written, or the journal is damaged.
    """
    created()  # a date that makes no sense is told before the work
    place = Place(options.output)
    jobs = make_jobs(loaded, validate=options.validate)
    with journal.locked(place.desk, options.output):
        earlier = _earlier(place, options)
        board = Board(_begin(loaded, jobs, earlier, place, options), place, options.say)
        board.save(send=True)  # a place that cannot be written is told before the work
        try:
            _run(jobs, board, place, options)
        finally:
            found = board.sweep
            complete = all(job.state not in ("waiting", "running") for job in found.jobs)
            found = found.model_copy(update={"complete": complete, "best": best.of(found.jobs)})
            pages.write(found, place)
    return found


def _run(jobs: list[Job], board: Board, place: Place, options: Options) -> None:
    """Run what is not done yet."""
    wanted = set(board.waiting())
    if not wanted:
        return
    with _crew(place, options) as crew:
        tasks = []
        for job in jobs:
            if job.name not in wanted:
                continue
            try:
                peak = predicted_peak(job, crew.threads, crew.memory)
                board.note(job.name, predicted_peak_bytes=peak)
                tasks.append(Task(job, _reserved(peak, crew)))
            except CompressError as error:
                board.refused(job.name, error)
        board.save()
        if tasks:
            crew.run(tasks, board)


def _crew(place: Place, options: Options) -> AbstractContextManager[Crew]:
    shared = (options.at_once, options.threads, options.max_memory, options.retries)
    if options.ray is None:
        return nullcontext(LocalCrew(place, *shared))
    from compress.fleet import on_ray

    return on_ray.crew(place, options.ray, *shared)


def _reserved(peak: int, crew: Crew) -> int | None:
    """Return a job's share of the memory.

    It is what the job may take, baselines that are measured beside it included, so at least an equal part.

    Raises:
        ResourceError: The job does not fit even alone.
    """
    if crew.memory is None or crew.share is None:
        return None
    if peak > crew.memory:
        raise ResourceError(
            f"it would take {format_size(peak)}, more than the {format_size(crew.memory)} there are for it",
            hint="raise --max-memory, lower --threads, or take a machine with more memory",
        )
    return max(peak, crew.share)


def _earlier(place: Place, options: Options) -> Sweep | None:
    """Return what an earlier sweep of this output has done; nothing, and its artifacts removed, to start over."""
    try:
        found = journal.read(place.desk / journal.NAME)
        if found is None and place.store is not None:
            content = place.store.read(journal.NAME, journal.MAX_BYTES)
            found = None if content is None else journal.parse(content, f"{place.output}/{journal.NAME}")
    except CompressError:
        if not options.fresh:
            raise
        found = None
    if not options.fresh or found is None:
        return found
    for job in (*found.jobs, *found.former):
        place.remove(job.name)
        place.log(job.name).unlink(missing_ok=True)
    return None


def _begin(loaded: Loaded, jobs: list[Job], earlier: Sweep | None, place: Place, options: Options) -> Sweep:
    """Return every job's record: done, where an earlier sweep has finished the same.

    Raises:
        UsageError: Something is in a job's place that no sweep has made.
    """
    known = {} if earlier is None else {job.name: job for job in (*earlier.former, *earlier.jobs)}
    records = []
    for job in jobs:
        before = known.pop(job.name, None)
        if before is None and place.occupied(job.name):
            raise UsageError(
                f"{job.name} exists already, and this sweep has not made it",
                where=options.output,
                hint="choose another -o, or remove it first",
            )
        records.append(_record(job, before, place, options.say))
    return Sweep(
        grid=loaded.name,
        at_once=max(options.at_once, earlier.at_once if earlier and any(r.state == "done" for r in records) else 1),
        validated=options.validate,
        versions=manifest.tool_versions(),
        jobs=tuple(records),
        former=tuple(job for job in known.values() if job.outcome is not None),
    )


def _record(job: Job, before: JobRecord | None, place: Place, say: Callable[[str], None]) -> JobRecord:
    record = JobRecord(
        name=job.name,
        model=job.pair.model.name,
        profile=job.pair.profile.name,
        overrides=job.overrides,
        key=job.key,
    )
    if before is None:
        return record
    same = before.key == job.key and job.problem is None
    if same and before.outcome is not None and place.still_there(job.name, before.outcome):
        say(f"{job.name}: done already")
        return before.model_copy(update={"state": "done"})
    if same and before.outcome is None and place.made(job.name):
        try:
            outcome = place.settle(job.name)
        except CompressError as error:
            say(f"{job.name}: its artifact is made again: {error.what}")
        else:
            say(f"{job.name}: done already, though its sweep did not see it")
            code = outcome.exit_code
            return record.model_copy(update={"state": "done", "outcome": outcome, "exit_code": code, "attempts": 1})
    elif before.outcome is not None:
        why = "its artifact has changed" if same else "what decides it has changed"
        say(f"{job.name}: made again: {why}")
    place.remove(job.name)
    if place.occupied(job.name):
        raise UsageError(
            f"{job.name} holds something that is no artifact",
            where=str(place.directory(job.name)),
            hint="remove it first, or choose another -o",
        )
    return record
