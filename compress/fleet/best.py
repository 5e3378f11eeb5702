"""Which of a model's artifacts is the smallest, the fastest, and the most accurate below a size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compress.fleet.model import Best, JobRecord, Loss, Outcome, Timing

_MB = 1_000_000


def models_of(jobs: Iterable[JobRecord]) -> dict[str, list[JobRecord]]:
    """Return jobs by model, in their order."""
    found: dict[str, list[JobRecord]] = {}
    for job in jobs:
        found.setdefault(job.model, []).append(job)
    return found


def candidates(jobs: Iterable[JobRecord]) -> list[tuple[JobRecord, Outcome]]:
    """Return the jobs whose artifacts were measured and accepted, with their outcomes."""
    return [(job, job.outcome) for job in jobs if job.outcome is not None and job.outcome.status == "accepted"]


def losses_compare(losses: Sequence[Loss]) -> bool:
    """Return whether losses are of one measure on one text."""
    return len({(loss.measure, loss.text, loss.items) for loss in losses}) <= 1


def timings_compare(timings: Sequence[Timing]) -> bool:
    """Return whether timings are of the same work on the same machine."""
    return len({(time.unit, time.work, time.machine, time.threads) for time in timings}) <= 1


def of(jobs: Iterable[JobRecord]) -> tuple[Best, ...]:
    """Return the best artifacts of every model, nothing where two cannot be compared or nothing was accepted.

    ``limit_bytes`` doubles from 1 MB on; a limit that allows nothing better than the one below it is left out.
    """
    return tuple(found for model, own in models_of(jobs).items() for found in _of_model(model, candidates(own)))


def _of_model(model: str, found: list[tuple[JobRecord, Outcome]]) -> Iterable[Best]:
    if not found:
        return
    smallest = min(found, key=lambda item: item[1].model_bytes)[0]
    yield Best(model=model, what="smallest", job=smallest.name)
    timed = [(job, outcome.timing) for job, outcome in found if outcome.timing is not None]
    if timed and timings_compare([timing for _, timing in timed]):
        fastest = max(timed, key=lambda item: item[1].value if item[1].unit == "tokens/s" else -item[1].value)[0]
        yield Best(model=model, what="fastest", job=fastest.name)
    lossy = [(job, outcome, outcome.loss) for job, outcome in found if outcome.loss is not None]
    if not lossy or not losses_compare([loss for *_, loss in lossy]):
        return
    limit, largest, last = _MB, max(outcome.model_bytes for _, outcome, _ in lossy), None
    while True:
        below = [
            (loss.value, outcome.model_bytes, job.name) for job, outcome, loss in lossy if outcome.model_bytes < limit
        ]
        if below and min(below)[2] != last:
            last = min(below)[2]
            yield Best(model=model, what="most accurate", limit_bytes=limit, job=last)
        if limit > largest:
            return
        limit *= 2
