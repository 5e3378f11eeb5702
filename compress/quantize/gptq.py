"""GPTQ: each weight's rounding error is made up for by the weights that are rounded after it.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023. With H the
second moments of a linear's inputs and U the upper Cholesky factor of H's inverse, a column is rounded and its error
``(w - q) / U[k, k]`` taken off the columns behind it along ``U[k]``. Columns with the largest moments go first.

Integer products: the scale of an output channel is searched beforehand, and a code may not overflow together with its
neighbour (:mod:`compress.quantize.integer`). H is damped by half its mean diagonal: moments come from a hundred texts,
and an error shifted onto a channel that was silent there is no gain elsewhere.

Block-wise weights: scales and zero points are searched beforehand as well ("static groups"), so that columns may be
taken in any order and scales may be stored as anything. The same codes are found without an inverse (Chee et al.,
"QuIP", 2023, theorem 6): with columns in order and ``H = R R^T``, R upper triangular, errors ``E = W - Q`` cost ::

    trace(E H E^T) = sum over k of  R[k, k]^2 * |e_k + sum over j < k of  e_j R[j, k] / R[k, k]|^2

so column k is rounded as ``w_k + sum_j e_j R[j, k] / R[k, k]``. One factorization instead of an inversion and another,
and what is carried are errors of the original weight. Halves are done one after the other, recursively
(:func:`_walk`, :func:`_factorize`): nearly all the work is a few large matrix products.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.contracts import ByteArray, FloatArray, QuantizedRows, ScaleFormat, Scheme
from compress.errors import CompressError
from compress.quantize.finite import first_nonfinite
from compress.quantize.integer import PAIR_LIMIT, SignedArray, quantize_channels, unsigned
from compress.quantize.round_to_nearest import RoundToNearest
from compress.quantize.scheme import validate_scheme, zero_code

DAMPING = 0.5
"""Part of the mean moment that is added to every channel's, for integer products."""
BLOCK_DAMPING = 0.03
"""The same for block-wise weights. The paper has 0.01; 0.03 left less error on held-out text (docs/accuracy.md)."""
BLOCK_DAMPING_LIMIT = 1.0
"""What the block-wise damping may be raised to, tenfold at a time, if the moments are not positive definite."""
GROUP_ROWS = 512
"""Rows that block-wise weights are rounded at a time, the last ones padded: a product's bits depend on its shape, so
the shape must not depend on how many rows a caller passes. Measured on [1024, 8192]: 256 rows take a fifth longer, 1024
save a tenth and would waste more on narrow layers."""

_BLOCK = 64
_LEAF_COLUMNS = 16
_LEAF_FACTOR = 64
_LEAF_UPDATE = 256

DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Feedback:
    """What the rounding of one column means to those after it; K columns.

    Attributes:
        order: int ``[K]``: columns in the order that they are rounded in, those with the largest moments first.
        gains: float32 ``[K, K]``, by position in that order: ``gains[j, k]``, ``j < k``, times column j's error is what
            column k makes up for. The rest of the array means nothing.
        pivots: float32 ``[K]``, by position: ``R[k, k]``; its square times a squared change of column k is what that
            change costs when the columns after it make up for it.
    """

    order: npt.NDArray[np.intp]
    gains: FloatArray
    pivots: FloatArray


class Gptq:
    """GPTQ where the moments of the inputs are known, round-to-nearest elsewhere.

    An instance keeps the last moments' factor for as long as that array lives, so that a large weight can be passed
    piece by piece. Several threads may use it at once.
    """

    name = "gptq"

    def __init__(self) -> None:
        self._nearest = RoundToNearest()
        self._factors = _Factors()

    def quantize(
        self,
        weight: FloatArray,
        scheme: Scheme,
        importance: FloatArray | None = None,
        *,
        scale_format: ScaleFormat = "float32",
        moments: FloatArray | None = None,
    ) -> QuantizedRows:
        """Quantize ``weight`` float32 ``[rows, columns]``; see :class:`compress.contracts.Quantizer`.

        The bytes are the same for any number of BLAS threads only if the caller allows one
        (:func:`compress.weights.write_weights` does). Any split of the rows gives the same bytes.

        Args:
            weight: Finite values.
            scheme: Bits, block size, symmetry.
            importance: float32 ``[columns]``, not negative: what block-wise scales are searched with; without it the
                moments' diagonal.
            scale_format: What scales are rounded to before codes are chosen.
            moments: float32 ``[columns, columns]``: the inputs' second moments up to a factor. A channel without any
                (0 on the diagonal) is rounded to nearest.

        Raises:
            UsageError: The scheme or the scale format does not exist.
            CompressError: The moments are not finite or no moments (negative, or far from positive semidefinite), or a
                scale is beyond ``scale_format``'s range.
            ValueError: Shapes or types do not fit.
        """
        if moments is None:
            return self._nearest.quantize(weight, scheme, importance, scale_format=scale_format)
        if scheme.activations == "none" or not scheme.pair_safe:
            return self._blockwise(weight, scheme, importance, scale_format, moments)
        validate_scheme(scheme)
        _, scales = quantize_channels(weight, scheme.bits, np.ascontiguousarray(np.diagonal(moments)))
        return unsigned(compensated(weight, scales, moments, scheme.bits), scales, scheme.bits)

    def _blockwise(
        self,
        weight: FloatArray,
        scheme: Scheme,
        importance: FloatArray | None,
        scale_format: ScaleFormat,
        moments: FloatArray,
    ) -> QuantizedRows:
        validate_scheme(scheme, whole_rows=True)
        if weight.ndim != 2 or moments.shape != (weight.shape[1],) * 2:
            raise ValueError(f"moments {list(moments.shape)} do not fit a weight {list(weight.shape)}")
        factor = self._factors.of(moments)
        if importance is None:
            importance = np.ascontiguousarray(np.diagonal(moments))
        nearest = self._nearest.quantize(weight, scheme, importance, scale_format=scale_format)
        return replace(nearest, codes=carried(weight, nearest, scheme, factor))


