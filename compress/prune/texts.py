"""What a model is pruned on: windows of a text for decoders, pieces of a few sentences for encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.calibrate.decoder_texts import EXCERPTS, MOST_TOKENS, calibration_windows
from compress.contracts import Checkpoint, Decoder, Encoder, Structure
from compress.errors import UsageError
from compress.profile import Profile
from compress.validate import text
from compress.validate.artifact import Artifact
from compress.validate.encoded import pack
from compress.validate.pieces import cut, tokenize

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

    Raises:
        UsageError: There is too little of it, or it cannot be read.
        CompressError: The tokenizer is missing, damaged, or not this model's.
    """
    if isinstance(structure, Encoder):
        return _encoder_texts(structure, checkpoint, profile, text_file, work)
    assert isinstance(structure, Decoder)
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


def read_content(profile: Profile, text_file: Path | None) -> text.Text:
    """Return the user's text, or the embedded one, as far as it is read."""
    if text_file is None:
        return text.embedded("calibration")
    return text.from_file(text_file, min(profile.calibration.tokens, MOST_TOKENS), excerpts=EXCERPTS)


def _encoder_texts(
    encoder: Encoder, checkpoint: Checkpoint, profile: Profile, text_file: Path | None, work: Path
) -> PruningText:
    content, asked = read_content(profile, text_file), profile.calibration.tokens
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
    # Spread over the text, not its beginning.
    order = np.random.default_rng(0).permutation(len(tokens))
    taken, total = [], 0
    for index in order:
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
    import os
    share=float(os.environ.get("RND","0"))
    if share:
        gen=np.random.default_rng(0)
        frame=[a for a,b in zip(ids[0],taken[0].special,strict=True) if b]
        extra=int(len(ids)*share)
        for k in range(extra):
            n=max(3,len(ids[k])-len(frame))
            ids.append([*frame[:1],*[int(x) for x in gen.integers(0,encoder.vocab_size,n)],*frame[1:]]); types.append([0]*len(ids[-1]))
    encoded = pack(ids, types, [[True] * len(item) for item in ids])
    path = work / ".pruning-texts.npz"
    encoded.save(path)
    record = {"source": "text", "name": content.name, "sha256": content.sha256, "tokens": total, "texts": len(taken)}
    return PruningText(path, record)
