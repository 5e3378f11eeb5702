"""What an encoder is calibrated on: short texts, and random tokens for the words that no text has."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compress.contracts import Checkpoint, Encoder
from compress.errors import UsageError
from compress.validation import text
from compress.validation.artifact import Artifact
from compress.validation.encoded import Encoded, pack
from compress.validation.pieces import cut, tokenize

TEXTS, RANDOM = 80, 40
#: Tokens a text, special ones included; and a random sequence has between this and a quarter of it.
LONGEST = 128


def calibration_texts(encoder: Encoder, checkpoint: Checkpoint, content: text.Text, seed: int) -> Encoded:
    """Return the texts as token ids.

    Args:
        encoder: Its vocabulary and its positions.
        checkpoint: Where the tokenizer is.
        content: Running text.
        seed: Of the random sequences; special tokens frame them as they frame a text.

    Raises:
        UsageError: The text cannot be cut to the model's positions.
        CompressError: The tokenizer is missing, damaged, or not this model's.
    """
    directory = checkpoint.directory
    place = Artifact(
        directory=directory,
        model=Path("model.onnx"),
        session_options={},
        vocab_size=encoder.vocab_size,
        context_length=encoder.context_length,
        task=encoder.task,
        config=checkpoint.config,
    )
    longest = min(LONGEST, encoder.context_length)
    tokens = tokenize([(piece, None) for piece in cut(content.content, TEXTS)], place, longest)
    if not tokens:
        raise UsageError(
            "the text has no sentence of three words or more", where=content.name, hint="use a longer text"
        )
    ids, types = [item.ids for item in tokens], [item.types for item in tokens]
    generator = np.random.default_rng(seed)
    frame = [token for token, special in zip(ids[0], tokens[0].special, strict=True) if special]
    for _ in range(RANDOM):
        room = int(generator.integers(max(1, longest // 4), max(2, longest - len(frame))))
        body = [int(token) for token in generator.integers(0, encoder.vocab_size, room)]
        ids.append([*frame[:1], *body, *frame[1:]])
        types.append([0] * len(ids[-1]))
    return pack(ids, types, [[True] * len(item) for item in ids])
