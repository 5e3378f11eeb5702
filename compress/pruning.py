"""The pipeline's first stage: a source becomes a pruned checkpoint, and remembers what it is compared with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import building, temporary, workspace
from compress.contracts import Checkpoint
from compress.errors import ResourceError
from compress.package import staging
from compress.sizes import format_size
from compress.source import require_tokenizer

if TYPE_CHECKING:
    from compress.pipeline import ExportOptions, ModelReference
    from compress.profile import Profile
    from compress.progress import Stages
    from compress.prune.amounts import Amounts
    from compress.prune.distill import Distilled
    from compress.workspace import Workspace

#: What the workspace keeps: the pruned checkpoint, and how far its distillation is.
_PRUNED, _DISTILLATION = "pruned", "distillation"


@dataclass(frozen=True)
class PrunedSource:
    """A pruned checkpoint on its way into an artifact.

    Attributes:
        model: Its directory. reference: What it is compared with: the source, with the trimmed vocabulary where that
        was asked for (the source's
            logits on the tokens that are left are the same).
        origin: The source itself, open.
        record: What ``pruning.json`` says.
    """

    model: ModelReference
    reference: ModelReference
    origin: Checkpoint
    record: Mapping[str, Any]


def prune_to(
    model: ModelReference, profile: Profile, output: Path, options: ExportOptions, stages: Stages
) -> Mapping[str, Any]:
    """Write a pruned checkpoint to ``output``, whole or not at all; return what was done.

    Raises:
        CompressError: Anything that went wrong; nothing is left behind then.
    """
    workspace.check(output)
    with model.open() as checkpoint:
        amounts = _checked(checkpoint, profile, options)
        basis = {"to": "prune", **building.basis(model, checkpoint, profile, options)}
        with (
            workspace.opened(output, basis, fresh=options.fresh) as space,
            temporary.directory("trimmed-") as place,
        ):
            if space.done is not None:
                return dict(space.done)
            building.check_source(space, checkpoint)
            building.clear(space.directory, set())
            done = _write(
                model,
                checkpoint,
                profile,
                amounts,
                space.directory,
                options,
                stages,
                trimmed=Path(place) / "model",
                state=space.kept.file(_DISTILLATION),
            )
            building.require_unchanged(checkpoint, space.kept)
            space.finish(dict(done.record))
            return done.record


def pruned(
    model: ModelReference,
    checkpoint: Checkpoint,
    profile: Profile,
    space: Workspace,
    options: ExportOptions,
    stages: Stages,
) -> PrunedSource:
    """Return a pruned checkpoint that lies in the workspace of an export, an earlier run's if that finished it.

    Raises:
        CompressError: Anything that went wrong.
    """
    kept = space.kept
    directory, trimmed = kept.file(_PRUNED), kept.file("trimmed")
    known = kept.value(_PRUNED)
    if known is not None:
        smaller = replace(model, reference=str(directory), adapter=None, revision=None, task=model.wanted_task)
        reference = replace(smaller, reference=str(trimmed)) if trimmed.is_dir() else model
        return PrunedSource(smaller, reference, checkpoint, known)
    amounts = _checked(checkpoint, profile, options)
    for place in (directory, trimmed):
        shutil.rmtree(place, ignore_errors=True)
    directory.mkdir()
    state = kept.file(_DISTILLATION)
    done = _write(model, checkpoint, profile, amounts, directory, options, stages, trimmed=trimmed, state=state)
    for path in (*directory.rglob("*"), *(trimmed.rglob("*") if trimmed.is_dir() else ())):
        staging.sync(path)
    kept.keep(_PRUNED, dict(done.record))
    return done


def copy_kept_ids(made: PrunedSource, directory: Path) -> None:
    """Put the list of kept tokens into an artifact, where its vocabulary was trimmed: to be validated again by it."""
    from compress.prune.run import KEPT_IDS_NAME

    kept = Path(made.model.reference) / KEPT_IDS_NAME
    if kept.is_file():
        shutil.copyfile(kept, directory / KEPT_IDS_NAME)


@contextmanager
def with_kept_tokens(
    model: ModelReference, checkpoint: Checkpoint, artifact: Path, options: ExportOptions
) -> Iterator[ModelReference]:
    """Yield the source with the tokens that an artifact kept: what it is compared with.

    Raises:
        CompressError: The artifact's list of tokens is damaged, or another model's.
    """
    from compress.prune import run

    with temporary.directory("kept-tokens-") as place:
        how = run.PruneOptions(None, options.seed, options.max_memory, options.threads)
        run.trim_as_before(checkpoint, model.as_request(), artifact / run.KEPT_IDS_NAME, Path(place), how)
        yield replace(model, reference=place, adapter=None, revision=None, task=model.wanted_task)


def _checked(checkpoint: Checkpoint, profile: Profile, options: ExportOptions) -> Amounts:
    """Refuse what cannot be, before work starts; return the sizes that are asked for (a search begins with all)."""
    from compress.prune.estimate import prune_bytes
    from compress.prune.run import check, prunable, reads_text

    require_tokenizer(checkpoint)
    amounts = check(checkpoint, profile)
    structure, _ = prunable(checkpoint)
    from compress.prune.amounts import full

    text = reads_text(profile, full(structure), amounts)
    needed = prune_bytes(structure, profile, amounts, text=text)
    if options.max_memory is not None and needed > options.max_memory:
        raise ResourceError(
            f"pruning would take {format_size(needed)}, more than --max-memory {format_size(options.max_memory)}",
            hint=f"raise --max-memory to {format_size(needed)}, or lower prune.tokens",
        )
    return amounts


def _write(
    model: ModelReference,
    checkpoint: Checkpoint,
    profile: Profile,
    amounts: Amounts,
    directory: Path,
    options: ExportOptions,
    stages: Stages,
    *,
    trimmed: Path,
    state: Path,
) -> PrunedSource:
    """Trim the vocabulary, remove parts, and distill, as far as each is asked for, into an existing, empty directory.

    The source with the trimmed vocabulary goes to ``trimmed``; distillation keeps in ``state`` how far it is.
    """
    from compress.prune import run
    from compress.prune.find import find

    how = run.PruneOptions(options.calibration_text, options.seed, options.max_memory, options.threads)
    reference, opened, vocabulary, searched = model, checkpoint, None, None
    with ExitStack() as stack:
        if profile.prune.vocabulary != "all":
            trimmed.mkdir()
            with stages.stage("vocabulary"):
                vocabulary = run.trim(checkpoint, model.as_request(), profile, trimmed, how)
            reference = replace(model, reference=str(trimmed), adapter=None, revision=None, task=model.wanted_task)
            opened = stack.enter_context(reference.open())
        if profile.prune.searches:
            with (
                stages.stage("search") as meter,
                temporary.directory("search-") as work,
            ):
                structure, sizes = run.prunable(opened)
                found_sizes = find(
                    opened,
                    reference.as_request(),
                    structure,
                    sizes,
                    profile,
                    how,
                    Path(work),
                    lambda part: meter(part, 1.0),
                )
                amounts, searched = found_sizes.amounts, found_sizes.record
        with stages.stage("prune") as meter:
            done = run.prune(
                opened, reference.as_request(), profile, amounts, directory, how, lambda part: meter(part, 1.0)
            )
        record = dict(done.record)
        if searched is not None:
            record["search"] = dict(searched)
        if vocabulary is not None:
            shutil.copyfile(trimmed / run.KEPT_IDS_NAME, directory / run.KEPT_IDS_NAME)
            record["vocabulary"] = dict(vocabulary)
        if profile.prune.recover == "distill":
            with stages.stage("distill") as meter:
                found = run.recover(
                    reference.as_request(),
                    opened,
                    profile,
                    directory,
                    how,
                    tuple(done.record["zeros"]),
                    state,
                    lambda part: meter(part, 1.0),
                )
            record["distillation"] = _summary(found)
        record["source"] = {"id": checkpoint.identifier, "kind": checkpoint.kind, "revision": checkpoint.revision}
        staging.write_file(directory / run.RECORD_NAME, json.dumps(record, indent=2, sort_keys=True) + "\n")
    smaller = replace(model, reference=str(directory), adapter=None, revision=None, task=model.wanted_task)
    return PrunedSource(smaller, reference, checkpoint, record)


def _summary(found: Distilled) -> dict[str, Any]:
    return {
        "steps": found.steps,
        "stopped": found.stopped,
        "before": float(f"{found.before:.5g}"),
        "after": float(f"{found.after:.5g}"),
        "history": [[step, float(f"{loss:.5g}")] for step, loss in found.history],
    }
