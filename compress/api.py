"""The command line's commands as Python functions: the same work, typed results instead of text and exit codes.

Everything here is reached as ``compress.NAME``. ``import compress`` alone imports none of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import api_arguments as arguments
from compress import pipeline
from compress.api_arguments import AnyPath
from compress.api_artifact import bench as bench
from compress.api_artifact import generate as generate
from compress.api_artifact import inspect as inspect
from compress.api_artifact import load_report as load_report
from compress.api_artifact import validate as validate
from compress.api_sweep import sweep as sweep
from compress.catalog import CatalogEntry
from compress.plan_document import PlanDocument, PredictedSpeed
from compress.profile import Profile, available_profiles, load_profile
from compress.progress import Stages
from compress.report.model import Report, Verdict


@dataclass(frozen=True)
class ExportResult:
    """What an export left behind.

    Attributes:
        output: The artifact's directory.
        manifest: What its ``manifest.json`` says.
        report: What its ``report.json`` says; ``None`` where nothing was validated.
        exit_code: What ``compress export`` would have ended with: 0 within the budget or not validated, 3 outside it,
            4 a provider failed or left nodes to another.
    """

    output: Path
    manifest: Mapping[str, Any]
    report: Report | None
    exit_code: int

    @property
    def status(self) -> str:
        """``accepted`` or ``rejected`` by the budget, or ``built`` where nothing was validated."""
        return str(self.manifest["status"])

    @property
    def verdict(self) -> Verdict | None:
        """The verdict with its reasons; ``None`` where nothing was validated."""
        return None if self.report is None else self.report.verdict

    @property
    def passed(self) -> bool:
        """Whether the artifact was validated and keeps its budget; ``False`` where nothing was validated."""
        return self.report is not None and self.report.passed


@dataclass(frozen=True)
class PruneResult:
    """A pruned checkpoint that transformers loads.

    Attributes:
        output: Its directory.
        record: What its ``pruning.json`` says: sizes before and after, how, and how well what stayed could be fitted.
    """

    output: Path
    record: Mapping[str, Any]


def export(
    model: AnyPath,
    profile: AnyPath | Profile,
    output: AnyPath | None = None,
    *,
    overrides: Iterable[str] = (),
    calibration_text: AnyPath | None = None,
    eval_text: AnyPath | None = None,
    eval_labels: AnyPath | None = None,
    max_memory: int | str | None = None,
    seed: int = 0,
    validate: bool = True,
    fresh: bool = False,
    threads: int | None = None,
    adapter: AnyPath | None = None,
    revision: str | None = None,
    task: str | None = None,
    progress: bool = False,
) -> ExportResult:
    """Export a model under a profile, measure it, and leave a deployable artifact: ``compress export``.

    An artifact outside its budget is a result, not an exception: look at ``passed``.

    Args:
        model: A short name, a hub id, a local directory, ``package:NAME/PATH`` or a ``.gguf`` file.
        profile: A profile's name, the path of a ``.toml`` file, or a :class:`~compress.profile.Profile`.
        output: Where the artifact goes; by default ``artifacts/MODEL-PROFILE``. It must not exist, or be empty.
        overrides: Keys of the profile to change, each ``"KEY=VALUE"``.
        calibration_text: UTF-8 text of your domain that a calibrating profile runs the model on; by default built in.
        eval_text: UTF-8 text to measure drift on; by default built in, disjoint from the calibration text.
        eval_labels: Labelled examples, one JSON object a line: the task's accuracy before and after (encoders).
        max_memory: Refuse to start if a stage would take more: bytes, or text with a unit (``"1GB"``). A decoder
            that does not fit whole is validated a block at a time, and speed and samples are not measured.
        seed: Seed of everything random.
        validate: Measure drift and speed against the source.
        fresh: Start over, also where an interrupted run of the same export left finished work.
        threads: Threads to use, by default all cores; never changes the artifact's bytes.
        adapter: A PEFT LoRA adapter's directory to merge.
        revision: Branch, tag or commit of a hub id.
        task: What the model shall do; by default what its architecture is for.
        progress: Show stages on standard error.

    Returns:
        Directory, manifest, report and verdict.

    Raises:
        UsageError: A name, key, value or combination that cannot be.
        BudgetError: Bits are chosen under a budget, and no choice keeps it; nothing was built.
        ResourceError: Memory or disk space would not be enough; nothing was started.
        ProviderError: The profile's provider does not work here.
        CompressError: Anything else that went wrong; nothing is left behind.

    Examples:
        >>> import compress
        >>> result = compress.export("tiny-llama", "arm-int4", "out/tiny-int4", validate=False)
        >>> result.status
        'built'
        >>> sorted(path.name for path in result.output.glob("model.onnx*"))
        ['model.onnx', 'model.onnx.data']

        A budget that is not kept does not raise (this one asks 4 bits to be as good as none):

        >>> changes = ["budget.max_kl=1e-6", "validation.tokens=64", "validation.window=32", "validation.baselines=[]"]
        >>> result = compress.export("tiny-llama", "arm-int4", "out/too-strict", overrides=changes)
        >>> result.passed, result.status, result.exit_code
        (False, 'rejected', 3)
    """
    recipe = arguments.recipe(profile, overrides)
    reference = arguments.reference(model, adapter, revision, task)
    place = pipeline.default_output(reference.reference, recipe.name) if output is None else Path(output)
    options = pipeline.ExportOptions(
        calibration_text=arguments.path(calibration_text),
        eval_text=arguments.path(eval_text),
        eval_labels=arguments.path(eval_labels),
        max_memory=arguments.size(max_memory),
        seed=seed,
        validate=validate,
        fresh=fresh,
        threads=arguments.thread_count(threads),
    )
    made = pipeline.export(reference, recipe, place, options, Stages(show=progress))
    report = None if made.report is None else Report.model_validate(made.report)
    return ExportResult(made.output, made.manifest, report, made.exit_code)


def plan(
    model: AnyPath,
    profile: AnyPath | Profile,
    *,
    overrides: Iterable[str] = (),
    calibration_text: AnyPath | None = None,
    seed: int = 0,
    threads: int | None = None,
    adapter: AnyPath | None = None,
    revision: str | None = None,
    task: str | None = None,
    speed: bool = False,
    progress: bool = False,
) -> PlanDocument:
    """Say what an export would do - sizes, memory, bits of every tensor - from the config alone: ``compress plan``.

    Where the profile chooses bits under a budget, every tensor's errors are measured on the calibration text, as an
    export would; that takes minutes. ``speed`` measures too, once: parts of the model, on this machine, for seconds.

    Args:
        model: As in :func:`export`.
        profile: As in :func:`export`.
        overrides: Keys of the profile to change, each ``"KEY=VALUE"``.
        calibration_text: Read only where bits are chosen under a budget.
        seed: Seed of everything random.
        threads: Threads that memory and speed are predicted for, by default all cores.
        adapter: A PEFT LoRA adapter's directory to merge.
        revision: Branch, tag or commit of a hub id.
        task: What the model shall do; by default what its architecture is for.
        speed: Predict how fast it would be on this machine, beside float32 ONNX; a profile for its processor only.
        progress: Show stages on standard error.

    Raises:
        UsageError: A name, key, value or combination that cannot be.
        BudgetError: No assignment of bits keeps the budget.
        CompressError: The model cannot be read, or has no implementation here.

    Examples:
        >>> import compress
        >>> plan = compress.plan("tiny-llama", "arm-int4")
        >>> plan.model_type, plan.task
        ('llama', 'text-generation')
        >>> plan.predicted_bytes < plan.source_bytes
        True
        >>> next(tensor.storage for tensor in plan.tensors if tensor.role == "down")
        'int4 b32 sym'
    """
    from compress.show import plan_document

    recipe = arguments.recipe(profile, overrides)
    options = pipeline.ExportOptions(
        calibration_text=arguments.path(calibration_text),
        seed=seed,
        validate=False,
        threads=arguments.thread_count(threads),
    )
    reference = arguments.reference(model, adapter, revision, task)
    if speed:
        from compress import forecast

        forecast.check(recipe)
    stages, predicted = Stages(show=progress), None
    with pipeline.planned(reference, recipe, options, stages) as found:
        if speed:
            predicted = _predicted_speed(found, recipe, options.threads, stages)
        document = plan_document(found.plan, recipe, found.checkpoint, options.threads, found.allocation, predicted)
    return PlanDocument.model_validate(document)


def _predicted_speed(found: pipeline.Planned, recipe: Profile, threads: int, stages: Stages) -> PredictedSpeed:
    """Predict, and say what would be slower than float32."""
    from compress import forecast

    source = pipeline.describe(found.checkpoint)
    with stages.stage("speed") as meter:
        predicted = forecast.predict(found.plan, source, recipe, threads, lambda part: meter(part, 1.0))
    forecast.warn(found.plan, recipe, predicted)
    return predicted


def prune_model(
    model: AnyPath,
    output: AnyPath | None = None,
    *,
    ffn: float | None = None,
    heads: float | None = None,
    kv_groups: float | None = None,
    layers: float | None = None,
    vocabulary: str | None = None,
    speedup: float | None = None,
    max_kl: float | None = None,
    algorithm: str | None = None,
    depth: str | None = None,
    recover: str | None = None,
    profile: AnyPath | Profile = "float",
    overrides: Iterable[str] = (),
    calibration_text: AnyPath | None = None,
    max_memory: int | str | None = None,
    seed: int = 0,
    fresh: bool = False,
    threads: int | None = None,
    adapter: AnyPath | None = None,
    revision: str | None = None,
    task: str | None = None,
    progress: bool = False,
) -> PruneResult:
    """Remove parts of a model, fit what stays, and leave a checkpoint that transformers loads: ``compress prune``.

    An amount below 1 is a share, from 1 on a number of parts. (``compress.prune`` is the package of the algorithms.)

    Args:
        model: As in :func:`export`.
        output: Where the checkpoint goes; by default ``artifacts/MODEL-pruned``.
        ffn: Feed-forward neurons to remove, of every block.
        heads: Query heads to remove, of every block.
        kv_groups: Key-value groups to remove with their heads, of every block.
        layers: Blocks to remove.
        vocabulary: ``"from-text"`` keeps the tokens that the calibration text uses, ``"all"`` all of them.
        speedup: Search the amounts that are so many times faster on this machine.
        max_kl: Search the amounts that lose so many nats a token at the most.
        algorithm: Chooses neurons and heads: ``surgeon``, ``activation``, ``magnitude``, ``random``.
        depth: Chooses blocks: ``block-influence``, ``angular-distance``.
        recover: What is done for what stays: ``none``, ``refit`` or ``distill``.
        profile: Whose keys ``prune`` and ``calibration`` count where nothing is said here.
        overrides: Keys of the profile to change, each ``"KEY=VALUE"``.
        calibration_text: UTF-8 text of your domain that the model is run on; by default built in.
        max_memory: Refuse to start if a stage would take more: bytes, or text with a unit.
        seed: Seed of everything random.
        fresh: Start over, also where an interrupted run of the same call left finished work.
        threads: Threads to use, by default all cores.
        adapter: A PEFT LoRA adapter's directory to merge.
        revision: Branch, tag or commit of a hub id.
        task: What the model shall do; by default what its architecture is for.
        progress: Show stages on standard error.

    Raises:
        UsageError: Amounts that the architecture does not allow, or nothing to remove.
        ResourceError: It would take more memory than ``max_memory``.
        CompressError: Anything else that went wrong; nothing is left behind.

    Examples:
        >>> import compress
        >>> done = compress.prune_model("tiny-llama", "out/smaller", layers=1, recover="none")
        >>> done.record["before"]["layers"], done.record["after"]["layers"]
        (3, 2)
    """
    from compress import pruning

    given = {
        "ffn": ffn,
        "heads": heads,
        "kv_groups": kv_groups,
        "layers": layers,
        "vocabulary": vocabulary,
        "speedup": speedup,
        "max_kl": max_kl,
        "algorithm": algorithm,
        "depth": depth,
        "recover": recover,
    }
    asked = [f"prune.{key}={value}" for key, value in given.items() if value is not None]
    recipe = arguments.recipe(profile, [*arguments.words(overrides), *asked])
    reference = arguments.reference(model, adapter, revision, task)
    place = pipeline.default_output(reference.reference, "pruned") if output is None else Path(output)
    options = pipeline.ExportOptions(
        calibration_text=arguments.path(calibration_text),
        max_memory=arguments.size(max_memory),
        seed=seed,
        fresh=fresh,
        threads=arguments.thread_count(threads),
    )
    return PruneResult(place, pruning.prune_to(reference, recipe, place, options, Stages(show=progress)))


def profiles() -> dict[str, Profile]:
    """Return the shipped profiles by name, in the order of their names: ``compress profiles``.

    Examples:
        >>> import compress
        >>> profile = compress.profiles()["arm-int4"]
        >>> profile.quantize.bits, profile.quantize.block_size, profile.budget.max_kl
        (4, 32, 0.4)
    """
    return {name: load_profile(name) for name in available_profiles()}


def models() -> dict[str, CatalogEntry]:
    """Return the models that have a short name, in the catalog's order: ``compress models``.

    Examples:
        >>> import compress
        >>> entry = compress.models()["smollm2"]
        >>> entry.model_type, entry.support
        ('llama', 'supported')
    """
    from compress import catalog

    return {entry.name: entry for entry in catalog.entries()}
