"""Speed of an artifact beside its baselines, in alternation.

A round starts each contender in a fresh worker, lets it warm up once and measures it once; the next round does the same
again. A machine that slows down for a while slows all of them, which medians over rounds then forgive. A baseline that
cannot run is skipped and says why; the artifact itself has to run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress.contracts import Runtime
from compress.errors import CompressError, ResourceError
from compress.report.environment import environment
from compress.report.model import Baseline, Rate, Speed
from compress.validation.artifact import Artifact, model_bytes
from compress.validation.memory import check_memory
from compress.validation.on_provider import runtime_of
from compress.validation.protocol import run_worker
from compress.validation.samples import Sampling

Baselined = Literal["pytorch", "onnx_float"]
FLOAT_GRAPH_FACTOR = 1.2  # weights, then packed copies of some and activations


@dataclass(frozen=True)
class SpeedPlan:
    """What to run: lengths in tokens, ``repeats`` rounds, ``threads`` inside an operator, seconds a worker may take."""

    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 3
    threads: int = 1
    timeout: float = 3600.0


@dataclass(frozen=True)
class Contender:
    """One thing to measure: a worker module and its request without jobs, or the reason why there is none.

    ``sampling`` asks the source for its texts, once, when its times are taken.
    """

    module: str = ""
    request: Mapping[str, Any] = field(default_factory=dict)
    skipped: str | None = None
    runtime: Runtime | None = None
    sampling: Sampling | None = None


@dataclass
class _Times:
    """What the rounds of one contender gave, in seconds and bytes."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    peak: int = 0
    evidence: str = "none"
    device: str = ""


def artifact_contender(
    model: Path, session_options: Mapping[str, str], provider: str, provider_options: Mapping[str, str] | None = None
) -> Contender:
    """Return a graph as a contender, in the provider's own runtime."""
    request = {
        "model": str(model),
        "session_options": dict(session_options),
        "provider_options": dict(provider_options or {}),
        "provider": provider,
    }
    return Contender("worker", request, runtime=runtime_of(provider))


def float_contender(model: Path | None, reason: str | None, memory_cap: int | None, provider: str) -> Contender:
    """Return the float ONNX baseline, skipped where it is missing or predicted not to fit into memory."""
    if model is None:
        return Contender(skipped=reason or "no float graph was built")
    try:
        check_memory(int(model_bytes(model) * FLOAT_GRAPH_FACTOR), memory_cap)
    except ResourceError as error:
        return Contender(skipped=error.what)
    return artifact_contender(model, {}, provider)


def measure_speed(
    artifact: Artifact,
    provider: str,
    baselines: Mapping[Baselined, Contender],
    plan: SpeedPlan,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Speed:
    """Measure an artifact and its baselines in alternation.

    Args:
        artifact: The artifact.
        provider: Which provider runs it.
        baselines: Contenders by name; none to measure the artifact alone.
        plan: Lengths, rounds, threads.
        progress: Called with the fraction of the work that is done.

    Raises:
        CompressError: The artifact itself cannot run.
    """
    contenders: dict[str, Contender] = {str(name): item for name, item in baselines.items()}
    contenders["artifact"] = artifact_contender(
        artifact.model, artifact.session_options, provider, artifact.provider_options.get(provider)
    )
    times: dict[str, _Times] = {name: _Times() for name in contenders}
    job = {
        "kind": "speed",
        "vocab_size": artifact.vocab_size,
        "prompt_tokens": plan.prompt_tokens,
        "new_tokens": plan.new_tokens,
        "repeats": 1,
    }
    skipped = alternate(
        contenders, plan.repeats, lambda name: _round(contenders[name], job, plan, times[name]), progress
    )
    return _speed(provider, plan, times, skipped)


def alternate(
    contenders: Mapping[str, Contender], rounds: int, run: Callable[[str], None], progress: Callable[[float], None]
) -> dict[str, str]:
    """Call ``run`` with each contender's name in turn, ``rounds`` times; return why some were skipped, by name.

    Raises:
        CompressError: ``artifact`` itself failed.
    """
    skipped = {name: item.skipped for name, item in contenders.items() if item.skipped}
    done, total = 0, rounds * len(contenders)
    for _ in range(rounds):
        for name in contenders:
            if name not in skipped:
                try:
                    run(name)
                except CompressError as error:
                    if name == "artifact":
                        raise
                    skipped[name] = error.what
            done += 1
            progress(done / total)
    return skipped


def _round(contender: Contender, job: Mapping[str, Any], plan: SpeedPlan, times: _Times) -> None:
    """Run one contender once and note its times."""
    merged = {**job, **contender.request.get("job", {})}
    samples = None if contender.sampling is None else contender.sampling.source_job()
    if samples is not None:
        merged["samples"] = samples
    request = {**contender.request, "threads": plan.threads, "jobs": [merged]}
    response = run_worker(contender.module, request, timeout=plan.timeout, runtime=contender.runtime)
    result = response["results"][0]
    if contender.sampling is not None and samples is not None:
        contender.sampling.take_source(result["samples"])
    times.prefill += result["prefill_seconds"]
    times.decode += [step for steps in result["decode_seconds"] for step in steps]
    times.load.append(response["load_seconds"])
    times.peak = max(times.peak, result.get("peak_rss_bytes", response["peak_rss_bytes"]))
    times.evidence = response.get("evidence", "measured")
    times.device = response.get("device", "")


def _speed(provider: str, plan: SpeedPlan, times: Mapping[str, _Times], skipped: Mapping[str, str]) -> Speed:
    own = times["artifact"]
    baselines = {name: _baseline(seen, plan, skipped.get(name)) for name, seen in times.items() if name != "artifact"}
    ratios: dict[str, float] = {}
    for name in baselines:
        if name not in skipped:
            ratios[f"speedup_vs_{name}"] = float(np.median(times[name].decode) / np.median(own.decode))
            ratios[f"prefill_speedup_vs_{name}"] = float(np.median(times[name].prefill) / np.median(own.prefill))
    return Speed.model_validate(
        {
            "provider": provider,
            "device": own.device or environment().cpu,
            "evidence": own.evidence,
            "threads": plan.threads,
            "prompt_tokens": plan.prompt_tokens,
            "new_tokens": plan.new_tokens,
            "repeats": plan.repeats,
            "load_seconds": float(np.median(own.load)),
            "peak_rss_bytes": own.peak,
            "prefill_tokens_per_second": plan.prompt_tokens / float(np.median(own.prefill)),
            "decode_tokens_per_second": rate(own.decode),
            "baselines": baselines,
            **ratios,
        }
    )


def _baseline(times: _Times, plan: SpeedPlan, skipped: str | None) -> Baseline:
    if skipped is not None:
        return Baseline(skipped=skipped)
    return Baseline(
        load_seconds=float(np.median(times.load)),
        peak_rss_bytes=times.peak,
        prefill_tokens_per_second=plan.prompt_tokens / float(np.median(times.prefill)),
        decode_tokens_per_second=rate(times.decode),
    )


def rate(seconds: list[float]) -> Rate:
    """Return tokens a second from the seconds of each step: ``p10`` is the slow tenth, ``p90`` the fast one."""
    slow, middle, fast = np.quantile(seconds, [0.9, 0.5, 0.1])
    return Rate(median=float(1 / middle), p10=float(1 / slow), p90=float(1 / fast))
