"""A sweep as tables of text: what the terminal, ``README.md`` and ``sweep.html`` show alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.fleet.best import candidates, losses_compare, models_of, timings_compare
from compress.fleet.model import Best, JobRecord, Loss, Sweep, Timing
from compress.report.wording import count, plain, seconds, times, with_error
from compress.sizes import format_size

HEADS = (
    "profile", "status", "size", "lost", "speed", "vs PyTorch", "vs float ONNX", "export", "peak memory", "digest",
)  # fmt: skip
#: What is shown of a digest.
DIGEST_LETTERS = 12
_NOTHING = "—"
MEASURES = {
    "kl": "KL divergence, nats a token",
    "cosine_distance": "cosine distance, 1 − cosine",
    "label_disagreement": "share of other labels",
}


@dataclass(frozen=True)
class ModelView:
    """A model: a row a profile under :data:`HEADS`, its best artifacts in words, what failed, and what to know."""

    name: str
    rows: tuple[tuple[str, ...], ...]
    best: tuple[tuple[str, str], ...]
    problems: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def models(sweep: Sweep) -> list[ModelView]:
    """Return every model of a sweep, in the grid's order."""
    return [
        ModelView(
            name,
            tuple(_row(job) for job in jobs),
            tuple(_best(item, sweep) for item in sweep.best if item.model == name),
            tuple((job.profile, _problem(job)) for job in jobs if _problem(job)),
            tuple(_notes(jobs)),
        )
        for name, jobs in models_of(sweep.jobs).items()
    ]


def summary(sweep: Sweep) -> str:
    """Return how many jobs came to what, in words."""
    statuses = [job.status for job in sweep.jobs]
    order = ("accepted", "built", "rejected", "failed", "refused", "running", "waiting")
    told = ", ".join(f"{statuses.count(status)} {status}" for status in order if status in statuses)
    return f"{count(len(models_of(sweep.jobs)), 'model')}, {count(len(sweep.jobs), 'job')}: {told}"


def conditions(sweep: Sweep) -> list[str]:
    """Return what a reader of the numbers has to know."""
    found = []
    if not sweep.validated:
        found.append("Nothing was measured on the artifacts: the sweep ran without validation.")
    elif sweep.at_once > 1 and any(job.outcome and job.outcome.timing for job in sweep.jobs):
        found.append(
            f"Up to {sweep.at_once} jobs shared a machine while speeds were measured: ratios come from runs in "
            "alternation, rates may be lower than those of an artifact that has the machine for itself."
        )
    if not sweep.complete:
        found.append("The sweep was ended before all of its jobs were; the same command continues it.")
    return found


def _row(job: JobRecord) -> tuple[str, ...]:
    outcome = job.outcome
    took = _NOTHING if job.seconds is None else seconds(job.seconds)
    if outcome is None:
        return (job.profile, job.status, *[_NOTHING] * 5, took, _NOTHING, _NOTHING)
    timing = outcome.timing
    return (
        job.profile,
        job.status,
        format_size(outcome.model_bytes),
        _NOTHING if outcome.loss is None else lost(outcome.loss),
        _NOTHING if timing is None else rate(timing),
        _ratio(None if timing is None else timing.speedup_vs_pytorch),
        _ratio(None if timing is None else timing.speedup_vs_onnx_float),
        took,
        _NOTHING if outcome.peak_rss_bytes is None else format_size(outcome.peak_rss_bytes),
        outcome.digest[:DIGEST_LETTERS],
    )


def lost(loss: Loss) -> str:
    """Return a loss with its unit."""
    unit = {"kl": "KL", "cosine_distance": "cos. dist.", "label_disagreement": "other labels"}[loss.measure]
    return f"{with_error(loss.value, loss.standard_error)} {unit}"


def rate(timing: Timing) -> str:
    """Return a rate or a latency with its unit."""
    return f"{plain(timing.value)} {timing.unit}"


def _ratio(value: float | None) -> str:
    return _NOTHING if value is None else times(value)


def _best(item: Best, sweep: Sweep) -> tuple[str, str]:
    job = sweep.job(item.job)
    assert job.outcome is not None, "only artifacts are the best"
    what = item.what if item.limit_bytes is None else f"{item.what} below {format_size(item.limit_bytes)}"
    told = [format_size(job.outcome.model_bytes)]
    told += [] if job.outcome.loss is None else [lost(job.outcome.loss)]
    told += [] if job.outcome.timing is None else [rate(job.outcome.timing)]
    return what, f"{job.profile} ({', '.join(told)})"


def _problem(job: JobRecord) -> str:
    if job.outcome is not None:
        return "; ".join(job.outcome.reasons) if job.outcome.status == "rejected" else ""
    if job.state in ("failed", "refused"):
        return job.error or "no reason was given"
    return ""


def _notes(jobs: Sequence[JobRecord]) -> list[str]:
    """Return why something has no best."""
    found = candidates(jobs)
    notes = []
    losses = [outcome.loss for _, outcome in found if outcome.loss is not None]
    timings = [outcome.timing for _, outcome in found if outcome.timing is not None]
    if not losses_compare(losses):
        notes.append(
            "Losses were measured by different measures or on different texts: none is called the most accurate."
        )
    if not timings_compare(timings):
        notes.append("Speeds were measured on different machines or work: none is called the fastest.")
    return notes
