"""The pipeline's first stage: a source becomes a pruned checkpoint, and remembers what it is compared with."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.contracts import Checkpoint
from compress.errors import ResourceError
from compress.package import staging
from compress.prune.run import PruneOptions
from compress.sizes import format_size
from compress.source import require_tokenizer

if TYPE_CHECKING:
    from compress.pipeline import ExportOptions, ModelReference
    from compress.profile import Profile
    from compress.progress import Stages
    from compress.prune.amounts import Amounts


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
    staging.check_output(output)
    with model.open() as checkpoint:
        amounts = _checked(checkpoint, profile, options)
        with staging.staged(output) as directory:
            return _write(model, checkpoint, profile, amounts, directory, options, stages).record


@contextmanager
def pruned(
    model: ModelReference,
    checkpoint: Checkpoint,
    profile: Profile,
    output: Path,
    options: ExportOptions,
    stages: Stages,
) -> Iterator[PrunedSource]:
    """Yield a pruned checkpoint that lies beside ``output`` for as long as it is needed.

    Raises:
        CompressError: Anything that went wrong.
    """
    amounts = _checked(checkpoint, profile, options)
    parent = output.absolute().parent
    made = not parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f".{output.name}.pruned-", dir=parent))
    try:
        directory = place / "model"
        directory.mkdir()
        yield _write(model, checkpoint, profile, amounts, directory, options, stages)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if made and not any(parent.iterdir()):
            parent.rmdir()


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
            hint=f"raise --max-memory to {format_size(needed)}, or lower calibration.tokens",
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
) -> PrunedSource:
    """Prune into an existing, empty directory."""
    from compress.prune.run import prune

    how = PruneOptions(options.calibration_text, options.seed, options.max_memory, options.threads)
    with stages.stage("prune") as meter:
        done = prune(
            checkpoint,
            model.as_request(),
            profile,
            amounts,
            directory,
            how,
            lambda fraction: meter(fraction, 1.0),
        )
    smaller = replace(model, reference=str(directory), adapter=None, revision=None, task=model.wanted_task)
    return PrunedSource(smaller, model, checkpoint, done.record)
