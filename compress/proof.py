"""The proof that goes into an artifact: drift, speed and placement, measured on it, judged by the profile's budget."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress import chain, checks, pipeline, pooling, pruning, resources, temporary, workspace
from compress.allocator import give_back
from compress.contracts import Checkpoint, Encoder
from compress.errors import EXIT_OK, EXIT_OUTSIDE_BUDGET, EXIT_PROVIDER, CompressError, UsageError
from compress.package import manifest
from compress.package.writer import require_space
from compress.planning import Plan, make_plan
from compress.profile import Profile, load_profile, parse_stored_profile
from compress.profile import Validation as MeasurePlan
from compress.progress import Stages
from compress.report import calibrated, pages
from compress.report import json as report_json
from compress.report import model as report
from compress.report import tensors as tensor_records
from compress.report.environment import created, environment
from compress.source.sentence_transformers import Pooling
from compress.validation import losses, on_provider, room, text
from compress.validation.artifact import DECODING, Artifact, open_artifact
from compress.validation.gate import misstored
from compress.validation.memory import check_memory
from compress.validation.protocol import CheckpointSpec
from compress.validation.run import Validation, run_validation
from compress.validation.speed import FLOAT_GRAPH_FACTOR, SpeedPlan, measure_speed


def prove(
    model: pipeline.ModelReference,
    checkpoint: Checkpoint,
    plan: Plan,
    profile: Profile,
    directory: Path,
    options: pipeline.ExportOptions,
    stages: Stages,
    *,
    fusions: Mapping[str, int],
    tensors: tuple[report.TensorRecord, ...] = (),
    provider_names: Sequence[str] = (),
    calibration: calibrated.Calibrated | None = None,
    smaller: chain.Smaller | None = None,
    removed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Validate an artifact against its source, write ``report.json`` into it, and return the report.

    ``checkpoint`` is the source; the plan is that of what was quantized. ``tensors`` say how weights are stored.
    ``calibration`` is what a decoder was calibrated on, and how its bits were chosen. ``smaller`` is the pruned
    checkpoint, measured as well; where it is gone, ``pruning`` is what the manifest kept of it.

    Raises:
        ProviderError: A requested provider does not work here.
        CompressError: The text or the source cannot be read, or there is no room for the measurement.
    """
    names = tuple(provider_names) or (profile.provider,)
    on_provider.require(names)
    created()  # a date that makes no sense is told before the work
    needs = room.needs(plan, profile, names, {record.name: record.bytes for record in tensors})
    way = room.choose(needs, options.max_memory)
    room.check_budget(way, profile, options.max_memory)
    give_back()
    baseline = _float_baseline(checkpoint, profile, directory, options, way)
    with baseline as (graph, reason), stages.follow() as progress:
        shared: dict[str, Any] = {
            "checkpoint_spec": CheckpointSpec(model.resolved, model.adapter, model.revision, model.wanted_task),
            "budgets": _budgets(profile, options),
            "providers": names,
            "eval_text": options.eval_text,
            "threads": options.threads,
            "float_baseline": graph,
            "float_baseline_reason": reason,
            "pytorch_baseline": "pytorch" in profile.validation.baselines,
            "progress": progress,
            "memory_cap": options.max_memory,
            "terms": on_provider.Terms(
                {profile.provider: profile.provider_options}, profile.validation.allowed_fallback
            ),
        }

        def validate(place: Path, given: Mapping[str, Any]) -> Validation:
            if isinstance(plan.structure, Encoder):
                pool = pooling.resolve(plan.structure, profile, checkpoint)
                return _run_encoder(place, profile.validation, pool, options.eval_labels, given)
            return _run_decoder(place, profile.validation, plan.structure.context_length, {"way": way, **given})

        result = validate(directory, shared)
        source_bytes = plan.source_bytes
        found: report.Pruning | None = None
        if smaller is not None:
            source_bytes = make_plan(pipeline.describe(checkpoint), profile, checkpoint).source_bytes
            found = chain.measure(smaller, source_bytes, plan, profile, directory, result, shared, validate)
        elif removed is not None:
            found = chain.again(directory, report_json.NAME, removed, result)
    before = tuple(
        report.Stage(name=stage.name, seconds=stage.seconds, peak_rss_bytes=stage.peak_rss_bytes)
        for stage in stages.done
    )
    made = report.Report(
        created=created(),
        verdict=_verdict(result, tensors),
        source=report.Source(
            identifier=checkpoint.identifier,
            kind=checkpoint.kind,
            revision=checkpoint.revision,
            adapter=model.adapter.name if model.adapter else None,
        ),
        profile=report.ProfileSummary(name=profile.name, resolved=profile.model_dump(mode="json", exclude_none=True)),
        size=report.Size(
            source_bytes=source_bytes,
            artifact_bytes=result.artifact_bytes,
            ratio=source_bytes / result.artifact_bytes,
        ),
        drift=_kept(result, directory),
        speed=result.speed,
        placement=result.placement,
        providers=result.providers,
        stages=(*before, *result.stages),
        fusions=dict(fusions),
        tensors=tensors,
        samples=result.samples,
        pruning=found,
        environment=environment(),
        **_calibration(calibration, result, profile, options, directory),
    )
    report_json.write(made, directory / report_json.NAME)
    return made.model_dump(mode="json")