def compensated(weight: FloatArray, scales: FloatArray, moments: FloatArray, bits: int) -> SignedArray:
    """Return codes int8 ``[N, K]`` of a weight under given scales.

    Args:
        weight: float32 ``[N, K]``.
        scales: float32 ``[N]``; rows of zeros have 0.
        moments: float32 ``[K, K]``: the inputs' second moments, up to a factor.
        bits: 7 or 8.
    """
    columns = weight.shape[1]
    top = np.float32((1 << (bits - 1)) - 1)
    order = np.argsort(-np.diagonal(moments), kind="stable")
    factor = _factor(moments, order)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    rest = np.ascontiguousarray(weight.T[order])  # [K, N]: a column is a row here, and stays in the cache
    codes = np.zeros((columns, len(weight)), np.float32)  # by source column, so that neighbours are found
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        errors = np.empty((stop - start, len(weight)), np.float32)
        for index in range(start, stop):
            column = int(order[index])
            partner = codes[column ^ 1] if column ^ 1 < columns else np.float32(0)
            code = np.rint(rest[index] * inverse)
            high = np.minimum(top, PAIR_LIMIT - np.maximum(partner, 0))
            low = -np.minimum(top, PAIR_LIMIT - np.maximum(-partner, 0))
            codes[column] = np.clip(code, low, high)
            error = (rest[index] - codes[column] * scales) / factor[index, index]
            rest[index + 1 : stop] -= factor[index, index + 1 : stop, None] * error
            errors[index - start] = error
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    return np.ascontiguousarray(codes.T).astype(np.int8)


def _factor(moments: FloatArray, order: np.typing.NDArray[np.intp]) -> FloatArray:
    """Return the upper Cholesky factor of the damped moments' inverse, float32 ``[K, K]``, in the given order."""
    damped = moments[np.ix_(order, order)].astype(np.float64)
    mean = float(np.mean(np.diagonal(damped)))
    damped[np.diag_indices_from(damped)] += DAMPING * mean if mean > 0 else 1.0
    lower = np.linalg.cholesky(np.linalg.inv(damped))
    # inverse = L L^T = U^T U with U = L^T: the upper factor that GPTQ walks along.
    upper: FloatArray = np.ascontiguousarray(lower.T).astype(np.float32)
    return upper


# ------------------------------------------------------------------------------------------------ block-wise weights


def carried(weight: FloatArray, grid: QuantizedRows, scheme: Scheme, factor: Feedback) -> ByteArray:
    """Return codes uint8 ``[N, blocks * block_size]`` of a weight under given scales and zero points.

    Args:
        weight: float32 ``[N, K]``, finite.
        grid: Its scales and zero points ``[N, blocks]``, and codes whose padding is taken over.
        scheme: Bits and block size (0: a block a row).
        factor: From :func:`feedback`.
    """
    rows, columns = weight.shape
    result = grid.codes.copy()
    if not weight.size:
        return result
    group = _Group.create(scheme, columns, factor)
    for start in range(0, rows, GROUP_ROWS):
        part = slice(start, min(start + GROUP_ROWS, rows))
        group.load(weight[part], grid.scales[part], None if grid.zero_points is None else grid.zero_points[part])
        _walk(group, 0, columns)
        result[part, :columns] = group.codes[:, : part.stop - start].T
    return result


