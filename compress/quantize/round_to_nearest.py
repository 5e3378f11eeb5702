"""Data-free round-to-nearest with a searched clipping range.

Method, a block at a time. A block is scaled to the unit range, ``u = x / range``, so that huge and tiny weights meet
the same arithmetic. A candidate ``d`` (codes a unit of ``u``) gives integers ``v = clip(round(u * d))``; the scale that
fits them best in the least-squares sense is ``s = sum(w u v) / sum(w v v)`` and leaves the squared error
``sum(w u u) - sum(w u v)**2 / sum(w v v)``. The candidate with the greatest second term wins, and the codes are rounded
once more under its scale. ``w`` is the importance of the input channels (1 without it).

Candidates are few and fixed: for each bit width they were picked greedily, on normal, Laplace and trained weights, to
come nearest to an exhaustive scan (the tests hold them to it). A denser grid costs time and gains nothing.

Symmetric codes reach from ``-2**(b-1)`` to ``2**(b-1) - 1``. The sign of the scale is free, so ``range`` is the
*negated* extreme value of the block: the extreme meets the code that has no mirror image, as in llama.cpp's Q4_0
(``ggml-quants.c``, ``quantize_row_q4_0_ref``); the least-squares weighting is that of ``make_qx_quants`` there.
Asymmetric codes have an integer zero point; ``range`` is then max - min with 0 in between.

Layout. NumPy reduces fastest over the outer axis, so a chunk is held transposed, ``[block_size, blocks]``: sums over a
block are sums of whole rows, with SIMD and in a fixed order. A chunk's shape depends on the weight's width alone, never
on how many rows a caller passes, which makes results bit-identical for any chunking and any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from compress.contracts import ByteArray, FloatArray, QuantizedRows, Scheme
from compress.quantize.integer import quantize_channels, unsigned
from compress.quantize.scales import ScaleFormat, round_scales, validate_scale_format
from compress.quantize.scheme import validate_scheme, zero_code

CHUNK_ELEMENTS = 128 * 1024
"""Elements a chunk aims at. Measured: less than 64 Ki pays for NumPy's calls, more than 256 Ki leaves the cache."""

_NEGLIGIBLE = np.float32(1e-36)
"""Blocks without a greater magnitude become zero: the reciprocal of their range would overflow float32."""

Candidate = tuple[float, float]
"""Codes a unit of the scaled block, and a shift of the zero point in codes (asymmetric schemes only)."""

_SYMMETRIC: dict[int, dict[int, tuple[float, ...]]] = {
    # bits -> greatest block size -> codes a unit; negative: the extreme meets the positive end.
    2: {32: (2.4, 1.95, 2.95, -2.35, 3.5, -2.0, 1.4, 4.4), 256: (2.7, -2.7, 3.5, 2.25, 4.7, -3.5, -2.2, 3.0)},
    4: {
        32: (8.2, 7.1, 8.7, 7.8, 6.2, 9.1),
        64: (8.5, 9.0, 7.9, 7.25, 9.5, -8.5, 10.4, 8.2),
        256: (8.8, 9.45, 8.2, 9.95, -8.6, 7.8, 10.8, 9.1),
    },
    8: {256: (128.0, 126.0, 127.0, 124.0)},
}

_ASYMMETRIC: dict[int, dict[int, tuple[Candidate, ...]]] = {
    2: {
        32: ((4.0, 0), (4.7, -0.5), (4.7, 0.5), (3.5, 0), (5.4, 0), (2.8, 0), (4.2, -0.5), (4.2, 0.5)),
        256: ((4.6, 0), (5.4, 0.5), (5.4, -0.5), (3.9, 0), (5.9, 0), (4.7, -0.5), (4.6, 0.5), (5.9, -1)),
    },
    4: {
        32: ((15.3, 0), (14.2, 0), (16.1, 0), (13.2, -0.5), (12.2, -1), (14.8, 0), (16.7, -0.5), (16.4, 0.5)),
        64: ((15.65, 0), (14.7, 0), (16.4, 0), (17.2, -0.5), (17.1, 0.5), (15.2, 0), (14.0, -0.5), (16.0, 0)),
        256: ((16.25, 0), (15.4, 0), (17.2, 0), (17.6, 0.5), (16.7, -0.5), (17.9, 0), (14.8, 0), (18.2, -0.5)),
    },
    8: {256: ((255.0, 0), (252.5, -1), (250.0, -1))},
}


