"""What a model is pruned on: windows of a text for decoders, pieces of a few sentences for encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.calibrate.decoder_texts import EXCERPTS, MOST_TOKENS, calibration_windows
from compress.contracts import Checkpoint, Decoder, Encoder, Structure
from compress.errors import UsageError
from compress.profile import Profile
from compress.prune.amounts import text_tokens
from compress.validation import text
from compress.validation.artifact import Artifact
from compress.validation.encoded import pack
from compress.validation.pieces import cut, tokenize

#: Tokens an encoder's text has at most, special ones included: most pieces are shorter, and all are padded to it.
LONGEST = 64
#: Fewer are mostly chance: a fit has thousands of unknowns.
MINIMUM_TOKENS = 2048


@dataclass(frozen=True)
class PruningText:
    """Token ids in a file as the worker reads them, and where they come from (for ``pruning.json``)."""

    path: Path
    record: Mapping[str, Any]


def write_texts(
    structure: Structure,
    checkpoint: Checkpoint,
    profile: Profile,
    *,
    text_file: Path | None,
    source: Mapping[str, Any],
    seed: int,
    memory_cap: int | None,
    work: Path,
    progress: Callable[[float], None],
) -> PruningText:
    """Tokenize the user's text, or the embedded one, and write it for the worker.

    An encoder's texts are joined by as many random sequences: words that the text lacks are met in use.

    Raises:
        UsageError: There is too little of it, or it cannot be read.
        CompressError: The tokenizer is missing, damaged, or not this model's.
    """
    if isinstance(structure, Encoder):
        return _encoder_texts(structure, checkpoint, profile, text_file, work, seed)
    assert isinstance(structure, Decoder)
    calibration = profile.calibration.model_copy(update={"tokens": text_tokens(structure, profile)})
    profile = profile.model_copy(update={"calibration": calibration})
    found = calibration_windows(
        checkpoint,
        structure,
        profile,
        text_file=text_file,
        source=source,
        seed=seed,
        memory_cap=memory_cap,
        work=work,
        progress=progress,
    )
    path = work / ".pruning-windows.npy"
    np.save(path, found.windows)
    return PruningText(path, found.record)


def read_content(tokens: int | None, text_file: Path | None) -> text.Text:
    """Return the user's text, as far as so many tokens need (``None``: all of it, up to 64 MB), or the embedded one."""
    if text_file is None:
        return text.embedded("calibration")
    return text.from_file(text_file, min(tokens or MOST_TOKENS, MOST_TOKENS), excerpts=EXCERPTS)


def _encoder_texts(
    encoder: Encoder,
    checkpoint: Checkpoint,
    profile: Profile,
    text_file: Path | None,
    work: Path,
    seed: int,
) -> PruningText:
    asked = text_tokens(encoder, profile)
    content = read_content(asked, text_file)
    place = Artifact(
        directory=checkpoint.directory,
        model=Path("model.onnx"),
        session_options={},
        vocab_size=encoder.vocab_size,
        context_length=encoder.context_length,
        task=encoder.task,
        config=checkpoint.config,
    )
    longest = min(LONGEST, encoder.context_length)
    # A piece has some forty tokens: more than enough of them, of which as many are taken as are asked for.
    pieces = cut(content.content, max(64, asked // 8))
    tokens = tokenize([(piece, None) for piece in pieces], place, longest) if pieces else []
    generator = np.random.default_rng(seed)
    taken, total = [], 0
    for index in generator.permutation(len(tokens)):  # spread over the text, not its beginning
        if total >= asked:
            break
        taken.append(tokens[index])
        total += len(tokens[index].ids)
    if total < min(asked, MINIMUM_TOKENS):
        raise UsageError(
            f"the text has {total} tokens, pruning needs at least {min(asked, MINIMUM_TOKENS)}",
            where=content.name,
            hint="use a longer text, or leave --calibration-text out",
        )
    ids, types = [item.ids for item in taken], [item.types for item in taken]
    frame = [token for token, special in zip(ids[0], taken[0].special, strict=True) if special]
    drawn = [_drawn(item.ids, frame, encoder.vocab_size, generator) for item in taken]
    ids, types = ids + drawn, types + [[0] * len(item) for item in drawn]
    path = work / ".pruning-texts.npz"
    pack(ids, types, [[True] * len(item) for item in ids]).save(path)
    record = {"source": "text", "name": content.name, "sha256": content.sha256, "tokens": total, "texts": len(taken)}
    return PruningText(path, record)


def _drawn(ids: Sequence[int], frame: list[int], rows: int, generator: np.random.Generator) -> list[int]:
    """Return random tokens between the special ones that frame a text, as many as another text has."""
    count = max(1, len(ids) - len(frame))
    return [*frame[:1], *map(int, generator.integers(0, rows, count)), *frame[1:]]
