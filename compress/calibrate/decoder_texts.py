"""What a decoder is calibrated on: windows of a text, spread over all of it, or windows that the model writes itself.

A text's beginning is often unlike the rest (a licence, a table of contents), so windows are not consecutive: their
starts are evenly spaced. Text of the model's own needs the whole source model in memory, in float32, as
:func:`self_text_bytes` predicts: 1.5 GB for 135 million parameters, 24 GB for Phi-3's 3.8 billion. 8,192 tokens take a
135-million-parameter model about 90 seconds on one core; the time grows with parameters and tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.calibrate.self_text_worker import BATCH, PIECE
from compress.contracts import Checkpoint, Decoder
from compress.errors import ResourceError, UsageError
from compress.profile import Profile
from compress.tokens import Tokenizer
from compress.validation import text
from compress.validation.memory import check_memory
from compress.validation.protocol import run_worker

#: Fewer tokens than this (or than the profile asks for) make statistics that are mostly chance.
MINIMUM_TOKENS = 2048
#: A file too long to be read whole is read in so many places.
EXCERPTS = 64
#: Tokens for which text is read at most: 64 MiB.
MOST_TOKENS = (64 << 20) // text.BYTES_PER_TOKEN
TIMEOUT_SECONDS = 6 * 3600.0
WINDOWS_NAME = ".self-text.npy"
#: torch and transformers, imported.
_LIBRARIES = 450_000_000
_FLOAT = 4

Progress = Callable[[float], None]


@dataclass(frozen=True)
class CalibrationText:
    """Windows of token ids int64 ``[windows, length]``, and where they come from.

    ``record`` is for the manifest: ``source`` (``text`` or ``self``), ``name``, ``sha256`` (of the whole text as UTF-8;
    of the ids as little-endian int64 where the model wrote them), ``tokens``, ``asked_tokens``, ``window`` and, of the
    model's own text, ``seed``. ``content`` is the text that was read, to look for in the evaluation text; ``None`` of
    the model's own.
    """

    windows: text.Windows
    record: Mapping[str, Any]
    content: str | None


def calibration_windows(
    checkpoint: Checkpoint,
    decoder: Decoder,
    profile: Profile,
    *,
    text_file: Path | None,
    source: Mapping[str, Any],
    seed: int,
    memory_cap: int | None,
    work: Path,
    progress: Progress,
) -> CalibrationText:
    """Return the windows that ``profile.calibration`` asks for, each with what the tokenizer prepends.

    Args:
        checkpoint: Where the tokenizer is.
        decoder: Its vocabulary and context.
        profile: How many tokens, in windows of how many, from where.
        text_file: The user's text; ``None`` for the embedded one.
        source: The source as a worker opens it again.
        seed: Of the model's own text.
        memory_cap: The most bytes the model may take there.
        work: Where a temporary file may go.
        progress: Called with the fraction that is done.

    Raises:
        UsageError: The text cannot be read, gives no tokens, or fewer than are needed; or a text was given for a
            profile whose source is the model itself.
        ResourceError: The model that would write the text does not fit in memory.
        CompressError: The tokenizer is missing, damaged, or not this model's; the model cannot be run.
    """
    asked = profile.calibration
    length = min(asked.window, decoder.context_length, asked.tokens)
    if asked.source == "self":
        if text_file is not None:
            raise UsageError(
                "the profile calibrates on text that the model writes itself; the given text would not be read",
                where=str(text_file),
                hint="leave --calibration-text out, or --set calibration.source=text",
            )
        return _self_written(checkpoint, decoder, asked.tokens, length, source, seed, memory_cap, work, progress)
    if text_file is None:
        content = text.embedded("calibration")
    else:
        content = text.from_file(text_file, min(asked.tokens, MOST_TOKENS), excerpts=EXCERPTS)
    windows = spread_windows(content, checkpoint.directory, decoder.vocab_size, length=length, tokens=asked.tokens)
    progress(1.0)
    record = {"source": "text", "name": content.name, "sha256": content.sha256}
    return CalibrationText(windows, {**record, **_counts(windows, asked.tokens)}, content.content)


def spread_windows(content: text.Text, directory: Path, vocab_size: int, *, length: int, tokens: int) -> text.Windows:
    """Cut windows from a text at evenly spaced places, from its beginning to its end; they do not overlap.

    Args:
        content: The text.
        directory: Where the tokenizer is.
        vocab_size: Rows of the model's token table.
        length: Tokens a window, those the tokenizer prepends included.
        tokens: How many to use. A text with fewer, but at least :data:`MINIMUM_TOKENS`, gives what it has.

    Returns:
        int64 ``[windows, length]``, at least one window.

    Raises:
        UsageError: The text gives no tokens, or too few.
        CompressError: The tokenizer is missing, damaged, or not this model's.
    """
    prefix, ids = text.tokenize(content.content, directory)
    own = length - len(prefix)
    if own < 2:
        raise UsageError(
            f"windows of {length} tokens have no room beside the {len(prefix)} that the tokenizer prepends",
            hint="--set calibration.window=512",
        )
    if not ids:
        raise UsageError(
            "the text gives no tokens: the model's tokenizer drops all of it",
            where=content.name,
            hint="use a text in a language and script that the model knows",
        )
    needed = max(1, min(tokens, MINIMUM_TOKENS) // length) * own
    if len(ids) < needed:
        raise UsageError(
            f"the text has {len(ids)} tokens, calibration needs at least {needed}",
            where=content.name,
            hint="use a longer text, or leave --calibration-text out",
        )
    count = min(tokens // length, len(ids) // own)
    starts = np.linspace(0, len(ids) - own, count).astype(np.int64)
    body = np.array(ids, np.int64)[starts[:, None] + np.arange(own)]
    windows = np.hstack([np.tile(np.array(prefix, np.int64), (count, 1)), body])
    text.check_ids(windows, vocab_size, directory)
    return windows


def self_text_bytes(weights: int, decoder: Decoder, tokens: int, length: int) -> int:
    """Predict the peak memory of the worker in which the model writes its text, in bytes.

    Args:
        weights: The model's weights, tied ones once; they are float32 there.
        decoder: Layers, heads and vocabulary.
        tokens: How many are written.
        length: Tokens a window.
    """
    parts = -(-length // PIECE)
    batch = min(BATCH, max(1, tokens // length) * parts)
    cache = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * batch * -(-length // parts)
    logits = 6 * batch * decoder.vocab_size
    return _LIBRARIES + _FLOAT * (int(1.1 * weights) + cache + logits)


def _self_written(
    checkpoint: Checkpoint,
    decoder: Decoder,
    tokens: int,
    length: int,
    source: Mapping[str, Any],
    seed: int,
    memory_cap: int | None,
    work: Path,
    progress: Progress,
) -> CalibrationText:
    weights = sum(int(np.prod(info.shape)) for info in checkpoint.tensors().values())
    try:
        check_memory(self_text_bytes(weights, decoder, tokens, length), memory_cap)
    except ResourceError as error:
        raise ResourceError(
            f"the model cannot write its calibration text: {error.what}",
            hint="calibrate on a text: --set calibration.source=text",
        ) from None
    opening, special, vocabulary = _vocabulary(checkpoint.directory, decoder.vocab_size)
    output = work / WINDOWS_NAME
    request = {
        "checkpoint": dict(source),
        "windows": tokens // length,
        "length": length,
        "seed": seed,
        "opening": opening[: max(0, length - 2)],
        "special": special,
        "vocabulary": vocabulary,
        "output": str(output),
        "threads": 1,
    }
    try:
        run_worker("calibrate.self_text_worker", request, timeout=TIMEOUT_SECONDS, progress=progress)
        windows = np.load(output)
    finally:
        output.unlink(missing_ok=True)
    digest = hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest()
    record = {"source": "self", "name": "text that the model wrote", "sha256": digest, "seed": seed}
    return CalibrationText(windows, {**record, **_counts(windows, tokens)}, None)


def _vocabulary(directory: Path, vocab_size: int) -> tuple[list[int], list[int], int]:
    """Return what the tokenizer prepends, its special tokens, and where its ids end.

    Without a ``tokenizer.json`` only what it prepends is known.
    """
    opening, _ = text.tokenize("a", directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        return opening, [], vocab_size
    with Tokenizer(path=path) as tokenizer:
        special, known = tokenizer.special_ids(), max(tokenizer.vocabulary().values(), default=-1) + 1
    return opening, special, min(known, vocab_size)


def _counts(windows: text.Windows, asked: int) -> dict[str, int]:
    return {"tokens": int(windows.size), "asked_tokens": asked, "window": int(windows.shape[1])}
