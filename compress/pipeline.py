"""The whole story on one screen: source -> plan -> graph and weights -> package -> validate -> gate -> report.

Every stage takes what the one before it made; none of them holds the model.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from compress import building, catalog, checks, pooling, pruning, resources, rotation, temporary, weights, workspace
from compress.building import Built
from compress.contracts import Checkpoint, Decoder, Encoder, ForwardFamily, Structure
from compress.errors import EXIT_OK, SourceError, UsageError
from compress.families import load_family
from compress.kept import Kept
from compress.package import load_target, manifest, sbom, staging
from compress.package.target import Package, Wish
from compress.package.writer import require_space
from compress.planning import Plan, make_plan
from compress.profile import Profile
from compress.progress import Stages
from compress.quantize import load_quantizer
from compress.report import tensors
from compress.report.environment import created
from compress.source import OpenCheckpoint, open_checkpoint, require_tokenizer
from compress.source.files import MAX_CONFIG_BYTES, read_json_object
from compress.source.sentence_transformers import Pooling
from compress.stored_errors import StoredErrors
from compress.tasks import load_task
from compress.validation import text
from compress.validation.encoder_run import check_length
from compress.validation.protocol import CheckpointSpec
from compress.validation.static_decoding import DECODE_NAME

if TYPE_CHECKING:
    from compress.calibrate.decoder import DecoderCalibration
    from compress.calibrate.encoder import Calibrated
    from compress.graph.finished import FinishedGraph
    from compress.progress import Meter
    from compress.pruning import PrunedSource
    from compress.report.calibrated import Calibrated as DecoderCalibrated
    from compress.report.model import Allocation
    from compress.workspace import Workspace

#: Runs the source model on texts, given where temporary files may go and a meter.
Calibration = Callable[[Path, "Meter"], "Calibrated"]
#: Makes integers of a finished graph's activations, given the graph, its directory and a meter.
Activations = Callable[["FinishedGraph", Path, "Meter"], object]
GRAPH_NAME, DATA_NAME = "model.onnx", building.DATA_NAME
#: What is read of a calibration text at least, however little is validated.
_CALIBRATION_TOKENS = 8192


@dataclass(frozen=True)
class ModelReference:
    """What the user named: a short name, hub id, directory, package or GGUF file, with an adapter and a revision."""

    reference: str
    adapter: Path | None = None
    revision: str | None = None
    task: str | None = None

    @property
    def wanted_task(self) -> str | None:
        """Return the task asked for, else the one a short name of the catalog stands for, else ``None``."""
        if self.task is not None or Path(self.reference).exists():
            return self.task
        entry = catalog.resolve(self.reference)
        return None if entry is None else load_task(entry.task).name

    @property
    def resolved(self) -> str:
        """Return the reference itself, or what a short name of the catalog stands for."""
        if Path(self.reference).exists():
            return self.reference
        entry = catalog.resolve(self.reference)
        if entry is not None:
            return entry.reference
        if "/" not in self.reference and ":" not in self.reference:
            raise UsageError(f"no model is called {self.reference!r}", hint=catalog.suggest(self.reference))
        return self.reference

    def as_request(self) -> dict[str, Any]:
        """Return it as workers take it."""
        return CheckpointSpec(self.resolved, self.adapter, self.revision, self.wanted_task).as_request()

    def open(self, *, config_only: bool = False) -> OpenCheckpoint:
        """Open it; see :func:`compress.source.open_checkpoint`."""
        return open_checkpoint(
            self.resolved,
            adapter=self.adapter,
            revision=self.revision,
            config_only=config_only,
            task=self.wanted_task,
        )


def default_output(model: str, suffix: str) -> Path:
    """Return where what is made of a model goes when nobody says: ``artifacts/NAME-SUFFIX``."""
    name = Path(model.rstrip("/")).name.removesuffix(".gguf")
    safe = "".join(letter if letter.isalnum() or letter in "-._" else "-" for letter in name).strip("-.")
    return Path("artifacts") / f"{safe or 'model'}-{suffix}"


@dataclass(frozen=True)
class ExportOptions:
    """How to run an export; ``threads`` never changes the bytes, ``max_memory`` is in bytes.

    ``fresh`` starts over where an earlier run of the same command left finished work.
    """

    calibration_text: Path | None = None
    eval_text: Path | None = None
    eval_labels: Path | None = None
    max_memory: int | None = None
    seed: int = 0
    validate: bool = True
    fresh: bool = False
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)


@dataclass(frozen=True)
class ExportResult:
    """What an export left behind; ``report`` is ``None`` when nothing was validated."""

    output: Path
    manifest: Mapping[str, Any]
    report: Mapping[str, Any] | None
    exit_code: int


def describe(checkpoint: Checkpoint) -> Structure:
    """Read the model's structure through its family."""
    return load_family(checkpoint.config).describe(checkpoint.config, checkpoint.tensors())


