"""Pruning from the outside: what is asked for is checked, a worker writes the weights, the config says what is left.

Requires an open source; ensures a directory that transformers loads as it is, or nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from compress import pooling
from compress.contracts import KEPT_HEADS, Checkpoint, PrunableFamily, SizeKeys, Structure
from compress.errors import CompressError, UnsupportedModelError, UsageError
from compress.families import load_family
from compress.package.staging import write_file
from compress.package.writer import require_space
from compress.profile import Profile
from compress.prune import load_depth_pruner, load_pruner, load_sparsifier, texts, vocabulary
from compress.prune.amounts import Amounts, Asked, full, resolve
from compress.prune.distill import Distilled, distill
from compress.prune.distill_texts import TOKENS as LEARNT_TOKENS
from compress.prune.distill_texts import learning_texts
from compress.source.base import TOKENIZER_NAMES
from compress.source.files import MAX_CONFIG_BYTES, check_regular, read_json_object
from compress.source.local_directory import INDEX_NAME, WEIGHTS_NAME
from compress.validation.protocol import run_worker

TIMEOUT_SECONDS = 48 * 3600.0
RECORD_NAME = "pruning.json"
#: The ids of the source that a trimmed vocabulary kept, int64: the new id is the place.
KEPT_IDS_NAME = "kept_ids.npy"

MAX_KEPT_BYTES = 256 << 20

Progress = Callable[[float], None]


@dataclass(frozen=True)
class PruneOptions:
    """How to run: the user's text, a seed, a cap in bytes, threads (which change no byte)."""

    text_file: Path | None = None
    seed: int = 0
    max_memory: int | None = None
    threads: int = 1


@dataclass(frozen=True)
class PrunedModel:
    """What a run left: sizes before and after, and ``record``, which ``pruning.json`` has too."""

    before: Amounts
    after: Amounts
    record: Mapping[str, Any]
    peak_rss_bytes: int


def prunable(checkpoint: Checkpoint) -> tuple[Structure, SizeKeys]:
    """Return what can be pruned of a model.

    Raises:
        UnsupportedModelError: Its family does not say what its config calls the sizes.
    """
    family = load_family(checkpoint.config)
    if not isinstance(family, PrunableFamily):
        raise UnsupportedModelError(f"models of type {family.model_type!r} cannot be pruned")
    return family.describe(checkpoint.config, checkpoint.tensors()), family.sizes


def check(checkpoint: Checkpoint, profile: Profile) -> Amounts:
    """Return the sizes that are to be left; refuse what cannot be, before work starts.

    Raises:
        UsageError: An amount or an algorithm that does not exist, or nothing to do.
        UnsupportedModelError: The family cannot be pruned.
    """
    asked = profile.prune
    structure, sizes = prunable(checkpoint)
    load_pruner(asked.pruner)
    load_depth_pruner(asked.depth)
    load_sparsifier(asked.sparsifier)
    if asked.sparsity and (any(asked.amounts) or asked.searches):
        raise UsageError(
            "single weights are set to zero in a model whose parts stay",
            where="prune.sparsity",
            hint="remove parts first: compress prune MODEL -o DIR, then prune DIR by prune.sparsity",
        )
    blocks = {linear.layer for linear in structure.linears if linear.layer is not None}
    if asked.sparsity and len(blocks) < structure.layers:
        raise UsageError(
            f"{structure.model_type} runs one block several times; a share of its weights is not chosen for that",
            where="prune.sparsity",
            hint="prune its width: --set prune.ffn=0.2",
        )
    if not asked.wanted:
        raise UsageError("nothing is to be removed", where="prune", hint="--set prune.ffn=0.2, or heads, layers ...")
    amounts = resolve(structure, sizes, Asked(*asked.amounts))
    if amounts == full(structure) and any(asked.amounts):
        raise UsageError(
            f"so little cannot be removed: the nearest sizes that work are the model's own {asdict(amounts)}",
            where="prune",
            hint="remove more",
        )
    return amounts


def reads_text(profile: Profile, before: Amounts, after: Amounts) -> bool:
    """Return whether the model is run on a text."""
    width = (after.inner, after.heads, after.kv_heads) != (before.inner, before.heads, before.kv_heads)
    fits = profile.prune.recover != "none" and after != before
    return (
        profile.prune.sparsity > 0
        or fits
        or (width and load_pruner(profile.prune.pruner).reads_text)
        or after.layers != before.layers
    )


