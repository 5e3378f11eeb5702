"""Weights that are changed while they stream: channels rescaled, shifted and repeated, exactly undone elsewhere.

Requires source rows; ensures float32 rows as the plan's stored tensors have them. Which factors to use is decided by
:mod:`compress.calibrate.smoothing`; here they are only applied.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.contracts import FloatArray

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Adjustment:
    """What becomes of a linear ``y = x W^T + b`` (W is ``[N, K]``); ``None`` leaves that part as it is.

    Attributes:
        rows: int64 ``[N']``: which source row every stored row is.
        row_scale: float32 ``[N']``: factors of stored rows, and of the bias.
        columns: int64 ``[K']``: which source column every stored column is.
        column_scale: float32 ``[K']``: factors of stored columns.
        shift: float32 ``[K]``: what its inputs lack, ``x = x' + shift``; the bias makes up for it.
        offset: float32 ``[N']``: added to the bias after everything else.
    """

    rows: IntArray | None = None
    row_scale: FloatArray | None = None
    columns: IntArray | None = None
    column_scale: FloatArray | None = None
    shift: FloatArray | None = None
    offset: FloatArray | None = None

    def weight(self, source: FloatArray) -> FloatArray:
        """Return the stored weight ``[N', K']`` of the source's ``[N, K]``."""
        changed = source if self.rows is None else source[self.rows]
        changed = changed if self.columns is None else changed[:, self.columns]
        if self.column_scale is not None:
            changed = changed * self.column_scale
        if self.row_scale is not None:
            changed = changed * self.row_scale[:, None]
        return np.ascontiguousarray(changed, np.float32)

    def bias(self, source: FloatArray, weight: FloatArray) -> FloatArray:
        """Return the stored bias ``[N']`` of the source's bias ``[N]`` and weight ``[N, K]``; sums are in float64."""
        changed = source.astype(np.float64)
        if self.shift is not None:
            changed = changed + weight.astype(np.float64) @ self.shift.astype(np.float64)
        changed = changed if self.rows is None else changed[self.rows]
        if self.row_scale is not None:
            changed = changed * self.row_scale
        if self.offset is not None:
            changed = changed + self.offset
        return changed.astype(np.float32)

    def moments(self, second: FloatArray, mean: FloatArray) -> FloatArray:
        """Return the second moments ``[K', K']`` of the changed inputs.

        Args:
            second: float32 ``[K, K]``, of the source's inputs.
            mean: float32 ``[K]``, likewise.
        """
        changed = second.astype(np.float64)  # sums of large numbers that nearly cancel
        if self.shift is not None:
            shift = self.shift.astype(np.float64)
            cross = np.outer(mean, shift)
            changed = changed - cross - cross.T + np.outer(shift, shift)
        columns = np.arange(len(mean)) if self.columns is None else self.columns
        changed = changed[np.ix_(columns, columns)]
        if self.column_scale is not None:
            divisor = self.column_scale * self.copies(len(mean))
            changed = changed / divisor / divisor[:, None]
        return np.ascontiguousarray(changed, np.float32)

    def inputs(self, values: FloatArray) -> FloatArray:
        """Return the changed inputs ``[..., K']`` for the source's inputs ``[..., K]``."""
        changed = values if self.shift is None else values - self.shift
        changed = changed if self.columns is None else changed[..., self.columns]
        if self.column_scale is None:
            return changed
        divided: FloatArray = changed / (self.column_scale * self.copies(values.shape[-1]))
        return divided

    def copies(self, sources: int) -> FloatArray:
        """Return how often each stored column's source is stored, float32 ``[K']``: copies share its weight."""
        if self.columns is None:
            return np.ones(sources, np.float32)
        return np.bincount(self.columns, minlength=sources)[self.columns].astype(np.float32)


@dataclass(frozen=True)
class NormAdjustment:
    """What becomes of a norm ``y = n * weight + bias``: ``y' = (y - shift) / scale``; arrays are float32 ``[H]``."""

    scale: FloatArray
    shift: FloatArray

    def weight(self, source: FloatArray) -> FloatArray:
        """Return the stored weight."""
        return (source / self.scale).astype(np.float32)

    def bias(self, source: FloatArray) -> FloatArray:
        """Return the stored bias."""
        return ((source - self.shift) / self.scale).astype(np.float32)