def export(
    model: ModelReference, profile: Profile, output: Path, options: ExportOptions, stages: Stages
) -> ExportResult:
    """Export a model: the artifact appears at ``output`` whole, or not at all.

    What a run that was killed had finished is used (:mod:`compress.workspace`).

    Raises:
        CompressError: Anything that went wrong; see :func:`compress.workspace.opened` for what is left behind then.
    """
    workspace.check(output)
    _targets(profile)
    if options.validate:
        checks.check_provider(profile)
        created()  # a date that makes no sense is told before the work
    if options.validate and options.eval_text is not None:
        text.from_file(options.eval_text, profile.validation.tokens)  # what cannot be read is found out before work
    if options.calibration_text is not None:
        text.from_file(options.calibration_text, profile.validation.tokens)
    with (
        model.open() as checkpoint,
        workspace.opened(output, building.basis(model, checkpoint, profile, options), fresh=options.fresh) as space,
    ):
        if space.done is not None:
            return _published(output, space.done, options)
        building.check_source(space, checkpoint)
        if not profile.prune.wanted:
            return _export(model, checkpoint, profile, space, options, stages)
        made = pruning.pruned(model, checkpoint, profile, space, options, stages)
        with made.model.open() as smaller:
            return _export(made.model, smaller, profile, space, options, stages, made)


def _published(output: Path, told: Mapping[str, Any], options: ExportOptions) -> ExportResult:
    """Return what a run left that was killed when all was done.

    Raises:
        UsageError: It was asked for another proof: the output is there already.
    """
    from compress.report import json as report_json

    if told["proof"] != building.proof_basis(options):
        staging.check_output(output)
    path = output / report_json.NAME
    report = report_json.read(path).model_dump(mode="json") if path.is_file() else None
    return ExportResult(output, manifest.read_manifest(output), report, int(told["code"]))


def _export(
    model: ModelReference,
    checkpoint: OpenCheckpoint,
    profile: Profile,
    space: Workspace,
    options: ExportOptions,
    stages: Stages,
    made: PrunedSource | None = None,
) -> ExportResult:
    """Export a model as it is; ``made`` says what it was pruned from."""
    directory, kept = space.directory, space.kept
    origin = checkpoint if made is None else made.origin
    adapter = model.adapter if made is None else made.reference.adapter
    with stages.stage("plan"):
        require_tokenizer(checkpoint)
        view, structure = rotation.applied(checkpoint, describe(checkpoint), profile)
        task = structure.task if isinstance(structure, Encoder) else "text-generation"
        checks.check_labels(structure, checkpoint.config, options)
        checks.check_tokenizer(checkpoint)
        if options.validate and isinstance(structure, Encoder):
            check_length(structure.context_length, profile.validation.max_length)
        pool = pooling.resolve(structure, profile, checkpoint)
        plan = make_plan(structure, profile, view)
        checks.check_plan(plan, profile)
        checks.check_calibration(plan, profile, options)
        wish = Wish(view, plan, profile)
        targets = _targets(profile, structure)
        for target in targets:
            target.check(wish)  # what is damaged is found out now, not after the weights
        _require(wish, targets, space, options)
    digests = building.digests(origin, kept)
    calibration = _calibration(model, view, plan, profile, options)
    decoding = _decoding(model, view, plan, profile, options, directory, kept)
    if decoding is not None:
        plan = calibrate_decoder(decoding, plan, stages)
        _require(Wish(view, plan, profile), targets, space, options)
    built = build(
        view,
        plan,
        profile,
        directory,
        options.threads,
        stages,
        seed=options.seed,
        pool=pool,
        calibration=calibration,
        decoding=decoding,
        activations=_activations(view, structure, profile, options),
        kept=kept,
    )
    record = manifest.build_manifest(
        origin,
        profile,
        seed=options.seed,
        files=digests.result(),
        adapter={"directory": adapter.name} if adapter else None,
    )
    building.require_unchanged(origin, kept)
    record |= {"task": task, "fusions": dict(built.fired), "targets": [target.TARGET for target in targets]}
    record["tensors"] = [item.model_dump(mode="json") for item in built.tensors]
    if made is not None:
        record["pruning"] = dict(made.record)
        pruning.copy_kept_ids(made, directory)
    if built.calibration is not None:
        record["calibration"] = dict(built.calibration)
    proved = _calibrated(decoding)
    if proved is not None and proved.allocation is not None:
        record["allocation"] = proved.allocation.model_dump(mode="json")
    with stages.stage("sbom"):
        billed = sbom.write_sbom(directory, record)
    from compress.report import pages

    report, status, code = None, "built", EXIT_OK
    if options.validate:
        from compress import chain, proof

        report = proof.prove(
            model if made is None else made.reference,
            origin,
            plan,
            profile,
            directory,
            options,
            stages,
            fusions=built.fired,
            tensors=built.tensors,
            calibration=proved,
            smaller=None if made is None else chain.Smaller(checkpoint, made.record),
        )
        status = "accepted" if report["verdict"]["status"] == "pass" else "rejected"
        code = proof.exit_code(report)
    elif proved is not None:
        proved.draw(directory)
    pages.write(directory, record, origin, report)
    record = manifest.write_manifest(directory, record, status=status, known=billed)
    space.finish({"code": code, "proof": building.proof_basis(options)})
    from compress import forecast

    # Said at the end, where it is read, and in no file but the report's: what one machine knows is not the artifact's.
    forecast.warn_of_export(plan, describe(origin), profile, options.threads, report)
    return ExportResult(space.output, record, report, code)


