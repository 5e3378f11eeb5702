"""What a linear becomes when some of its inputs are gone: the weights that come nearest to what it used to give.

Ridge least squares in closed form, drawn towards the weights that were there instead of towards zero: with X the inputs
that are left ``[T, K]``, Y what is wanted of the linear ``[T, N]``, W its weights ``[N, K]`` and tokens that count
``c_t``, the change D minimises ``sum_t c_t |y_t - (W + D) x_t|^2 + lambda |D|^2``:

    D = R^T C X (X^T C X + lambda I)^-1,    R = Y - X W^T

``lambda`` is a share of the mean of the diagonal of ``X^T C X``, the one of :data:`SHARES` that predicts tokens best
which it was not fitted on. A bias is fitted with it where there is one, by taking means away first.

Source: Hoerl and Kennard, "Ridge Regression", Technometrics 12 (1970); for pruned channels, He et al., "Channel Pruning
for Accelerating Very Deep Neural Networks", arXiv 1707.06168.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.contracts import FloatArray, IntArray
from compress.errors import CompressError
from compress.prune._positive import Floats, Map, kind, solve

SHARES = (1e-3, 1e-2, 1e-1, 1.0)
#: Every so many tokens one is kept from the fit to choose the share.
_HELD_OUT = 5
#: Columns of ``X^T C X`` that one thread computes, and tokens that are summed in float32.
_BAND, _TOKENS = 512, 1024

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Refitted:
    """New weights ``[N, K]`` and bias ``[N]``; ``before`` and ``after``: share of Y's power missed on held-out tokens.

    ``share`` is the chosen one of :data:`SHARES`, 0 where no change was better.
    """

    weight: FloatArray
    bias: FloatArray | None
    share: float
    before: float
    after: float


def refit(
    inputs: FloatArray,
    wanted: FloatArray,
    weight: FloatArray,
    bias: FloatArray | None,
    counts: FloatArray,
    run: Map,
) -> Refitted:
    """Fit a linear to what is wanted of it.

    Args:
        inputs: float32 ``[T, K]``.
        wanted: float32 ``[T, N]``, bias included; overwritten.
        weight: float32 ``[N, K]`` as it is.
        bias: float32 ``[N]`` as it is, ``None`` for a linear without one.
        counts: float32 ``[T]``: how much every token counts; 0 for padding.
        run: Maps work over pieces.
    """
    held = np.zeros(len(inputs), bool)
    held[_HELD_OUT - 1 :: _HELD_OUT] = True
    fitted, judged = counts * ~held, counts * held
    residual = wanted
    if bias is not None:
        residual -= bias
    power = _power(residual[held], judged[held])

    def miss(rows: slice) -> None:
        residual[rows] -= inputs[rows] @ weight.T

    run(miss, [slice(start, start + _TOKENS) for start in range(0, len(inputs), _TOKENS)])
    sums = _sums(inputs, residual, fitted, bias is not None, run)
    before = _power(residual, judged)
    best, error = 0.0, before
    for share in SHARES:
        found = _solve(sums, share, bias is not None, run)
        if found is None:
            continue
        change, shift = found
        missed = _power(residual[held] - inputs[held] @ change.T - shift, judged[held])
        del change, found
        if missed >= error and best:
            break  # stronger ridges only come nearer to no change
        if missed < error:
            best, error = share, missed
    if not best:
        return Refitted(weight, bias, 0.0, before / power, before / power)
    _sums(inputs, residual, judged, bias is not None, run, sums)
    found = _solve(sums, best, bias is not None, run)
    assert found is not None, "more tokens do not make it singular"
    change, shift = found
    return Refitted(weight + change, None if bias is None else bias + shift, best, before / power, error / power)


def refit_moments(weight: FloatArray, moments: FloatArray, kept: IntArray, share: float = 1e-2) -> FloatArray:
    """Return the weights ``[N, kept]`` nearest to ``weight`` ``[N, K]`` on inputs of these second moments ``[K, K]``.

    The same fit where inputs are only known by their moments: ``D = W_gone H_gone,kept (H_kept,kept + lambda I)^-1``.
    """
    gone = np.setdiff1d(np.arange(weight.shape[1]), kept)
    inner = moments[np.ix_(kept, kept)].astype(np.float64)
    inner[np.diag_indices_from(inner)] += share * max(float(np.diagonal(inner).mean()), 1e-30)
    change = weight[:, gone].astype(np.float64) @ moments[np.ix_(gone, kept)].astype(np.float64)
    if not solve(inner, change, lambda work, rows: [work(row) for row in rows]):
        raise CompressError(
            "second moments of the text's activations have no ridge solution", hint="another --calibration-text"
        )
    return (weight[:, kept] + change).astype(np.float32)


@dataclass
class _Sums:
    """``X^T C X``, ``R^T C X`` and the weighted sums of X, R and 1; float64, products of very wide X float32."""

    gram: Floats
    cross: Floats
    inputs: Doubles
    residuals: Doubles
    count: float

    @classmethod
    def none(cls, columns: int, outputs: int) -> _Sums:
        """Return the sums over no token."""
        gram, cross = np.zeros((columns, columns), kind(columns)), np.zeros((outputs, columns), kind(columns))
        return cls(gram, cross, np.zeros(columns), np.zeros(outputs), 0.0)


def moments(inputs: FloatArray, counts: FloatArray, run: Map) -> FloatArray:
    """Return the mean over tokens of ``x x^T``, float32 ``[K, K]``, of inputs ``[T, K]`` that count ``[T]``."""
    sums = _Sums.none(inputs.shape[1], 0)
    _add_products(sums, inputs, None, counts, run)
    sums.gram /= max(float(counts.sum(dtype=np.float64)), 1e-30)
    return sums.gram.astype(np.float32, copy=False)


def _add_products(sums: _Sums, inputs: FloatArray, residual: FloatArray | None, counts: FloatArray, run: Map) -> None:
    """Add ``X^T C X`` and ``R^T C X``; each band of rows is one thread's, so that sums have one order."""
    rows, columns = np.flatnonzero(counts), inputs.shape[1]

    def band(start: int) -> None:
        stop = min(start + _BAND, columns)
        for first in range(0, len(rows), _TOKENS):
            some = rows[first : first + _TOKENS]
            left = (inputs[some, start:stop] * counts[some, None]).T
            sums.gram[start:stop, start:] += left @ inputs[some, start:]
            if residual is not None:
                sums.cross[:, start:stop] += (left @ residual[some]).T

    run(band, range(0, columns, _BAND))
    for start in range(0, columns, _BAND):
        stop = min(start + _BAND, columns)
        sums.gram[start:, start:stop] = sums.gram[start:stop, start:].T


