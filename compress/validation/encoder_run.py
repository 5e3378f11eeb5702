"""Validation of an encoder: drift, labelled examples, placement and latency on each provider, then the gate.

As for decoders (``run``): what goes wrong with the artifact is a reason to fail, what goes wrong with the request is an
exception. The artifact runs padded batches of mixed lengths, the source model never sees padding: an attention mask
that leaks shows as drift.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from compress import temporary
from compress.errors import CompressError, UsageError
from compress.report.model import EncoderDrift, Stage
from compress.validation.artifact import DECODING, Artifact, open_artifact
from compress.validation.encoder_measure import Reference, Source, compare, make_reference, measure_drift, run_drift
from compress.validation.encoder_speed import EncoderSpeedPlan, measure_encoder_speed
from compress.validation.gate import judge
from compress.validation.labels import Labels, read_labels
from compress.validation.on_provider import REFERENCE, Terms, check_statically, run_artifact, runtime_of
from compress.validation.run import (
    CheckpointSpec,
    Measured,
    Progress,
    Validation,
    measure_from_cpu,
    output_of,
    since,
    skip_speed,
    verdicts,
)
from compress.validation.speed import Baselined, Contender, float_contender

DRIFT_MEASURES = ("cosine", "worst_cosine", "neighbour_agreement", "label_agreement")
ACCURACY_MEASURES = ("accuracy_drop", "accuracy_drop_bound")


def run_encoder_validation(
    artifact: Path,
    *,
    checkpoint_spec: CheckpointSpec | None,
    budgets: Mapping[str, float | None],
    providers: Sequence[str] = ("cpu",),
    eval_text: Path | None = None,
    eval_labels: Path | None = None,
    texts: int = 256,
    max_length: int | None = None,
    lengths: Sequence[int] = (16, 128, 512),
    batches: Sequence[int] = (1, 8),
    repeats: int = 3,
    pooling: str = "none",
    normalize: bool = False,
    threads: int = 1,
    float_baseline: Path | None = None,
    float_baseline_reason: str | None = None,
    pytorch_baseline: bool = True,
    progress: Progress = lambda stage, fraction: None,
    memory_cap: int | None = None,
    speed_plan: EncoderSpeedPlan | None = None,
    terms: Terms = Terms(),  # noqa: B008 - frozen
) -> Validation:
    """Measure an encoder's artifact and judge it.

    Args:
        artifact: Its directory.
        checkpoint_spec: The source model; ``None`` measures no drift and no PyTorch baseline.
        budgets: Limits by name (``gate.BUDGETS``); those that the task does not have are skipped.
        providers: Where to run it; each is measured and judged by itself.
        eval_text: The user's UTF-8 text, or the embedded default's evaluation half.
        eval_labels: The user's labelled examples (``labels``).
        texts: The most texts of drift.
        max_length: Where texts are cut, in tokens. Default: 256 for drift, or the model's positions where fewer; all
            its positions for labelled examples.
        lengths: Tokens a sequence in the measurement of speed; those beyond the model's positions are left out.
        batches: Sequences a batch there.
        repeats: Rounds there.
        pooling: What the graph's ``sentence_embedding`` is: ``mean``, ``cls``, ``max``; ``none`` where it has none,
            then the mean over each text's tokens is compared.
        normalize: Whether the graph's embedding has length one.
        threads: Threads of every run.
        float_baseline: The unquantized graph, or
        float_baseline_reason: why there is none.
        pytorch_baseline: Whether to measure the source model in PyTorch.
        progress: Called with a stage's name and the fraction of it that is done.
        memory_cap: The most bytes that the source model or a baseline may take.
        speed_plan: All of the speed measurement's settings but threads; it replaces ``lengths``, ``batches``,
            ``repeats``.
        terms: Provider options, and what may fall back.

    Returns:
        The measures and the verdict.

    Raises:
        UsageError: The text, the labels, a length or a budget's name makes no sense, or labels without a source.
        ResourceError: The source model does not fit into memory, or outputs do not fit on the disk.
        CompressError: The artifact directory or the source model cannot be read.
    """
    opened = replace(open_artifact(artifact), provider_options=terms.options)
    if opened.task == DECODING:
        raise UsageError("this artifact is a decoder", where=str(artifact))
    judge(budgets, {}, task=opened.task)  # an unknown budget is told before work starts
    wanted = speed_plan or EncoderSpeedPlan(lengths, batches, repeats)
    plan = EncoderSpeedPlan(
        wanted.lengths, wanted.batches, wanted.repeats, threads, wanted.seconds, wanted.runs, wanted.timeout
    )
    check_length(opened.context_length, max_length)
    labels = _labels(opened, eval_labels, checkpoint_spec)
    source = None if checkpoint_spec is None else Source(checkpoint_spec, pooling, normalize, memory_cap)
    stages: list[Stage] = []
    results: dict[str, Measured] = {name: Measured() for name in providers}
    with temporary.directory("compress-validate-") as scratch:
        work = Path(scratch)
        reference = None
        if source is not None:
            reference = make_reference(
                opened, source, eval_text, labels, texts, max_length, plan, work, stages, progress
            )
        for name, measured in results.items():
            measure_graph(opened, name, reference, measured, plan, work, stages, progress)
    for name, measured in results.items():
        contenders = _baselines(
            source if pytorch_baseline else None, float_baseline, float_baseline_reason, memory_cap, name
        )
        _measure_speed(opened, name, contenders, measured, plan, stages, progress)
    judged, each = verdicts(budgets, results, opened.bytes, terms, task=opened.task)
    return Validation(
        verdict=judged,
        providers=each,
        drift=next((measured.drift for measured in results.values() if measured.drift), None),
        speed=tuple(measured.speed for measured in results.values() if measured.speed),
        placement=tuple(measured.placement for measured in results.values() if measured.placement),
        stages=tuple(stages),
        artifact_bytes=opened.bytes,
    )


def check_length(positions: int | None, max_length: int | None) -> None:
    """Refuse sequences that a model has no positions for; ``None``: its config says no number.

    Raises:
        UsageError: ``max_length`` is beyond the position table.
    """
    if max_length is not None and positions is not None and max_length > positions:
        raise UsageError(
            f"texts of {max_length} tokens are longer than the model's table of {positions} positions",
            hint=f"--set validation.max_length={positions}",
        )


def measure_graph(
    artifact: Artifact,
    provider: str,
    reference: Reference | None,
    measured: Measured,
    plan: EncoderSpeedPlan,
    work: Path,
    stages: list[Stage],
    progress: Progress,
) -> None:
    """Fill in drift and task accuracy (with a reference), and placement."""
    start = time.perf_counter()
    every = (*DRIFT_MEASURES, *ACCURACY_MEASURES)
    static = runtime_of(provider) is None
    try:
        if static:
            response = check_statically(artifact, provider, plan.timeout)
        elif reference is None:
            report = lambda fraction: progress("placement", fraction)  # noqa: E731
            response = run_artifact(artifact, provider, [], plan.threads, plan.timeout, report)
        else:
            measured.drift, response = measure_drift(artifact, provider, reference, plan, work, progress)
    except UsageError:
        raise
    except CompressError as error:
        output_of(work, provider).unlink(missing_ok=True)  # half of it would pass for what the others are held to
        measured.fail(provider, error)
        measured.missing |= dict.fromkeys(every, "the run failed")
        return
    stages.append(Stage(name=f"drift on {provider}", seconds=since(start), peak_rss_bytes=response["peak_rss_bytes"]))
    measured.note(response)
    if isinstance(measured.drift, EncoderDrift) and reference is not None and provider != REFERENCE:
        _measure_from_cpu(artifact, provider, reference, measured, plan, work, progress)
    if not isinstance(measured.drift, EncoderDrift):
        measured.missing |= dict.fromkeys(
            every, "only the operators were looked up" if static else "no reference model was given"
        )
        return
    measured.numbers |= numbers(measured.drift)
    measured.missing |= dict.fromkeys(ACCURACY_MEASURES, "no labelled examples were given, see --eval-labels")


def _measure_from_cpu(
    artifact: Artifact,
    provider: str,
    reference: Reference,
    measured: Measured,
    plan: EncoderSpeedPlan,
    work: Path,
    progress: Progress,
) -> None:
    """Fill in how far a provider is from the CPU provider on the same graph: what it alone is to blame for."""

    def against(base: Path) -> EncoderDrift:
        source = replace(reference, drift=replace(reference.drift, outputs=base))
        return compare(artifact, provider, source, output_of(work, provider))

    measure_from_cpu(
        measured, work, lambda base: run_drift(artifact, REFERENCE, reference, base, plan, progress), against
    )


def numbers(drift: EncoderDrift) -> dict[str, float | None]:
    """Return what the gate judges of an encoder's drift, by measure."""
    accuracy = drift.task_accuracy
    return {
        "cosine": drift.cosine.mean if drift.cosine else None,
        "worst_cosine": drift.cosine.min if drift.cosine else None,
        "neighbour_agreement": drift.neighbour_agreement,
        "label_agreement": drift.label_agreement,
        "accuracy_drop": -accuracy.difference if accuracy else None,
        "accuracy_drop_bound": -accuracy.interval[0] if accuracy else None,
    }


def _labels(artifact: Artifact, path: Path | None, checkpoint: CheckpointSpec | None) -> Labels | None:
    if path is None:
        return None
    if checkpoint is None:
        raise UsageError("labelled examples are evaluated beside the source model", hint="give --reference MODEL")
    return read_labels(path, artifact)


def _baselines(
    source: Source | None, graph: Path | None, reason: str | None, memory_cap: int | None, provider: str
) -> dict[Baselined, Contender]:
    pytorch = Contender(skipped="it was not asked for")
    if source is not None:
        pytorch = Contender("encoder_reference", source.as_request())
    return {"pytorch": pytorch, "onnx_float": float_contender(graph, reason, memory_cap, provider)}


def _measure_speed(
    artifact: Artifact,
    provider: str,
    contenders: Mapping[Baselined, Contender],
    measured: Measured,
    plan: EncoderSpeedPlan,
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
        speed = measure_encoder_speed(
            artifact, provider, contenders, plan, lambda fraction: progress("speed", fraction)
        )
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