def _require(wish: Wish, targets: list[ModuleType], space: Workspace, options: ExportOptions) -> None:
    """Refuse before work starts what memory or the disk cannot hold, the targets' share included.

    Raises:
        ResourceError: What is needed, and what there is.
    """
    needs = [target.needs(wish) for target in targets]
    resources.check(wish.plan, wish.profile, options, max((need.memory for need in needs), default=0))
    if options.validate and wish.profile.prune.wanted and isinstance(wish.plan.structure, Decoder):
        resources.check_chain(wish, options)
    data = space.directory / DATA_NAME
    claimed = data.stat().st_size if data.is_file() else 0  # an earlier run's
    require_space(space.output, wish.plan.predicted_bytes + sum(need.disk for need in needs) - claimed)


@dataclass(frozen=True)
class Planned:
    """What an export would do; ``allocation`` is how bits were chosen, where they were."""

    checkpoint: Checkpoint
    plan: Plan
    allocation: Allocation | None = None


@contextmanager
def planned(model: ModelReference, profile: Profile, options: ExportOptions, stages: Stages) -> Iterator[Planned]:
    """Yield the plan of an export. Where bits are chosen, the weights are measured; else the config is enough.

    Raises:
        UsageError: What is asked for cannot be, or bits are chosen for a model of which only the config is there.
        BudgetError: No assignment keeps the budget.
    """
    with model.open(config_only=True) as checkpoint:
        seen, structure = rotation.applied(checkpoint, left_by_pruning(checkpoint, profile), profile)
        plan = make_plan(structure, profile, seen)
        checks.check_plan(plan, profile)
        if profile.quantize.allocation != "budget":
            checks.check_unread(options)
            yield Planned(checkpoint, plan)
            return
        if profile.prune.wanted:
            raise UsageError(
                "bits are chosen by the weights that pruning leaves, which a plan does not make",
                where=f"profile {profile.name}",
                hint="compress prune MODEL -o DIR first, then plan DIR without prune.*",
            )
    with _whole(model) as checkpoint, temporary.directory("compress-plan-") as work:
        require_tokenizer(checkpoint)
        checks.check_calibration(plan, profile, options)
        decoding = _decoding(model, checkpoint, plan, profile, options, Path(work))
        assert decoding is not None, "a profile that allocates calibrates"
        plan = calibrate_decoder(decoding, plan, stages)
        proved = _calibrated(decoding)
        assert proved is not None
        yield Planned(checkpoint, plan, proved.allocation)


def left_by_pruning(checkpoint: Checkpoint, profile: Profile) -> Structure:
    """Return what pruning leaves, by the config alone; the source's of a search or a trimmed vocabulary."""
    structure = describe(checkpoint)
    if not any(profile.prune.amounts):
        return structure
    from compress.prune import run

    _, sizes = run.prunable(checkpoint)
    amounts = run.check(checkpoint, profile)
    result = {"layers": list(range(amounts.layers)), "dtype": "F32"}
    config = run.pruned_config(checkpoint.config, sizes, structure, amounts, result)
    return load_family(config).describe(config, {})


def _whole(model: ModelReference) -> OpenCheckpoint:
    try:
        return model.open()
    except SourceError as error:
        raise UsageError(
            f"bits are chosen by measuring the weights, but {error.what}",
            where=error.where,
            hint="give the whole model, or --set quantize.allocation=roles",
        ) from None


