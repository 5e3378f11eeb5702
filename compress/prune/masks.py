"""Which weights become zero, by a score each: a part of every row, or so many of every few neighbours ("N:M").

2:4 (two of four stay) is what sparse tensor cores take: Mishra et al., "Accelerating Sparse Deep Neural Networks",
2021, arXiv 2104.08378.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from compress.contracts import FloatArray
from compress.errors import CompressError, UsageError
from compress.quantize.finite import first_nonfinite

Mask = npt.NDArray[np.bool_]
Pattern = tuple[int, int]


def check(weight: FloatArray, sparsity: float, pattern: Pattern | None, moments: FloatArray) -> None:
    """Refuse what no :class:`compress.contracts.Sparsifier` can take; the errors are listed there."""
    if weight.ndim != 2 or weight.dtype != np.float32 or moments.dtype != np.float32:
        raise ValueError(
            f"weight {weight.dtype} {list(weight.shape)} and moments {moments.dtype} must be float32 [N, K]"
        )
    if moments.shape != (weight.shape[1],) * 2:
        raise ValueError(f"moments {list(moments.shape)} do not fit a weight {list(weight.shape)}")
    bad = first_nonfinite(weight)
    if bad is not None:
        raise CompressError(f"a weight is not finite: weight[{bad[0]}, {bad[1]}] is {weight[bad]}")
    if not 0 <= sparsity < 1:
        raise UsageError(
            f"a sparsity of {sparsity:g} leaves nothing"
            if sparsity == 1
            else f"a sparsity of {sparsity:g} makes no sense",
            hint="0.5 sets half of the weights to zero; give a number from 0 to below 1",
        )
    if pattern is None:
        return
    kept, of = pattern
    if not 0 < kept < of:
        raise UsageError(f"the pattern {kept}:{of} makes no sense", hint="2:4 keeps two of four neighbours")
    if abs(sparsity - (1 - kept / of)) > 1e-6:
        raise UsageError(
            f"the pattern {kept}:{of} sets {1 - kept / of:g} of the weights to zero, not {sparsity:g}",
            hint=f"give a sparsity of {1 - kept / of:g} with it",
        )
    columns = weight.shape[1]
    if columns % of:
        raise UsageError(
            f"the pattern {kept}:{of} does not fit rows of {columns} weights: {columns} is no multiple of {of}",
            hint="leave this linear as it is, or choose no pattern",
        )


def lowest(scores: FloatArray, count: int) -> Mask:
    """Return a mask of the ``count`` lowest scores along the last axis; of equal ones, the first.

    A threshold and a count of what equals it, not a sort: half the memory, and the same on every machine, which a
    partition's order is not.

    Args:
        scores: ``[..., C]``, finite.
        count: 0 to C.
    """
    if not 0 <= count <= scores.shape[-1]:
        raise ValueError(f"{count} of {scores.shape[-1]} scores")
    if count == 0:
        return np.zeros(scores.shape, np.bool_)
    threshold = np.partition(scores, count - 1, axis=-1)[..., count - 1 : count]
    mask = scores < threshold
    equal = scores == threshold
    room = count - np.count_nonzero(mask, axis=-1, keepdims=True)
    mask |= equal & (np.cumsum(equal, axis=-1, dtype=np.int32) <= room)
    return mask


def per_row(scores: FloatArray, sparsity: float) -> Mask:
    """Return a mask ``[N, K]`` of the lowest ``round(sparsity * K)`` scores of each row."""
    return lowest(scores, round(sparsity * scores.shape[1]))


def per_group(scores: FloatArray, pattern: Pattern) -> Mask:
    """Return a mask ``[N, K]`` of the lowest ``m - n`` of every m neighbours; K is a multiple of m."""
    kept, of = pattern
    rows, columns = scores.shape
    return lowest(scores.reshape(rows, columns // of, of), of - kept).reshape(rows, columns)