def feedback(
    moments: FloatArray, damping: float = BLOCK_DAMPING, order: npt.NDArray[np.intp] | None = None
) -> Feedback:
    """Return how errors are carried on, and in which order.

    Args:
        moments: float32 ``[K, K]``: second moments up to a factor; of rank 0 to K.
        damping: Part of the mean moment (of channels that have any) added to each channel's. Raised tenfold, up to
            :data:`BLOCK_DAMPING_LIMIT`, if that leaves the matrix indefinite, as moments never do.
        order: int ``[K]``: the order of the columns; without it, those with the largest moments first.

    Raises:
        CompressError: A moment is not finite, one on the diagonal is negative, or no damping helps.
    """
    bad = first_nonfinite(moments)
    if bad is not None:
        raise CompressError(
            f"the inputs' second moments are not finite: moments[{bad[0]}, {bad[1]}] is {moments[bad]}",
            hint="look for a layer before this one whose weights or outputs overflow",
        )
    diagonal = np.diagonal(moments)
    if diagonal.size and float(diagonal.min()) < 0:
        worst = int(np.argmin(diagonal))
        raise CompressError(f"moments[{worst}, {worst}] is {diagonal[worst]}: a mean of squares cannot be negative")
    if order is None:
        order = np.argsort(-diagonal, kind="stable")
    while True:
        # Last first: the lower factor of the reversed matrix, reversed, is the upper one.
        lower = _damped(moments, order[::-1], damping)
        try:
            _factorize(lower)
            break
        except np.linalg.LinAlgError:
            if damping >= BLOCK_DAMPING_LIMIT:
                raise CompressError(
                    f"the inputs' second moments are not positive semidefinite, not even damped by {damping:g}",
                    hint="they must be a mean of x x^T; calibrate again",
                ) from None
            damping = min(damping * 10, BLOCK_DAMPING_LIMIT)
    pivots = np.diagonal(lower).copy()
    lower /= pivots
    gains = np.empty(lower.shape, np.float32)
    gains[...] = lower[::-1, ::-1]
    return Feedback(order, gains, pivots[::-1].astype(np.float32))


def _damped(moments: FloatArray, order: npt.NDArray[np.intp], damping: float) -> DoubleArray:
    """Return the moments in an order, damped; channels without moments stand alone, so that nothing is carried."""
    damped: DoubleArray = np.empty(moments.shape, np.float64)
    for start in range(0, len(order), GROUP_ROWS):
        damped[start : start + GROUP_ROWS] = moments[order[start : start + GROUP_ROWS]][:, order]
    diagonal = np.diagonal(damped).copy()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean()) if not dead.all() else 1.0
    damped[dead], damped[:, dead] = 0, 0
    damped[np.diag_indices_from(damped)] = np.where(dead, mean, diagonal) + damping * mean
    return damped


def _half(size: int) -> int:
    """Return the power of two that splits ``size`` nearest to its middle, from above."""
    return int(1 << ((size - 1).bit_length() - 1))


def _factorize(matrix: DoubleArray) -> None:
    """Replace the lower triangle of a positive definite ``[K, K]`` by its Cholesky factor, in place.

    In place, because NumPy's returns another copy (half a gigabyte at K = 8192), and by halves, because it then runs at
    the speed of a matrix product (K = 3072: 1.6 times LAPACK's).

    Raises:
        numpy.linalg.LinAlgError: It is not positive definite.
    """
    size = len(matrix)
    if size <= _LEAF_FACTOR:
        matrix[:] = np.linalg.cholesky(matrix)
        return
    half = _half(size)
    _factorize(matrix[:half, :half])
    _solve(matrix[half:, :half], matrix[:half, :half])
    _take_off(matrix[half:, half:], matrix[half:, :half])
    _factorize(matrix[half:, half:])


def _solve(right: DoubleArray, lower: DoubleArray) -> None:
    """Replace ``right`` ``[M, K]`` by X with ``X lower^T = right``."""
    size = len(lower)
    if size <= _LEAF_FACTOR:
        right[:] = right @ np.linalg.inv(lower).T
        return
    half = _half(size)
    _solve(right[:, :half], lower[:half, :half])
    right[:, half:] -= right[:, :half] @ lower[half:, :half].T
    _solve(right[:, half:], lower[half:, half:])


def _take_off(matrix: DoubleArray, factor: DoubleArray) -> None:
    """Subtract ``factor factor^T`` from the lower triangle of ``matrix`` ``[M, M]``."""
    size = len(matrix)
    if size <= _LEAF_UPDATE:
        matrix -= factor @ factor.T
        return
    half = _half(size)
    _take_off(matrix[:half, :half], factor[:half])
    matrix[half:, :half] -= factor[half:] @ factor[:half].T
    _take_off(matrix[half:, half:], factor[half:])