def _verdict(result: Validation, tensors: Sequence[report.TensorRecord]) -> report.Verdict:
    """Return the verdict of what was measured, and of how weights are stored."""
    reasons = (*result.verdict.reasons, *misstored({item.name: item.relative_error for item in tensors}))
    return report.Verdict(status="fail" if reasons else "pass", reasons=reasons)


def _kept(result: Validation, directory: Path) -> report.AnyDrift | None:
    """Return the drift, with a decoder's losses by position in a file of their own; one of an older run goes."""
    if result.losses is None or not isinstance(result.drift, report.DecoderDrift):
        (directory / losses.NAME).unlink(missing_ok=True)
        return result.drift
    return result.drift.model_copy(update={"positions": result.losses.write(directory)})


def _calibration(
    calibration: calibrated.Calibrated | None,
    result: Validation,
    profile: Profile,
    options: pipeline.ExportOptions,
    directory: Path,
) -> dict[str, Any]:
    """Return the report's ``calibration`` and ``allocation``; the picture is drawn anew with the measured loss."""
    if calibration is None:
        return {}
    evaluation, kl = None, None
    if isinstance(result.drift, report.DecoderDrift):
        kl = result.drift.kl_divergence.mean
        asked, windows = profile.validation, result.drift.windows
        # The report counts predictions: a window's last token has none.
        length = result.drift.tokens // windows + 1
        chosen = (
            text.embedded("evaluation")
            if options.eval_text is None
            else text.from_file(options.eval_text, asked.tokens)
        )
        evaluation = text.beginning(chosen, directory, length=length, tokens=windows * length)
    calibration.draw(directory, kl)
    return {"calibration": calibration.describe(evaluation), "allocation": calibration.allocated(kl)}


def _budgets(profile: Profile, options: pipeline.ExportOptions) -> dict[str, float | None]:
    """Return the profile's budgets; those of accuracy count where labels were given."""
    budgets: dict[str, float | None] = profile.budget.model_dump()
    if options.eval_labels is None:
        budgets |= {"max_accuracy_drop": None, "max_accuracy_drop_bound": None}
    return budgets


def _run_encoder(
    directory: Path, measured: MeasurePlan, pool: Pooling | None, labels: Path | None, shared: Mapping[str, Any]
) -> Validation:
    from compress.validation.encoder_run import run_encoder_validation

    return run_encoder_validation(
        directory,
        eval_labels=labels,
        texts=measured.texts,
        max_length=measured.max_length,
        lengths=measured.lengths,
        batches=measured.batches,
        repeats=measured.repeats,
        pooling=pool.mode if pool else "none",
        normalize=pool.normalize if pool else False,
        **shared,
    )


