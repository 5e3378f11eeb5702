"""Rows of a planned weight, stacked from the checkpoint's tensors as the plan says, checked to be finite."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.contracts import Checkpoint, FloatArray, Slice
from compress.errors import SourceError
from compress.planning import Fate
from compress.quantize.finite import first_nonfinite

#: Weights that are held as float32 at once: 8 MiB of them, small enough for the promise, large enough to read well.
CHUNK_WEIGHTS = 1 << 21


def read_rows(checkpoint: Checkpoint, fate: Fate, start: int, stop: int) -> FloatArray:
    """Return rows ``[start, stop)`` of a fate's stacked weight, float32 ``[stop - start, columns]``, checked finite.

    Raises:
        SourceError: A value is NaN or infinite; the message names tensor and element.
    """
    parts: list[FloatArray] = []
    below = 0
    for piece in fate.reads:
        length = _length(piece, checkpoint)
        first, last = max(start - below, 0), min(stop - below, length)
        below += length
        if first < last:
            parts.append(_read_piece(checkpoint, piece, piece.start + first, piece.start + last))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def read_whole(checkpoint: Checkpoint, reads: Sequence[Slice]) -> FloatArray:
    """Return all rows of stacked tensors, however many the source has, checked finite.

    Raises:
        SourceError: A value is NaN or infinite.
    """
    parts = [_read_piece(checkpoint, piece, piece.start, piece.start + _length(piece, checkpoint)) for piece in reads]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _length(piece: Slice, checkpoint: Checkpoint) -> int:
    if piece.stop is not None:
        return piece.stop - piece.start
    shape = checkpoint.tensors()[piece.tensor].shape
    return (shape[-1] if piece.transposed else shape[0]) - piece.start


def _read_piece(checkpoint: Checkpoint, piece: Slice, first: int, last: int) -> FloatArray:
    if piece.transposed:
        whole = checkpoint.read(piece.tensor)
        array = np.ascontiguousarray(whole[: piece.columns, first:last].T)
    else:
        array = checkpoint.read(piece.tensor, first, last)
        if piece.columns is not None:
            array = np.ascontiguousarray(array[:, : piece.columns])
    bad = first_nonfinite(array)
    if bad is not None:
        row = bad[0] + first
        raise SourceError(
            f"a weight is not a finite number: {array[bad]}",
            where=f"{piece.tensor}, {'column' if piece.transposed else 'row'} {row}",
            hint="the checkpoint is damaged, or its training diverged; fetch it again",
        )
    return array
