"""What an encoder's static graph is calibrated on: texts padded to its length, and lengths that none of them has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from compress.calibrate import activation_ranges
from compress.calibrate.encoder_texts import calibration_texts
from compress.contracts import Checkpoint, Encoder
from compress.graph import quantize_activations
from compress.validation.encoded import Encoded
from compress.validation.text import Text


def quantize(
    model: ir.Model,
    encoder: Encoder,
    checkpoint: Checkpoint,
    content: Text,
    *,
    bits: int,
    seed: int,
    directory: Path,
    progress: Callable[[float], None],
) -> int:
    """Make integers of a static encoder's activations; returns of how many tensors.

    Args:
        model: What :func:`compress.graph.encoder.build_encoder` made, its weights in ``directory``. Changed in place.
        encoder: Its vocabulary and its positions.
        checkpoint: Where the tokenizer is.
        content: Running text.
        bits: Of activations.
        seed: Of random sequences.
        directory: The artifact's.
        progress: Called with the fraction that is done.

    Raises:
        UsageError: The text is too short.
        CompressError: A tensor is not finite on it.
    """
    graph = model.graph
    assert graph.inputs[0].shape is not None
    length = graph.inputs[0].shape.numpy()[1]
    given = samples(calibration_texts(encoder, checkpoint, content, seed), length, _pad_id(checkpoint, encoder))
    wanted = {value.name or "": given[value.name or ""] for value in graph.inputs}
    values = quantize_activations.float_values(graph)
    ranges = activation_ranges.observe(model, values, wanted, directory, progress=progress)
    return quantize_activations.insert(graph, ranges, bits=bits)


def samples(texts: Encoded, length: int, pad_id: int) -> Mapping[str, npt.NDArray[np.int64]]:
    """Return texts as the graph's inputs, int64 ``[texts, 1, length]``, longer ones cut.

    Three are added, made of the tokens of the others: one of a single token, one of two, and one without padding.
    """
    ids = np.full((len(texts) + 3, 1, length), pad_id, np.int64)
    types, mask = np.zeros_like(ids), np.zeros_like(ids)
    pieces = [slice(start, start + size) for start, size in zip(texts.starts, texts.lengths, strict=True)]
    pieces += [slice(0, 1), slice(0, 2)]
    for row, piece in enumerate(pieces):
        part, kinds = texts.ids[piece][:length], texts.types[piece][:length]
        ids[row, 0, : len(part)], types[row, 0, : len(part)], mask[row, 0, : len(part)] = part, kinds, 1
    ids[-1, 0] = np.resize(texts.ids, length)
    mask[-1] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _pad_id(checkpoint: Checkpoint, encoder: Encoder) -> int:
    pad: Any = checkpoint.config.get("pad_token_id")
    return pad if isinstance(pad, int) and 0 <= pad < encoder.vocab_size else 0