def _sums(
    inputs: FloatArray,
    residual: FloatArray,
    counts: FloatArray,
    centred: bool,
    run: Map,
    known: _Sums | None = None,
) -> _Sums:
    """Return the sums over tokens, added to those that are known already."""
    sums = _Sums.none(inputs.shape[1], residual.shape[1]) if known is None else known
    _add_products(sums, inputs, residual, counts, run)
    rows = np.flatnonzero(counts)
    weights = counts[rows].astype(np.float64)
    sums.count += float(weights.sum())
    if centred:
        # float64 sums of float32 products: a token at a time would take as long as the products.
        sums.inputs += weights @ inputs[rows]
        sums.residuals += weights @ residual[rows]
    return sums


def _solve(sums: _Sums, share: float, centred: bool, run: Map) -> tuple[FloatArray, FloatArray] | None:
    """Return the change of weights ``[N, K]`` and of the bias ``[N]``; ``None`` where float32 cannot solve for it."""
    total = max(sums.count, 1e-30)
    gram, change = sums.gram.copy(), sums.cross.copy()
    means, offsets = sums.inputs / total, sums.residuals / total
    if centred:
        gram -= np.outer(means, sums.inputs)
        change -= np.outer(offsets, sums.inputs)
    gram[np.diag_indices_from(gram)] += share * max(float(np.diagonal(gram).mean()), 1e-30)
    if not solve(gram, change, run):
        return None
    shift = offsets - change @ means if centred else np.zeros(len(change))
    return change.astype(np.float32, copy=False), shift.astype(np.float32)


def _power(values: FloatArray, counts: FloatArray) -> float:
    rows = np.einsum("tn,tn->t", values, values, dtype=np.float64)
    return max(float(rows @ counts), 1e-30)
