"""Validation of an artifact: drift, decoding, placement and speed on each provider, then the gate.

What goes wrong with the artifact (a crash, a hang, logits that are not finite, a provider that refuses it) is a reason
to fail, not an exception; what goes wrong with the request (no text, no disk, no reference) is an exception.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from compress import temporary
from compress.errors import CompressError, UsageError
from compress.report.model import (
    AnyDrift,
    AnySpeed,
    DecodeConsistency,
    DecoderDrift,
    Divergence,
    Estimate,
    EvaluationText,
    Evidence,
    Histogram,
    Placement,
    ProviderVerdict,
    Sample,
    Stage,
    Verdict,
)
from compress.validation import drift, on_provider, text
from compress.validation.artifact import DECODING, Artifact, open_artifact
from compress.validation.gate import judge
from compress.validation.histogram import KL_EDGES
from compress.validation.logits import LogitsFile, check_disk
from compress.validation.losses import Losses
from compress.validation.on_provider import REFERENCE, Terms, run_artifact
from compress.validation.protocol import CheckpointSpec as CheckpointSpec
from compress.validation.protocol import Json, run_worker
from compress.validation.room import Way
from compress.validation.samples import Sampling
from compress.validation.speed import Baselined, Contender, SpeedPlan, float_contender, measure_speed

Progress = Callable[[str, float], None]
DECODE_WINDOWS = 4
DECODE_STEPS = 16


@dataclass(frozen=True)
class Validation:
    """The parts of a report that validation fills in; ``drift``, ``losses``, ``samples`` are the first provider's."""

    verdict: Verdict
    drift: AnyDrift | None
    speed: tuple[AnySpeed, ...]
    placement: tuple[Placement, ...]
    stages: tuple[Stage, ...]
    artifact_bytes: int
    providers: tuple[ProviderVerdict, ...] = ()
    samples: tuple[Sample, ...] = ()
    losses: Losses | None = None


@dataclass
class Measured:
    """What the gate is told of one provider, and what the report says of it."""

    numbers: dict[str, float | None] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    drift: AnyDrift | None = None
    losses: Losses | None = None
    placement: Placement | None = None
    speed: AnySpeed | None = None
    drift_from_cpu: AnyDrift | None = None
    device: str | None = None
    evidence: Evidence = "none"
    versions: dict[str, str] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    provider_failed: bool = False

    def note(self, response: Json) -> None:
        """Take over what a worker's answer says of the provider."""
        self.placement = Placement.model_validate(response["placement"])
        self.device, self.evidence, self.versions = response["device"], response["evidence"], response["versions"]

    def fail(self, provider: str, error: CompressError) -> None:
        """Take a failed run for a reason to fail."""
        self.failures.append(f"on {provider}: {one_line(error)}")
        self.provider_failed = self.provider_failed or on_provider.is_the_providers(provider, error)


@dataclass(frozen=True)
class Reference:
    """The source model's logits on disk, and what it was stored in."""

    windows: text.Windows
    windows_path: Path
    logits: Path
    eval_text: text.Text
    dtype: str