def _run_decoder(directory: Path, measured: MeasurePlan, context: int, shared: Mapping[str, Any]) -> Validation:
    prompt, new = _lengths(measured.prompt_tokens, measured.new_tokens, context)
    return run_validation(
        directory,
        tokens=measured.tokens,
        window=min(measured.window, context),
        speed_plan=SpeedPlan(prompt_tokens=prompt, new_tokens=new, repeats=measured.repeats),
        **{"sample_tokens": measured.sample_tokens, **shared},
    )


def validate_artifact(
    artifact: Path,
    *,
    reference: str | None,
    adapter: Path | None,
    providers: Sequence[str],
    eval_text: Path | None,
    eval_labels: Path | None,
    threads: int | None,
    stages: Stages,
    max_memory: int | None = None,
) -> tuple[dict[str, Any], int]:
    """Validate an existing artifact again; its report and manifest are renewed. Returns the report and an exit code.

    Raises:
        ResourceError: It would take more than ``max_memory`` bytes.
        UsageError: The source is a local path that the manifest does not keep, and no reference was given.
        CompressError: The reference is not the model that the artifact was made from.
    """
    record = manifest.read_manifest(artifact)
    open_artifact(artifact)  # what cannot be run is refused before the source is
    profile = parse_stored_profile(record["profile"], where=str(artifact / manifest.NAME))
    tensors = tensor_records.of_manifest(record, str(artifact / manifest.NAME))
    model = _source_of(record, reference, adapter)
    options = pipeline.ExportOptions(
        eval_text=eval_text,
        eval_labels=eval_labels,
        max_memory=max_memory,
        seed=record["seed"],
        threads=threads or os.cpu_count() or 1,
    )
    with workspace.alone(artifact), model.open() as checkpoint, contextlib.ExitStack() as stack:
        _check_same(checkpoint, record)
        if (record.get("pruning") or {}).get("vocabulary"):
            model = stack.enter_context(pruning.with_kept_tokens(model, checkpoint, artifact, options))
        structure = pipeline.describe(checkpoint)
        checks.check_labels(structure, checkpoint.config, options)
        plan = make_plan(structure, profile, checkpoint)
        made = prove(
            model,
            checkpoint,
            plan,
            profile,
            artifact,
            options,
            stages,
            fusions=record.get("fusions", {}),
            tensors=tensors,
            provider_names=providers,
            calibration=calibrated.of_manifest(record),
            removed=record.get("pruning"),
        )
        pages.write(artifact, record, checkpoint, made)
    passed = made["verdict"]["status"] == "pass"
    manifest.write_manifest(artifact, record, status="accepted" if passed else "rejected")
    return made, exit_code(made)


def exit_code(made: Mapping[str, Any]) -> int:
    """Return 0 for a pass, 4 when a provider failed or left nodes to another one, 3 for any other failure."""
    if made["verdict"]["status"] == "pass":
        return EXIT_OK
    at_fault = any(item["state"] in ("fell_back", "failed") for item in made["providers"])
    return EXIT_PROVIDER if at_fault else EXIT_OUTSIDE_BUDGET


def bench_artifact(
    artifact: Path,
    *,
    providers: Sequence[str],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    threads: int | None,
) -> dict[str, Any]:
    """Time an artifact on each provider; nothing is written.

    Raises:
        UsageError: Prompt and new tokens do not fit the model's context.
        ProviderError: A requested provider does not work here.
    """
    opened = open_artifact(artifact)
    if opened.task != DECODING:
        return _bench_encoder(artifact, opened, providers, repeats, threads or os.cpu_count() or 1)
    if opened.context_length is not None and prompt_tokens + new_tokens > opened.context_length:
        raise UsageError(
            f"{prompt_tokens} prompt and {new_tokens} new tokens are more than the model's context of "
            f"{opened.context_length}",
            hint="lower --prompt-tokens or --new-tokens",
        )
    recipe = parse_stored_profile(manifest.read_manifest(artifact)["profile"], where=str(artifact / manifest.NAME))
    names = tuple(providers) or (recipe.provider,)
    on_provider.require(names)
    opened = replace(opened, provider_options={recipe.provider: recipe.provider_options})
    plan = SpeedPlan(prompt_tokens, new_tokens, repeats, threads or os.cpu_count() or 1)
    speeds = [measure_speed(opened, name, {}, plan, lambda fraction: None) for name in names]
    return {
        "schema_version": 1,
        "speed": [speed.model_dump(mode="json") for speed in speeds],
        "environment": environment().model_dump(mode="json"),
    }