class RoundToNearest:
    """Round-to-nearest with a searched clipping range; needs no data, and rows do not depend on each other."""

    name = "rtn"

    def quantize(
        self,
        weight: FloatArray,
        scheme: Scheme,
        importance: FloatArray | None = None,
        *,
        scale_format: ScaleFormat = "float32",
        moments: FloatArray | None = None,
    ) -> QuantizedRows:
        """Quantize ``weight`` float32 ``[rows, columns]``.

        Args:
            weight: Finite values (see :func:`compress.quantize.finite.first_nonfinite`; not checked again here).
            scheme: Bits, block size, symmetry.
            importance: float32 ``[columns]``, not negative: expected second moment of each input channel up to a
                factor. A block whose importance is 0 throughout is treated as if it had none.
            scale_format: What the scales are rounded to before codes are chosen.
            moments: Not used: rows are rounded one weight at a time.

        Raises:
            UsageError: The scheme or the scale format does not exist.
            CompressError: A scale is beyond ``scale_format``'s range.
            ValueError: ``weight`` is not a float32 matrix, or ``importance`` does not fit it or is negative or NaN.
        """
        validate_scheme(scheme, whole_rows=True)
        validate_scale_format(scale_format)
        if weight.ndim != 2 or weight.dtype != np.float32:
            raise ValueError(f"expected a float32 matrix, got {weight.dtype} {list(weight.shape)}")
        rows, columns = weight.shape
        if scheme.activations != "none" and scheme.pair_safe:
            return unsigned(*quantize_channels(weight, scheme.bits, importance), scheme.bits)
        if scheme.block_size == 0:
            scheme = replace(scheme, block_size=max(columns, 1))
        blocks = scheme.blocks(columns)
        result = QuantizedRows(
            codes=np.empty((rows, blocks * scheme.block_size), np.uint8),
            scales=np.empty((rows, blocks), np.float32),
            zero_points=None if scheme.symmetric else np.empty((rows, blocks), np.uint8),
        )
        if weight.size == 0:
            return result
        search = _Search.create(scheme, columns, importance)
        for start in range(0, rows, search.rows):
            search.run(weight, start, result, scale_format)
        return result