@dataclass(frozen=True)
class _Group:
    """The buffers that G = :data:`GROUP_ROWS` rows are rounded in; a column of the weight is a contiguous row here."""

    factor: Feedback
    columns: list[int]  # source column at each position
    block_size: int
    top: np.float32
    zero: np.float32  # of symmetric schemes
    errors: FloatArray  # [K, G] by position: the weight, and once a column is rounded, its error
    fed: FloatArray  # [K, G] by position: what is made up for
    codes: ByteArray  # [K, G] by source column
    scales: FloatArray  # [blocks, G]
    inverses: FloatArray  # [blocks, G]
    zeros: FloatArray  # [blocks, G]
    trial: FloatArray  # [G]

    @classmethod
    def create(cls, scheme: Scheme, columns: int, factor: Feedback) -> _Group:
        wide, narrow = (columns, GROUP_ROWS), (scheme.blocks(columns), GROUP_ROWS)
        return cls(
            factor=factor,
            columns=factor.order.tolist(),
            block_size=scheme.block_size or columns,
            top=np.float32((1 << scheme.bits) - 1),
            zero=np.float32(zero_code(scheme.bits)),
            errors=np.empty(wide, np.float32),
            fed=np.empty(wide, np.float32),
            codes=np.empty(wide, np.uint8),
            scales=np.empty(narrow, np.float32),
            inverses=np.empty(narrow, np.float32),
            zeros=np.empty(narrow, np.float32),
            trial=np.empty(GROUP_ROWS, np.float32),
        )

    def load(self, weight: FloatArray, scales: FloatArray, zeros: ByteArray | None) -> None:
        """Take rows in; absent ones are 0."""
        count = len(weight)
        self.errors[:, :count], self.errors[:, count:] = weight[:, self.factor.order].T, 0
        self.scales[:, :count], self.scales[:, count:] = scales.T, 0
        self.zeros[:, :count] = self.zero if zeros is None else zeros.T
        self.zeros[:, count:] = 0
        self.fed[:], self.inverses[:] = 0, 0
        np.divide(np.float32(1), self.scales, out=self.inverses, where=self.scales != 0)


def _walk(group: _Group, start: int, stop: int) -> None:
    """Round the columns at positions ``start .. stop``, whose ``fed`` holds what the columns before carry on."""
    if stop - start <= _LEAF_COLUMNS:
        _round_columns(group, start, stop)
        return
    half = start + _half(stop - start)
    _walk(group, start, half)
    group.fed[half:stop] += group.factor.gains[start:half, half:stop].T @ group.errors[start:half]
    _walk(group, half, stop)


def _round_columns(group: _Group, start: int, stop: int) -> None:
    """Do it column by column."""
    trial, gains = group.trial, group.factor.gains
    for position in range(start, stop):
        column = group.columns[position]
        block = column // group.block_size
        zero, error = group.zeros[block], group.errors[position]
        # The arithmetic of RoundToNearest, so that nothing to make up for gives its codes.
        np.add(error, group.fed[position], out=trial)
        np.multiply(trial, group.inverses[block], out=trial)
        np.rint(trial, out=trial)
        np.add(trial, zero, out=trial)
        np.maximum(trial, np.float32(0), out=trial)
        np.minimum(trial, group.top, out=trial)
        np.copyto(group.codes[column], trial, casting="unsafe")
        np.subtract(trial, zero, out=trial)
        np.multiply(trial, group.scales[block], out=trial)
        np.subtract(error, trial, out=error)
        if position + 1 < stop:
            group.fed[position + 1 : stop] += gains[position, position + 1 : stop, None] * error


@dataclass(frozen=True)
class _Known:
    moments: weakref.ref[Any]
    diagonal: FloatArray
    factor: Feedback


class _Factors:
    """The last moments' factor: a head of 50,000 rows comes in a dozen pieces, with the same array every time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: _Known | None = None

    def of(self, moments: FloatArray) -> Feedback:
        """Return the factor of an array, the last one's if it is the same one and its diagonal has not changed."""
        with self._lock:
            last = self._last
            if (
                last is not None
                and last.moments() is moments
                and np.array_equal(last.diagonal, np.diagonal(moments), equal_nan=False)
            ):
                return last.factor
            self._last = last = None  # two of them may be half a gigabyte
            factor = feedback(moments)
            self._last = _Known(weakref.ref(moments, self._forget), np.diagonal(moments).copy(), factor)
            return factor

    def _forget(self, reference: weakref.ref[Any]) -> None:
        """Free the factor with its moments; no lock, which the thread that this interrupts may hold."""
        last = self._last
        if last is not None and last.moments is reference:
            self._last = None