def _bench_encoder(
    artifact: Path, opened: Artifact, wanted: Sequence[str], repeats: int, threads: int
) -> dict[str, Any]:
    from compress.validation.encoder_speed import EncoderSpeedPlan, measure_encoder_speed

    recipe = parse_stored_profile(manifest.read_manifest(artifact)["profile"], where=str(artifact / manifest.NAME))
    names = tuple(wanted) or (recipe.provider,)
    on_provider.require(names)
    opened = replace(opened, provider_options={recipe.provider: recipe.provider_options})
    plan = EncoderSpeedPlan(recipe.validation.lengths, recipe.validation.batches, repeats, threads)
    speeds = [measure_encoder_speed(opened, name, {}, plan, lambda fraction: None) for name in names]
    return {
        "schema_version": 1,
        "speed": [speed.model_dump(mode="json") for speed in speeds],
        "environment": environment().model_dump(mode="json"),
    }


@contextlib.contextmanager
def _float_baseline(
    checkpoint: Checkpoint, profile: Profile, directory: Path, options: pipeline.ExportOptions, way: room.Way
) -> Iterator[tuple[Path | None, str | None]]:
    """Yield the float graph of the same model, built for this run only, or the reason why there is none.

    Its floats are the profile's: a provider of float16 (CUDA) would leave a float32 graph's attention to the CPU.
    """
    if "onnx_float" not in profile.validation.baselines:
        yield None, "the profile does not ask for it"
        return
    if way.in_pieces is not None:
        yield None, way.in_pieces
        return
    recipe = load_profile("float", [f"graph.float_type={profile.graph.float_type}"])
    structure = pipeline.describe(checkpoint)
    plan = make_plan(structure, recipe, checkpoint)
    pool = pooling.resolve(structure, profile, checkpoint)
    needed = max(int(plan.data_bytes * FLOAT_GRAPH_FACTOR), resources.predict(plan, recipe, options.threads).export)
    try:
        check_memory(needed, options.max_memory)
        require_space(directory, plan.predicted_bytes)
    except CompressError as error:
        yield None, error.what
        return
    place = temporary.make("float-baseline-")
    try:
        pipeline.build(checkpoint, plan, recipe, place, options.threads, Stages(), pool=pool)
        yield place / pipeline.GRAPH_NAME, None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _lengths(prompt: int, new: int, context: int) -> tuple[int, int]:
    """Shorten prompt and new tokens to fit a short context, the prompt first; the report says what was run."""
    new = min(new, max(2, context // 2))
    return max(1, min(prompt, context - new)), new


def _source_of(record: Mapping[str, Any], reference: str | None, adapter: Path | None) -> pipeline.ModelReference:
    source, task = record["source"], record.get("task")
    if source.get("adapter") and adapter is None:
        raise UsageError("the artifact was made with an adapter", hint="give it again: --adapter DIR")
    if reference is not None:
        return pipeline.ModelReference(reference, adapter=adapter, task=task)
    if source["kind"] == "hub":
        return pipeline.ModelReference(source["id"], adapter=adapter, revision=source["revision"], task=task)
    if source["kind"] == "package":
        return pipeline.ModelReference(f"package:{source['id']}", adapter=adapter, task=task)
    raise UsageError(
        f"the manifest keeps no local paths: where is the source model {source['id']!r}?", hint="give --reference MODEL"
    )


def _check_same(checkpoint: Checkpoint, record: Mapping[str, Any]) -> None:
    """Refuse a reference whose files are not those that the artifact was made from."""
    expected = {item["name"]: item["sha256"] for item in record["source"]["files"]}
    found = {item.name: item.sha256 for item in checkpoint.files()}
    different = sorted(name for name in expected if found.get(name) != expected[name])
    if different:
        raise CompressError(
            f"this is not the model that the artifact was made from: {different[0]} differs",
            where=checkpoint.reference,
            hint="give the source model with --reference",
        )