def build(
    checkpoint: Checkpoint,
    plan: Plan,
    profile: Profile,
    directory: Path,
    threads: int,
    stages: Stages,
    *,
    seed: int = 0,
    pool: Pooling | None = None,
    calibration: Calibration | None = None,
    decoding: DecoderCalibration | None = None,
    activations: Activations | None = None,
    kept: Kept | None = None,
) -> Built:
    """Build graph, weights and package files into an existing directory; no validation, no manifest.

    ``calibration`` runs the source model on texts and returns a plan that knows what they showed; it may be ``None``
    where the profile asks for none. ``decoding`` is the calibration of a model that writes text, its text read.
    ``activations`` makes integers of what is between the graph's nodes. ``kept`` is what an earlier run finished, and
    takes what this one does.
    """
    known = building.built(kept, directory)
    if known is not None:
        return known
    # Imported here: the graph library is not needed to plan, list or explain.
    from compress.calibrate.encoder import STATISTICS_NAME
    from compress.calibrate.encoder import moments as encoder_moments
    from compress.graph.build import build_graph
    from compress.graph.finished import serialize
    from compress.graph.skeleton import build_skeleton

    skeleton = directory / ".skeleton.onnx"
    smoothing, moments, record = None, None, None
    errors = StoredErrors()
    # The skeleton's worker only needs the config, the weights only their places: one core can do each.
    with ThreadPoolExecutor(1) as background:
        built = background.submit(
            temporary.carried(build_skeleton), checkpoint.directory, skeleton, _encoder_task(plan)
        )
        if calibration is not None:
            with stages.stage("calibrate") as meter:
                found = calibration(directory, meter)
                plan, smoothing, record = found.plan, found.smoothing, found.record
                moments = partial(encoder_moments, found)
        with building.claimed(directory / DATA_NAME, plan, kept) as data:
            finished = building.Weights(kept, errors)
            written = None
            if decoding is not None:
                with stages.stage("calibrate") as meter:
                    written = decoding.quantize(directory / DATA_NAME, _fraction(meter))
                record = decoding.record
            with stages.stage("weights", unit="weights") as meter:
                inline = weights.write_weights(
                    plan,
                    checkpoint,
                    load_quantizer(profile.quantize.quantizer),
                    data,
                    calibrate=None if written is not None else _importance(checkpoint, plan, profile, seed),
                    threads=threads,
                    progress=meter,
                    beside=(built,),
                    smoothing=smoothing,
                    moments=moments,
                    done={*finished.names, *(() if written is None else written.names)},
                    errors=errors,
                    finished=finished.add,
                )
                inline |= finished.inline | ({} if written is None else dict(written.inline))
                (directory / STATISTICS_NAME).unlink(missing_ok=True)
            with stages.stage("graph"):
                built.result()
                graph = build_graph(skeleton, plan, profile, inline, data_name=DATA_NAME, pool=pool)
                for name, array in graph.constants.items():
                    place = plan.by_name[name].stored[0].offset
                    if place is not None:
                        data.write(place, array)
                skeleton.unlink()
            if activations is not None:
                with stages.stage("ranges") as meter:
                    activations(graph, directory, meter)
    with stages.stage("package"):
        serialize(graph.model, directory / GRAPH_NAME)
        if graph.decode is not None:
            serialize(graph.decode, directory / DECODE_NAME)
        _copy_files(checkpoint, directory)
        inputs = tuple(value.name or "" for value in graph.model.graph.inputs)
        package = Package(checkpoint, plan, profile, directory, inputs)
        for target in _targets(profile, plan.structure):
            target.write(package)
    measured = errors.relative() | ({} if written is None else dict(written.stored_errors))
    made = Built(graph.fired, record, tensors.of_plan(plan, measured))
    building.keep_built(kept, directory, made)
    return made


def calibrate_decoder(calibration: DecoderCalibration, plan: Plan, stages: Stages) -> Plan:
    """Read the calibration text, and choose bits under the budget where the profile asks for it.

    Returns:
        The plan, with the assignment.

    Raises:
        UsageError: There is too little text.
        BudgetError: No assignment keeps the budget.
    """
    with stages.stage("text") as meter:
        calibration.read(plan.decoder, _fraction(meter))
    with stages.stage("sensitivity") as meter:
        return calibration.measure(plan, _fraction(meter))