@dataclass
class _Search:
    """The buffers of one call, made once, and the steps that use them; B = block size, C = blocks in a chunk."""

    scheme: Scheme
    columns: int
    rows: int
    candidates: tuple[Candidate, ...]
    units: FloatArray  # [B, C] the chunk, scaled
    codes: FloatArray  # [B, C]
    product: FloatArray  # [B, C]
    weights: FloatArray | None  # [B, C] importance, greatest in a block = 1
    weighted: FloatArray  # [B, C] weights * units; units themselves without importance

    @classmethod
    def create(cls, scheme: Scheme, columns: int, importance: FloatArray | None) -> _Search:
        """Allocate for chunks of whole rows, at least two blocks wide.

        A single column of blocks would make NumPy sum pairwise instead of row after row, and results would depend on
        the chunk.
        """
        blocks = scheme.blocks(columns)
        rows = max(1 + (blocks == 1), CHUNK_ELEMENTS // (blocks * scheme.block_size))
        shape = (scheme.block_size, rows * blocks)
        units = np.zeros(shape, np.float32)
        weights = None if importance is None else _block_weights(importance, scheme, columns, rows)
        table = _SYMMETRIC if scheme.symmetric else _ASYMMETRIC
        by_size: dict[int, tuple[float, ...]] | dict[int, tuple[Candidate, ...]] = table[scheme.bits]
        # A whole row is a block as well; what is near the best for the largest block is for longer ones.
        chosen = by_size[min((size for size in by_size if size >= scheme.block_size), default=max(by_size))]
        return cls(
            scheme=scheme,
            columns=columns,
            rows=rows,
            candidates=tuple(item if isinstance(item, tuple) else (item, 0.0) for item in chosen),
            units=units,
            codes=np.zeros(shape, np.float32),
            product=np.zeros(shape, np.float32),
            weights=weights,
            weighted=units if weights is None else np.zeros(shape, np.float32),
        )

    def run(self, weight: FloatArray, start: int, result: QuantizedRows, scale_format: ScaleFormat) -> None:
        """Quantize one chunk of rows from ``start`` on into ``result``."""
        part = weight[start : start + self.rows]
        self._load(part)
        low, high = self._ends()
        extent = self._extent(low, high)
        np.multiply(self.units, _reciprocal(extent), out=self.units)
        if self.weights is not None:
            np.multiply(self.units, self.weights, out=self.weighted)
        slopes, zeros = self._best(np.divide(low, extent, out=low, where=extent != 0))
        count = len(part)
        blocks = self.scheme.blocks(self.columns)
        scales = (slopes * extent).reshape(self.rows, blocks)[:count]
        zero_points = None if zeros is None else zeros.reshape(self.rows, blocks)[:count]
        stop = start + count
        result.scales[start:stop] = round_scales(scales, scale_format)
        if zero_points is not None and result.zero_points is not None:
            result.zero_points[start:stop] = zero_points
        self._encode(part, result.scales[start:stop], zero_points, result.codes[start:stop])

    def _load(self, part: FloatArray) -> None:
        """Transpose rows into ``units``; padding and absent rows are 0."""
        size, blocks = self.scheme.block_size, self.scheme.blocks(self.columns)
        count, full = len(part), self.columns // size
        grid = self.units.reshape(size, self.rows, blocks)
        whole = part[:, : full * size].reshape(count, full, size)
        np.copyto(grid[:, :count, :full], whole.transpose(2, 0, 1))
        if full < blocks:
            rest = self.columns - full * size
            grid[:rest, :count, full] = part[:, full * size :].T
            grid[rest:, :count, full] = 0
        grid[:, count:] = 0

    def _ends(self) -> tuple[FloatArray, FloatArray]:
        """Return the least and the greatest value of every block, ``[C]`` each."""
        low: FloatArray = np.minimum.reduce(self.units, axis=0)
        high: FloatArray = np.maximum.reduce(self.units, axis=0)
        return low, high

    def _extent(self, low: FloatArray, high: FloatArray) -> FloatArray:
        """Return what is divided by, ``[C]``; 0 marks a block that counts as zero. Clamps ``low`` to at most 0."""
        negligible = np.maximum(high, -low) < _NEGLIGIBLE
        if self.scheme.symmetric:
            extent = np.where(high > -low, -high, -low)
        else:
            np.minimum(low, 0, out=low)
            extent = np.maximum(high, 0) - low
        extent[negligible] = 0
        return extent

    def _best(self, low: FloatArray) -> tuple[FloatArray, FloatArray | None]:
        """Return the winner's scale in units, and its zero point, ``[C]`` each."""
        top = (1 << self.scheme.bits) - 1
        zero = np.float32(zero_code(self.scheme.bits))
        gain = np.full(low.shape, -1, np.float32)
        slopes = np.zeros(low.shape, np.float32)
        zeros = None if self.scheme.symmetric else np.zeros(low.shape, np.float32)
        codes = self.codes
        for density, shift in self.candidates:
            np.multiply(self.units, np.float32(density), out=codes)
            np.rint(codes, out=codes)
            if zeros is None:
                np.clip(codes, -zero, np.float32(top) - zero, out=codes)
            else:
                offset = np.float32((top - density) / 2 + shift)
                trial = np.clip(np.rint(offset - low * np.float32(density)), np.float32(0), np.float32(top))
                np.maximum(codes, -trial, out=codes)
                np.minimum(codes, np.float32(top) - trial, out=codes)
            along, square = self._moments()
            np.maximum(square, np.float32(1e-30), out=square)
            slope = along / square
            along *= slope
            better = along > gain
            np.copyto(gain, along, where=better)
            np.copyto(slopes, slope, where=better)
            if zeros is not None:
                np.copyto(zeros, trial, where=better)
        return slopes, zeros

    def _moments(self) -> tuple[FloatArray, FloatArray]:
        """Return ``sum(w u v)`` and ``sum(w v v)`` of every block, ``[C]`` each."""
        np.multiply(self.weighted, self.codes, out=self.product)
        along: FloatArray = np.add.reduce(self.product, axis=0)
        np.multiply(self.codes, self.codes, out=self.product)
        if self.weights is not None:
            np.multiply(self.product, self.weights, out=self.product)
        square: FloatArray = np.add.reduce(self.product, axis=0)
        return along, square

    def _encode(self, part: FloatArray, scales: FloatArray, zeros: FloatArray | None, out: ByteArray) -> None:
        """Round ``part`` under its final scales into uint8 codes; padding becomes the zero point.

        Rows stay rows here: transposing bytes back costs more than broadcasting one scale a block.
        """
        size, blocks = self.scheme.block_size, self.scheme.blocks(self.columns)
        buffer = self.codes.reshape(-1)[: part.shape[0] * blocks * size].reshape(part.shape[0], blocks, size)
        if self.columns % size:
            padded = self.product.reshape(-1)[: buffer.size].reshape(part.shape[0], blocks * size)
            padded[:, : self.columns] = part
            padded[:, self.columns :] = 0
            part = padded
        np.multiply(part.reshape(buffer.shape), _reciprocal(scales)[..., None], out=buffer)
        np.rint(buffer, out=buffer)
        zero = np.float32(zero_code(self.scheme.bits)) if zeros is None else zeros[..., None]
        np.add(buffer, zero, out=buffer)
        np.clip(buffer, np.float32(0), np.float32((1 << self.scheme.bits) - 1), out=buffer)
        np.copyto(out.reshape(buffer.shape), buffer, casting="unsafe")


def _reciprocal(values: FloatArray) -> FloatArray:
    """Return ``1 / values``, 0 where a value is 0."""
    return np.divide(np.float32(1), values, out=np.zeros_like(values), where=values != 0)


def _block_weights(importance: FloatArray, scheme: Scheme, columns: int, rows: int) -> FloatArray:
    """Return importance as ``[B, rows * blocks]``, the greatest of every block being 1; padding weighs 0."""
    if importance.shape != (columns,) or not np.all(importance >= 0) or not np.all(np.isfinite(importance)):
        raise ValueError(f"importance must be {columns} finite values, none negative")
    size, blocks = scheme.block_size, scheme.blocks(columns)
    padded = np.zeros(blocks * size, np.float32)
    padded[:columns] = importance
    grid = padded.reshape(blocks, size)
    greatest = grid.max(axis=1, keepdims=True)
    grid = np.where(greatest > 0, grid / np.where(greatest > 0, greatest, 1), np.float32(1)).astype(np.float32)
    tiled: FloatArray = np.ascontiguousarray(np.tile(grid, (rows, 1)).T)
    return tiled
