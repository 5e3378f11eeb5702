"""What a student learns from: as much of a text as a few hundred steps can use."""

from __future__ import annotations

from pathlib import Path

from compress.calibrate.decoder_texts import spread_windows
from compress.contracts import Checkpoint, Decoder, Encoder, Structure
from compress.prune.distill import Texts
from compress.validation.artifact import Artifact
from compress.validation.pieces import drift_texts
from compress.validation.text import Text

#: A decoder's tokens, in windows of so many.
TOKENS, WINDOW = 65_536, 256
#: An encoder's texts, so many that the default steps see each about twice, and where they are cut, in tokens.
TEXTS, LONGEST = 6000, 128


def learning_texts(structure: Structure, checkpoint: Checkpoint, content: Text) -> Texts:
    """Cut a text for :func:`compress.prune.distill.distill`.

    Args:
        structure: The model's.
        checkpoint: Where the tokenizer is.
        content: Running text; of a file, ``from_file(path, TOKENS, excerpts=64)`` is more than enough.

    Returns:
        A decoder's windows, evenly spread; an encoder's texts as its task takes them (pairs, masked words).

    Raises:
        UsageError: The text is too short.
        CompressError: The tokenizer is missing, damaged, or not this model's.
    """
    if isinstance(structure, Decoder):
        length = min(WINDOW, structure.context_length)
        return spread_windows(content, checkpoint.directory, structure.vocab_size, length=length, tokens=TOKENS)
    assert isinstance(structure, Encoder)
    place = Artifact(
        directory=checkpoint.directory,
        model=Path("model.onnx"),
        session_options={},
        vocab_size=structure.vocab_size,
        context_length=structure.context_length,
        task=structure.task,
        config=checkpoint.config,
    )
    return drift_texts(content, place, count=TEXTS, max_length=min(LONGEST, structure.context_length))