def _calibrated(decoding: DecoderCalibration | None) -> DecoderCalibrated | None:
    """Return what reports say of a decoder's calibration."""
    if decoding is None:
        return None
    from compress.report.calibrated import of_export

    return of_export(decoding)


def _encoder_task(plan: Plan) -> str:
    return plan.structure.task if isinstance(plan.structure, Encoder) else ""


def _copy_files(checkpoint: Checkpoint, directory: Path) -> None:
    """Take over the model's side files and its config, whose architecture is the one that was exported."""
    for name, path in checkpoint.sidecars().items():
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, directory / name)
    config = read_json_object(checkpoint.directory / "config.json", MAX_CONFIG_BYTES)
    if config.get("architectures") == checkpoint.config.get("architectures"):
        shutil.copyfile(checkpoint.directory / "config.json", directory / "config.json")
    else:
        config["architectures"] = checkpoint.config["architectures"]
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _calibration(
    model: ModelReference, checkpoint: Checkpoint, plan: Plan, profile: Profile, options: ExportOptions
) -> Calibration | None:
    """Return what runs the source model on calibration texts, ``None`` where the profile or the plan needs none."""
    from compress.calibrate import encoder

    if not encoder.wanted(plan, profile):
        return None
    content = _calibration_text(profile, options)

    def run(work: Path, meter: Meter) -> encoder.Calibrated:
        return encoder.calibrate(
            plan,
            checkpoint,
            profile,
            source=model.as_request(),
            content=content,
            work=work,
            seed=options.seed,
            memory_cap=options.max_memory,
            progress=lambda fraction: meter(fraction, 1.0),
        )

    return run


def _activations(
    checkpoint: Checkpoint, structure: Structure, profile: Profile, options: ExportOptions
) -> Activations | None:
    """Return what makes integers of a graph's activations, ``None`` where the profile leaves them in floats."""
    bits = profile.quantize.activation_bits
    if bits is None:
        return None
    from compress.calibrate import decoder_ranges, encoder_ranges

    content = _calibration_text(profile, options)

    def run(graph: FinishedGraph, directory: Path, meter: Meter) -> int:
        shared: dict[str, Any] = {"bits": bits, "directory": directory, "progress": _fraction(meter)}
        if isinstance(structure, Encoder):
            return encoder_ranges.quantize(graph.model, structure, checkpoint, content, seed=options.seed, **shared)
        assert graph.decode is not None and graph.whole is not None, "activation_bits goes with static_length"
        assert isinstance(structure, Decoder)
        graphs = (graph.model, graph.decode)
        return decoder_ranges.quantize(graphs, graph.whole, structure, checkpoint, content, **shared)

    return run


def _calibration_text(profile: Profile, options: ExportOptions) -> text.Text:
    if options.calibration_text is None:
        return text.embedded("calibration")
    return text.from_file(options.calibration_text, max(_CALIBRATION_TOKENS, profile.validation.tokens))


def _decoding(
    model: ModelReference,
    checkpoint: Checkpoint,
    plan: Plan,
    profile: Profile,
    options: ExportOptions,
    work: Path,
    kept: Kept | None = None,
) -> DecoderCalibration | None:
    """Return the calibration of a model that writes text, ``None`` where the profile or the plan needs none."""
    from compress.calibrate import decoder

    if not decoder.wanted(plan, profile):
        return None
    return decoder.DecoderCalibration(
        source=model.as_request(),
        checkpoint=checkpoint,
        profile=profile,
        work=work,
        text_file=options.calibration_text,
        seed=options.seed,
        memory_cap=options.max_memory,
        threads=options.threads,
        kept=kept,
    )


def _fraction(meter: Meter) -> Callable[[float], None]:
    """Return what tells a stage's meter the fraction that is done."""
    return lambda fraction: meter(fraction, 1.0)


def _importance(
    checkpoint: Checkpoint, plan: Plan, profile: Profile, seed: int
) -> Callable[[threading.Event], weights.Calibration] | None:
    """Return what makes the source of importance, ``None`` where the profile or the plan needs none."""
    if profile.quantize.importance == "none" or all(fate.scheme is None for fate in plan.fates):
        return None
    family = load_family(checkpoint.config)
    if not isinstance(family, ForwardFamily):
        return None
    from compress.calibrate.random_tokens import RandomTokens

    return partial(RandomTokens, plan, checkpoint, family, seed)


def _targets(profile: Profile, structure: Structure | None = None) -> list[ModuleType]:
    """Return a profile's targets, only those that take the model where its structure is given."""
    found = [load_target(name, where=f"profile {profile.name}") for name in profile.targets]
    return [target for target in found if structure is None or target.applies(structure)]