def prune(
    checkpoint: Checkpoint,
    source: Mapping[str, Any],
    profile: Profile,
    amounts: Amounts,
    directory: Path,
    options: PruneOptions,
    progress: Progress,
) -> PrunedModel:
    """Write a pruned checkpoint into an existing, empty directory.

    Args:
        checkpoint: The source, open.
        source: The same, as a worker opens it again.
        profile: ``prune`` and ``calibration`` of it.
        amounts: What is to be left, as :func:`check` or a search found it.
        directory: Where it goes.
        options: How.
        progress: Called with the fraction that is done.

    Raises:
        UsageError: The text is too short.
        ResourceError: It does not fit in memory, or on the disk.
        SourceError: Weights or hidden states are not finite.
    """
    structure, sizes = prunable(checkpoint)
    before = full(structure)
    require_space(directory, sum(info.nbytes for info in checkpoint.tensors().values()))
    text = None
    if reads_text(profile, before, amounts):
        text = texts.write_texts(
            structure,
            checkpoint,
            profile,
            text_file=options.text_file,
            source=source,
            seed=options.seed,
            memory_cap=options.max_memory,
            work=directory,
            progress=lambda fraction: None,
        )
    request = request_of(source, profile, amounts, directory, options, None if text is None else text.path)
    try:
        response = run_worker("prune.worker", request, timeout=TIMEOUT_SECONDS, progress=progress)
    finally:
        if text is not None:
            text.path.unlink(missing_ok=True)
    result = response["results"][0]
    record = {
        "schema_version": 1,
        "source": {"id": checkpoint.identifier, "kind": checkpoint.kind, "revision": checkpoint.revision},
        "before": asdict(before),
        "after": asdict(amounts),
        "layers": result["layers"],
        "algorithm": profile.prune.pruner,
        "depth": profile.prune.depth if amounts.layers < before.layers else None,
        "recover": profile.prune.recover if text is not None else "none",
        "text": None if text is None else dict(text.record),
        "sparsity": profile.prune.sparsity or None,
        "zeros": result["zeros"],
        "errors": {name: [float(f"{value:.3g}") for value in pair] for name, pair in result["errors"].items()},
        "seed": options.seed,
    }
    config = pruned_config(checkpoint.config, sizes, structure, amounts, result)
    write_file(directory / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    copy_sidecars(checkpoint, directory)
    write_file(directory / RECORD_NAME, json.dumps(record, indent=2, sort_keys=True) + "\n")
    return PrunedModel(before, amounts, record, int(response["peak_rss_bytes"]))


def trim(
    checkpoint: Checkpoint, source: Mapping[str, Any], profile: Profile, directory: Path, options: PruneOptions
) -> Mapping[str, Any]:
    """Write the model with the tokens of the text alone into an existing, empty directory; return what was kept.

    Raises:
        UsageError: The text is too short to choose by.
        UnsupportedModelError: Tokenizers of this kind cannot be trimmed.
    """
    content = texts.read_content(None, options.text_file)  # every word of the user's counts
    structure, sizes = prunable(checkpoint)
    chosen = vocabulary.choose(
        checkpoint.directory, content.content, vocab_size=structure.vocab_size, config=checkpoint.config
    )
    return _trimmed(checkpoint, source, chosen, directory, options, {"text": content.name, "sha256": content.sha256})


def trim_as_before(
    checkpoint: Checkpoint, source: Mapping[str, Any], kept: Path, directory: Path, options: PruneOptions
) -> None:
    """Write the model with the tokens that an artifact kept, for it to be compared with.

    Raises:
        CompressError: The list is damaged, or another model's.
    """
    structure, _ = prunable(checkpoint)
    ids = read_kept(kept, structure.vocab_size)
    nothing = vocabulary.Coverage(0, 0, 0, 0)
    _trimmed(checkpoint, source, vocabulary.Trimmed(ids, structure.vocab_size, nothing), directory, options, {})


def read_kept(path: Path, vocab_size: int) -> npt.NDArray[np.int64]:
    """Return the ids, int64 ``[kept]`` ascending, that an artifact kept of a vocabulary.

    Raises:
        CompressError: The list is damaged, or another model's.
    """
    check_regular(path, MAX_KEPT_BYTES)
    try:
        with path.open("rb") as stream:
            # Not np.load: by the first bytes it may also open an archive, and a header may claim any number of items.
            shape, _, dtype = _npy_header(stream)
            if dtype != np.int64 or len(shape) != 1 or not 0 < shape[0] <= vocab_size:
                raise ValueError(f"{dtype} of shape {shape}")
            ids = np.frombuffer(stream.read(8 * shape[0]), np.int64)
    except Exception as error:  # noqa: BLE001 - a header is Python's syntax, read by what raises as Python's parser does
        raise CompressError(f"the list of kept token ids is damaged: {error}", where=str(path)) from error
    if len(ids) != shape[0] or np.any(np.diff(ids) <= 0) or ids[0] < 0 or ids[-1] >= vocab_size:
        raise CompressError("this is no list of kept token ids of the model", where=str(path))
    return ids


def _npy_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("another version of the format")
    return np.lib.format.read_array_header_1_0(stream)


def _trimmed(
    checkpoint: Checkpoint,
    source: Mapping[str, Any],
    chosen: vocabulary.Trimmed,
    directory: Path,
    options: PruneOptions,
    text: Mapping[str, Any],
) -> Mapping[str, Any]:
    structure, _ = prunable(checkpoint)
    require_space(directory, sum(info.nbytes for info in checkpoint.tensors().values()))
    np.save(directory / KEPT_IDS_NAME, chosen.kept)
    kept = directory / KEPT_IDS_NAME
    request = request_of(source, profile_that_keeps_all(), full(structure), directory, options, None)
    request["vocabulary"] = str(kept)
    run_worker("prune.worker", request, timeout=TIMEOUT_SECONDS)
    config = vocabulary.rewrite_config(checkpoint.config, chosen)
    write_file(directory / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    vocabulary.write_tokenizer(checkpoint.directory, chosen, directory)
    for name, path in checkpoint.sidecars().items():
        if name not in TOKENIZER_NAMES and not (directory / name).exists():
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, directory / name)
    return {
        **text,
        "before": structure.vocab_size,
        "after": len(chosen.kept),
        "tokens_of_the_text": chosen.coverage.tokens,
        "distinct_tokens": chosen.coverage.distinct,
    }


def recover(
    teacher: Mapping[str, Any],
    checkpoint: Checkpoint,
    profile: Profile,
    directory: Path,
    options: PruneOptions,
    zeros: tuple[str, ...],
    state: Path,
    progress: Progress,
) -> Distilled:
    """Train a pruned model, in its directory, to answer as the original does; its weights are replaced if that helped.

    Args:
        teacher: The original, as a worker opens it.
        checkpoint: The same, open: its tokenizer and pooling.
        profile: ``prune`` and ``calibration`` of it.
        directory: The pruned model.
        options: How.
        zeros: Tensors in which removed heads are zeros, which stay.
        state: Where to keep how far it is: the same command goes on from there after a kill.
        progress: Called with the fraction that is done.

    Raises:
        UsageError: There is too little text.
        ResourceError: It does not fit in memory.
    """
    structure, _ = prunable(checkpoint)
    found = distill(
        teacher,
        directory,
        learning_texts(structure, checkpoint, texts.read_content(LEARNT_TOKENS, options.text_file)),
        output=directory / ".distilled.safetensors",
        steps=profile.prune.steps,
        seed=options.seed,
        pooling=pooling.resolve(structure, profile, checkpoint),
        frozen_zeros=zeros,
        memory_cap=options.max_memory,
        threads=options.threads,
        state=state,
        progress=progress,
    )
    if found.improved:
        for path in (*directory.glob("model*.safetensors"), directory / INDEX_NAME):
            path.unlink(missing_ok=True)
        (directory / ".distilled.safetensors").replace(directory / WEIGHTS_NAME)
        config = read_json_object(directory / "config.json", MAX_CONFIG_BYTES)
        write_file(
            directory / "config.json", json.dumps({**config, "dtype": "float32"}, indent=2, sort_keys=True) + "\n"
        )
    return found


def request_of(
    source: Mapping[str, Any],
    profile: Profile,
    amounts: Amounts,
    directory: Path,
    options: PruneOptions,
    text: Path | None,
) -> dict[str, Any]:
    """Return what the worker takes to prune a source to these sizes."""
    asked = profile.prune
    return {
        "job": "prune",
        "checkpoint": dict(source),
        "texts": None if text is None else str(text),
        "amounts": asdict(amounts),
        "algorithm": asked.pruner,
        "depth": asked.depth,
        "fit": asked.recover != "none" and text is not None and not asked.sparsity,
        "sparsity": asked.sparsity,
        "sparsifier": asked.sparsifier,
        "pattern": [2, 4] if asked.pattern == "2:4" else None,
        "seed": options.seed,
        "vocabulary": None,
        "output": str(directory),
        "workers": options.threads,
        "memory_cap": options.max_memory,
        "threads": 1,
    }


def profile_that_keeps_all() -> Profile:
    """Return a profile that prunes nothing: a trimmed vocabulary needs no more."""
    return Profile(name="all", description="all of it")


def pruned_config(
    config: Mapping[str, Any], sizes: SizeKeys, structure: Structure, amounts: Amounts, result: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the config of what is left: its sizes, and lists with an entry a block shortened with them."""
    before = full(structure)
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    changed = {key: value for key, value in config.items() if key not in ("torch_dtype", "_name_or_path")}
    changed["dtype"] = names[result["dtype"]]
    changed[sizes.inner] = amounts.inner
    changed[sizes.layers] = amounts.layers
    for key, value in changed.items():
        if isinstance(value, list) and key == "layer_types" and len(value) == before.layers:
            changed[key] = [value[index] for index in result["layers"]]
    if (amounts.heads, amounts.kv_heads) != (before.heads, before.kv_heads):
        if sizes.head_dim is None:
            changed[KEPT_HEADS] = amounts.heads
        else:
            changed[sizes.heads], changed[sizes.head_dim] = amounts.heads, structure.head_dim
            if sizes.kv_heads is not None:
                changed[sizes.kv_heads] = amounts.kv_heads
    return changed


def copy_sidecars(checkpoint: Checkpoint, directory: Path) -> None:
    """Take over tokenizer, template and pooling files unchanged."""
    for name, path in checkpoint.sidecars().items():
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, directory / name)
