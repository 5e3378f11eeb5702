"""Latency of an encoder beside its baselines, at several lengths and batches, in alternation as in ``speed``.

A round starts each contender in a fresh worker, which runs every point: once unrecorded, then for ``seconds``. Medians
are over the runs of all rounds. The main point, which the report's own latency and speedups are of, is batch 1 at 128
tokens, or the measured one nearest to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compress.report.environment import environment
from compress.report.model import EncoderBaseline, EncoderSpeed, Latency, MeasuredPoint, Point
from compress.validation.artifact import Artifact
from compress.validation.protocol import run_worker
from compress.validation.speed import Baselined, Contender, alternate, artifact_contender

MAIN_BATCH, MAIN_LENGTH = 1, 128
#: A fill-mask model gives a distribution over the vocabulary at every position: points beyond this are left out.
MAX_OUTPUT_BYTES = 1 << 28

Shape = tuple[int, int]


@dataclass(frozen=True)
class EncoderSpeedPlan:
    """What to run: tokens a sequence, sequences a batch, rounds, threads inside an operator.

    ``seconds`` and ``runs`` bound one point in one round, ``timeout`` (seconds) one worker.
    """

    lengths: Sequence[int] = (16, 128, 512)
    batches: Sequence[int] = (1, 8)
    repeats: int = 3
    threads: int = 1
    seconds: float = 0.25
    runs: int = 50
    timeout: float = 3600.0


@dataclass
class _Times:
    """What the rounds of one contender gave, in seconds and bytes."""

    runs: dict[Shape, list[float]] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)
    peak: int = 0
    evidence: str = "none"
    device: str = ""


def points_of(artifact: Artifact, plan: EncoderSpeedPlan) -> list[Shape]:
    """Return the ``(batch, length)`` that a model can run, in order; at its full length if all are longer."""
    longest = artifact.context_length or max(plan.lengths)
    lengths = sorted({length for length in plan.lengths if length <= longest} or {longest})
    width = 4 * artifact.vocab_size if artifact.task == "fill-mask" else 0
    found = [(batch, length) for length in lengths for batch in sorted(set(plan.batches))]
    return [(batch, length) for batch, length in found if batch * length * width <= MAX_OUTPUT_BYTES] or found[:1]


def main_point(points: Sequence[Shape]) -> Shape:
    """Return the point that the report's own numbers are of: the nearest batch, then the nearest length."""
    return min(points, key=lambda point: (abs(point[0] - MAIN_BATCH), abs(point[1] - MAIN_LENGTH)))


def measure_encoder_speed(
    artifact: Artifact,
    provider: str,
    baselines: Mapping[Baselined, Contender],
    plan: EncoderSpeedPlan,
    progress: Callable[[float], None] = lambda fraction: None,
) -> EncoderSpeed:
    """Measure an encoder and its baselines in alternation.

    Args:
        artifact: The artifact.
        provider: Which provider runs it.
        baselines: Contenders by name; none to measure the artifact alone.
        plan: Points, rounds, threads.
        progress: Called with the fraction of the work that is done.

    Raises:
        CompressError: The artifact itself cannot run.
    """
    contenders: dict[str, Contender] = {str(name): item for name, item in baselines.items()}
    contenders["artifact"] = artifact_contender(
        artifact.model, artifact.session_options, provider, artifact.provider_options.get(provider)
    )
    times = {name: _Times() for name in contenders}
    points = points_of(artifact, plan)
    job = {
        "kind": "latency",
        "points": points,
        "seconds": plan.seconds,
        "runs": plan.runs,
        "vocab_size": artifact.vocab_size,
    }

    def run(name: str) -> None:
        _round(contenders[name], job, points, plan, times[name])

    skipped = alternate(contenders, plan.repeats, run, progress)
    return _speed(provider, plan, points, times, skipped)


def _round(
    contender: Contender, job: Mapping[str, Any], points: Sequence[Shape], plan: EncoderSpeedPlan, times: _Times
) -> None:
    """Run one contender once and note its times."""
    request = {**contender.request, "threads": plan.threads, "jobs": [job]}
    response = run_worker(contender.module, request, timeout=plan.timeout, runtime=contender.runtime)
    for point, seconds in zip(points, response["results"][0]["seconds"], strict=True):
        times.runs.setdefault(point, []).extend(seconds)
    times.load.append(response["load_seconds"])
    times.peak = max(times.peak, response["peak_rss_bytes"])
    times.evidence = response.get("evidence", "measured")
    times.device = response.get("device", "")


def _speed(
    provider: str,
    plan: EncoderSpeedPlan,
    points: Sequence[Shape],
    times: Mapping[str, _Times],
    skipped: Mapping[str, str],
) -> EncoderSpeed:
    own, main = times["artifact"], main_point(points)
    ran = [name for name in times if name != "artifact" and name not in skipped]

    def ratios(point: Shape) -> dict[str, float]:
        median = np.median(own.runs[point])
        return {f"speedup_vs_{name}": float(np.median(times[name].runs[point]) / median) for name in ran}

    return EncoderSpeed.model_validate(
        {
            "provider": provider,
            "device": own.device or environment().cpu,
            "evidence": own.evidence,
            "threads": plan.threads,
            "repeats": plan.repeats,
            "load_seconds": float(np.median(own.load)),
            "peak_rss_bytes": own.peak,
            "batch": main[0],
            "length": main[1],
            "latency_ms": latency(own.runs[main]),
            "points": [
                MeasuredPoint.model_validate({**_point(point, own.runs[point]), **ratios(point)}) for point in points
            ],
            "baselines": {
                name: _baseline(seen, points, skipped.get(name)) for name, seen in times.items() if name != "artifact"
            },
            **ratios(main),
        }
    )


def _baseline(times: _Times, points: Sequence[Shape], skipped: str | None) -> EncoderBaseline:
    if skipped is not None:
        return EncoderBaseline(skipped=skipped)
    return EncoderBaseline(
        load_seconds=float(np.median(times.load)),
        peak_rss_bytes=times.peak,
        points=tuple(Point.model_validate(_point(point, times.runs[point])) for point in points),
    )


def _point(point: Shape, seconds: list[float]) -> dict[str, Any]:
    batch, length = point
    median = float(np.median(seconds))
    return {
        "batch": batch,
        "length": length,
        "runs": len(seconds),
        "latency_ms": latency(seconds),
        "sequences_per_second": batch / median,
        "tokens_per_second": batch * length / median,
    }


def latency(seconds: list[float]) -> Latency:
    """Return milliseconds a run from the seconds of each: the median and the 95th percentile."""
    middle, slow = np.quantile(seconds, [0.5, 0.95]) * 1000
    return Latency(p50=float(middle), p95=float(slow))