def run_validation(
    artifact: Path,
    *,
    checkpoint_spec: CheckpointSpec | None,
    budgets: Mapping[str, float | None],
    providers: Sequence[str] = ("cpu",),
    eval_text: Path | None = None,
    tokens: int = 2048,
    window: int = 512,
    threads: int = 1,
    float_baseline: Path | None = None,
    float_baseline_reason: str | None = None,
    pytorch_baseline: bool = True,
    progress: Progress = lambda stage, fraction: None,
    speed_plan: SpeedPlan | None = None,
    memory_cap: int | None = None,
    terms: Terms = Terms(),  # noqa: B008 - frozen
    sample_tokens: int = 0,
    way: Way = Way(),  # noqa: B008 - frozen
) -> Validation:
    """Measure an artifact and judge it.

    Args:
        artifact: Its directory.
        checkpoint_spec: The source model; ``None`` measures no drift and no PyTorch baseline.
        budgets: Limits by name (``gate.BUDGETS``).
        providers: Where to run it; each is measured and judged by itself.
        eval_text: The user's UTF-8 text, or the embedded default's evaluation half.
        tokens: Tokens of drift.
        window: Tokens a window.
        threads: Threads of every run.
        float_baseline: The unquantized graph, or
        float_baseline_reason: why there is none.
        pytorch_baseline: Whether to measure the source model in PyTorch.
        progress: Called with a stage's name and the fraction of it that is done.
        speed_plan: Lengths and rounds; its threads are replaced by ``threads``. Default: 128 + 32 tokens, 3 rounds.
        memory_cap: The most bytes a baseline may take.
        terms: Provider options, and what may fall back.
        sample_tokens: The most tokens that source and artifact write after each prompt; 0 for none.
        way: How it fits into memory: in pieces, speed and samples are not measured.

    Returns:
        The measures and the verdict.

    Raises:
        UsageError: The text, the lengths, a budget or a provider's name makes no sense.
        ResourceError: The logits do not fit on the disk (``TMPDIR``, or else beside the artifact).
        CompressError: The artifact directory or the source model cannot be read.
    """
    in_pieces = way.in_pieces
    opened = replace(open_artifact(artifact), provider_options=terms.options, in_pieces=in_pieces is not None)
    judge(budgets, {})  # an unknown budget is told before work starts
    plan = speed_plan or SpeedPlan()
    plan = SpeedPlan(plan.prompt_tokens, plan.new_tokens, plan.repeats, threads, plan.timeout)
    _check_lengths(opened, window, plan)
    stages: list[Stage] = []
    results: dict[str, Measured] = {name: Measured() for name in providers}
    sampling = Sampling(opened, sample_tokens, by_rows=way.by_rows)
    if in_pieces is not None and sample_tokens:
        sampling = Sampling(opened, 0, reason=in_pieces)
    with temporary.directory("compress-validate-") as scratch:
        work = Path(scratch)
        reference = None
        if checkpoint_spec is not None:
            reference = make_reference(
                opened,
                checkpoint_spec,
                eval_text,
                tokens,
                window,
                plan,
                work,
                stages,
                progress,
                sampling,
                by_rows=way.by_rows,
            )
            check_disk(work, ((len(results) + 1) * opened.vocab_size + _between(opened)) * reference.windows.size * 4)
        for name, measured in results.items():
            measure_graph(opened, name, reference, measured, plan, work, stages, progress, sampling)
    for name, measured in results.items():
        if in_pieces is not None:
            skip_speed(measured, ("pytorch", "onnx_float"), in_pieces)
            continue
        contenders = _baselines(
            checkpoint_spec if pytorch_baseline else None, float_baseline, float_baseline_reason, memory_cap, name
        )
        contenders["pytorch"] = replace(contenders["pytorch"], sampling=sampling)
        _measure_speed(opened, name, contenders, measured, plan, stages, progress)
    if checkpoint_spec is not None:
        _finish_samples(sampling, checkpoint_spec, results, plan, stages, progress)
    judged, each = verdicts(budgets, results, opened.bytes, terms)
    return Validation(
        verdict=judged,
        providers=each,
        drift=next((measured.drift for measured in results.values() if measured.drift), None),
        speed=tuple(measured.speed for measured in results.values() if measured.speed),
        placement=tuple(measured.placement for measured in results.values() if measured.placement),
        stages=tuple(stages),
        artifact_bytes=opened.bytes,
        samples=sampling.samples,
        losses=next((measured.losses for measured in results.values() if measured.drift), None),
    )


def _finish_samples(
    sampling: Sampling,
    checkpoint: CheckpointSpec,
    results: Mapping[str, Measured],
    plan: SpeedPlan,
    stages: list[Stage],
    progress: Progress,
) -> None:
    """Ask the source for its side of the samples where no baseline did; say why there are none."""
    stage = sampling.read_ahead(checkpoint, plan.threads, plan.timeout, lambda fraction: progress("samples", fraction))
    if stage is not None:
        stages.append(stage)
    if sampling.reason is not None and not sampling.samples:
        for measured in results.values():
            measured.not_measured["samples"] = sampling.reason


def make_reference(
    artifact: Artifact,
    checkpoint: CheckpointSpec,
    eval_text: Path | None,
    tokens: int,
    window: int,
    plan: SpeedPlan,
    work: Path,
    stages: list[Stage],
    progress: Progress,
    sampling: Sampling | None = None,
    *,
    by_rows: bool = False,
) -> Reference:
    """Cut the text into windows and write the source model's logits for them into ``work``; encode the prompts."""
    chosen = text.embedded("evaluation") if eval_text is None else text.from_file(eval_text, tokens)
    windows = text.windows(chosen, artifact.directory, length=window, tokens=tokens, vocab_size=artifact.vocab_size)
    check_disk(work, windows.size * artifact.vocab_size * 4)
    path, output = work / "windows.npy", work / "reference.npy"
    np.save(path, windows)
    jobs: list[Json] = [{"kind": "logits", "windows": str(path), "output": str(output), "by_rows": by_rows}]
    jobs += [] if sampling is None else sampling.prompt_jobs()
    request = {"checkpoint": checkpoint.as_request(), "threads": plan.threads, "jobs": jobs}
    start = time.perf_counter()
    response = run_worker(
        "reference", request, timeout=plan.timeout, progress=lambda fraction: progress("reference", fraction)
    )
    stages.append(Stage(name="reference", seconds=since(start), peak_rss_bytes=response["peak_rss_bytes"]))
    if sampling is not None:
        sampling.take_prompts(response["results"][1:])
    shape = response["results"][0]["shape"]
    if shape != [windows.size, artifact.vocab_size]:
        raise CompressError(
            f"the source model has a vocabulary of {shape[-1]}, the artifact of {artifact.vocab_size}",
            where=checkpoint.reference,
            hint="give the model that the artifact was made from",
        )
    return Reference(windows, path, output, chosen, str(response["results"][0]["dtype"]))


def measure_drift(
    artifact: Artifact,
    provider: str,
    reference: Reference,
    plan: SpeedPlan,
    work: Path,
    progress: Progress,
    sampling: Sampling | None = None,
) -> tuple[DecoderDrift, Losses, Json]:
    """Run an artifact on the reference's windows, at once and through the cache; return drift, losses and the response.

    It writes its samples in the same session.

    Raises:
        CompressError: The worker failed, or logits are not finite.
    """
    windows = reference.windows
    count, length = windows.shape
    some, steps = min(DECODE_WINDOWS, count), min(DECODE_STEPS, length // 2)
    some_path = work / "decoded-windows.npy"
    np.save(some_path, windows[:some])
    output, decoded = output_of(work, provider), work / "decoded.npy"
    jobs: list[Json] = [
        {"kind": "logits", "windows": str(reference.windows_path), "output": str(output)},
        {"kind": "cached_logits", "windows": str(some_path), "output": str(decoded), "prefill": length - steps},
    ]
    measuring = len(jobs)
    jobs += [] if sampling is None else sampling.artifact_jobs()
    response = run_artifact(
        artifact, provider, jobs, plan.threads, plan.timeout, lambda fraction: progress("drift", fraction)
    )
    if sampling is not None:
        sampling.take_written(response["results"][measuring:])
    measured = drift.measure(LogitsFile(reference.logits), LogitsFile(output), windows)
    rows = (np.arange(some)[:, None] * length + np.arange(length - steps, length)).ravel()
    through_cache = drift.measure_decode(
        LogitsFile(reference.logits, rows), LogitsFile(output, rows), LogitsFile(decoded), steps
    )
    return _report_drift(provider, reference, measured, through_cache), measured.losses, response


def measure_graph(
    artifact: Artifact,
    provider: str,
    reference: Reference | None,
    measured: Measured,
    plan: SpeedPlan,
    work: Path,
    stages: list[Stage],
    progress: Progress,
    sampling: Sampling | None = None,
) -> None:
    """Fill in drift (with a reference) and placement."""
    start = time.perf_counter()
    static = on_provider.runtime_of(provider) is None
    why = "only the operators were looked up" if static else "no reference model was given"
    try:
        if static:
            response = on_provider.check_statically(artifact, provider, plan.timeout)
        elif reference is None:
            response = run_artifact(
                artifact, provider, [], plan.threads, plan.timeout, lambda fraction: progress("placement", fraction)
            )
        else:
            measured.drift, measured.losses, response = measure_drift(
                artifact, provider, reference, plan, work, progress, sampling
            )
    except UsageError:
        raise
    except CompressError as error:
        output_of(work, provider).unlink(missing_ok=True)  # half of it would pass for what the others are held to
        measured.fail(provider, error)
        measured.missing |= dict.fromkeys(("kl", "top1_agreement", "perplexity_ratio"), "the run failed")
        return
    name = f"drift on {provider}" + (f" in {response['pieces']} pieces" if artifact.in_pieces else "")
    stages.append(Stage(name=name, seconds=since(start), peak_rss_bytes=response["peak_rss_bytes"]))
    measured.note(response)
    if isinstance(measured.drift, DecoderDrift) and reference is not None and provider != REFERENCE:
        _measure_from_cpu(artifact, provider, reference, measured, plan, work, progress)
    if not isinstance(measured.drift, DecoderDrift):
        measured.missing |= dict.fromkeys(("kl", "top1_agreement", "perplexity_ratio"), why)
        return
    measured.numbers |= {
        "kl": measured.drift.kl_divergence.mean,
        "top1_agreement": measured.drift.top1_agreement,
        "perplexity_ratio": measured.drift.perplexity_ratio.value,
    }


def _measure_from_cpu(
    artifact: Artifact,
    provider: str,
    reference: Reference,
    measured: Measured,
    plan: SpeedPlan,
    work: Path,
    progress: Progress,
) -> None:
    """Fill in how far a provider is from the CPU provider on the same graph: what it alone is to blame for."""

    def on_cpu(base: Path) -> None:
        job: Json = {"kind": "logits", "windows": str(reference.windows_path), "output": str(base)}
        run_artifact(
            artifact, REFERENCE, [job], plan.threads, plan.timeout, lambda fraction: progress("drift", fraction)
        )

    def compare(base: Path) -> DecoderDrift:
        found = drift.measure(LogitsFile(base), LogitsFile(output_of(work, provider)), reference.windows)
        return _report_drift(provider, reference, found, None)

    measure_from_cpu(measured, work, on_cpu, compare)


def measure_from_cpu(
    measured: Measured, work: Path, on_cpu: Callable[[Path], object], compare: Callable[[Path], AnyDrift]
) -> None:
    """Fill in ``drift_from_cpu``.

    Args:
        measured: The provider's.
        work: Where outputs are kept; those of the CPU are made once.
        on_cpu: Writes them to a path.
        compare: Compares the provider's with them.
    """
    base = output_of(work, REFERENCE)
    try:
        if not base.exists():
            on_cpu(base)
        found = compare(base)
    except CompressError as error:
        base.unlink(missing_ok=True)  # what a failed run left is nobody's reference
        measured.not_measured["drift_from_cpu"] = one_line(error)
        return
    measured.drift_from_cpu = found.model_copy(update={"reference": "the same artifact on the cpu provider"})


def output_of(work: Path, provider: str) -> Path:
    """Return where an artifact's outputs on a provider are kept while it is judged."""
    return work / f"on-{provider}.npy"


def _measure_speed(
    artifact: Artifact,
    provider: str,
    contenders: Mapping[Baselined, Contender],
    measured: Measured,
    plan: SpeedPlan,
    stages: list[Stage],
    progress: Progress,
) -> None:
    """Fill in speed, with the baselines of the same run."""
    if measured.failures:  # it does not run; the reason is known
        measured.missing |= {f"speedup_vs_{name}": "the run failed" for name in contenders}
        return
    if measured.evidence != "measured":
        skip_speed(measured, contenders, f"time is not measured where the run is {measured.evidence}")
        return
    start = time.perf_counter()
    try:
        speed = measure_speed(artifact, provider, contenders, plan, lambda fraction: progress("speed", fraction))
    except CompressError as error:
        measured.fail(provider, error)
        measured.missing |= {f"speedup_vs_{name}": "the run failed" for name in contenders}
        return
    stages.append(Stage(name=f"speed on {provider}", seconds=since(start), peak_rss_bytes=speed.peak_rss_bytes))
    measured.speed = speed
    measured.numbers |= {
        "speedup_vs_pytorch": speed.speedup_vs_pytorch,
        "speedup_vs_onnx_float": speed.speedup_vs_onnx_float,
    }
    measured.missing |= {f"speedup_vs_{name}": item.skipped or "" for name, item in speed.baselines.items()}


def skip_speed(measured: Measured, contenders: Iterable[str], why: str) -> None:
    """Note why there is no speed, nor a ratio to any of ``contenders``."""
    measured.not_measured["speed"] = why
    measured.missing |= {f"speedup_vs_{name}": why for name in contenders}


def verdicts(
    budgets: Mapping[str, float | None],
    results: Mapping[str, Measured],
    size: int,
    terms: Terms,
    *,
    task: str = DECODING,
) -> tuple[Verdict, tuple[ProviderVerdict, ...]]:
    """Judge every provider by itself; in the verdict of all, several providers' reasons are told apart by their names.

    A budget on speed is the measured providers' where there is one: others cannot be judged by it.
    """
    timed = any(measured.evidence == "measured" for measured in results.values())
    each, reasons = [], []
    for name, measured in results.items():
        asked = dict(budgets)
        if timed and measured.evidence in ("simulated", "emulated", "static"):
            asked = {budget: limit for budget, limit in asked.items() if not budget.startswith("min_speedup")}
        forbidden = terms.forbidden(measured.placement.fallback_nodes) if measured.placement else []
        judgement = judge(
            asked,
            {**measured.numbers, "bytes": float(size)},
            missing=measured.missing,
            fallback={name: forbidden},
            decode_self_kl=_decode_self_kl(name, measured),
            failures=measured.failures,
            task=task,
        )
        own = Verdict(status=judgement.status, reasons=judgement.reasons)
        each.append(_provider_verdict(name, measured, own, bool(forbidden)))
        reasons += [reason if len(results) == 1 else f"{name}: {reason}" for reason in judgement.reasons]
    return Verdict(status="fail" if reasons else "pass", reasons=tuple(reasons)), tuple(each)


def _provider_verdict(name: str, measured: Measured, own: Verdict, fell_back: bool) -> ProviderVerdict:
    state: Literal["ran", "fell_back", "failed", "checked"] = "checked" if measured.evidence == "static" else "ran"
    if measured.provider_failed or fell_back:
        state = "failed" if measured.provider_failed else "fell_back"
    return ProviderVerdict(
        provider=name,
        device=measured.device,
        evidence=measured.evidence,
        state=state,
        verdict=own,
        placement=measured.placement,
        drift=measured.drift,
        drift_from_cpu=measured.drift_from_cpu,
        not_measured=measured.not_measured,
        versions=measured.versions,
    )


def _decode_self_kl(name: str, measured: Measured) -> dict[str, float]:
    """Return what the gate holds decoding to: nothing where it is as near to the source as prefill is.

    Inputs that are rounded with one range for the whole prompt make prefill differ from decoding by more than kernels
    do, to prefill's disadvantage. A mixed-up cache only harms decoding.
    """
    found = measured.drift
    decode = found.decode if isinstance(found, DecoderDrift) else None
    if decode is None or decode.kl_mean <= decode.prefill_kl_mean:
        return {}
    return {name: decode.self_kl_mean}


def _baselines(
    checkpoint: CheckpointSpec | None, graph: Path | None, reason: str | None, memory_cap: int | None, provider: str
) -> dict[Baselined, Contender]:
    pytorch = Contender(skipped="it was not asked for")
    if checkpoint is not None:
        request = {"checkpoint": checkpoint.as_request(), "job": {"memory_cap": memory_cap}}
        pytorch = Contender("reference", request)
    return {"pytorch": pytorch, "onnx_float": float_contender(graph, reason, memory_cap, provider)}


def _report_drift(
    provider: str, reference: Reference, measured: drift.Drift, through_cache: drift.DecodeDrift | None
) -> DecoderDrift:
    return DecoderDrift(
        provider=provider,
        tokens=measured.tokens,
        windows=len(reference.windows),
        eval_text=EvaluationText(name=reference.eval_text.name, sha256=reference.eval_text.sha256),
        reference=f"PyTorch float32 of {reference.dtype} weights",
        reference_perplexity=measured.reference_perplexity,
        perplexity_ratio=Estimate(value=measured.perplexity_ratio, standard_error=measured.perplexity_ratio_error),
        kl_divergence=Divergence(mean=measured.kl_mean, standard_error=measured.kl_error, p99=measured.kl_p99),
        top1_agreement=measured.top1_agreement,
        confident_tokens=measured.confident_tokens,
        confident_flips=measured.confident_flips,
        logit_max_abs=measured.max_abs_difference,
        distribution=Histogram(measure="kl", edges=KL_EDGES, counts=measured.kl_counts),
        decode=None
        if through_cache is None
        else DecodeConsistency(
            tokens=through_cache.tokens,
            kl_mean=through_cache.kl_mean,
            prefill_kl_mean=through_cache.prefill_kl_mean,
            self_kl_mean=through_cache.self_kl_mean,
            self_kl_max=through_cache.self_kl_max,
        ),
    )


def _between(artifact: Artifact) -> int:
    """Return how many numbers of a token lie on the disk between pieces: two hidden states, while they are replaced."""
    hidden = artifact.config.get("hidden_size", artifact.config.get("n_embd"))
    return 4 * hidden if artifact.in_pieces and isinstance(hidden, int) else 0


def _check_lengths(artifact: Artifact, window: int, plan: SpeedPlan) -> None:
    context = artifact.context_length
    if context is None:
        return
    for length, what in (
        (window, "a window"),
        (plan.prompt_tokens + plan.new_tokens, "prompt and new tokens together"),
    ):
        if length > context:
            raise UsageError(f"{what} of {length} tokens is longer than the model's context of {context}")


def since(start: float) -> float:
    """Return the seconds since a ``time.perf_counter()``."""
    return round(time.perf_counter() - start, 3)


def one_line(error: CompressError) -> str:
    """Return what and where without the hint."""
    return f"{error.what} ({error.where})" if error.where else error.what
