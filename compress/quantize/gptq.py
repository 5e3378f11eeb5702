"""GPTQ: each weight's rounding error is made up for by the weights that are rounded after it.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023. With H the
second moments of a linear's inputs and U the upper Cholesky factor of H's inverse, a column is rounded and its error
``(w - q) / U[k, k]`` taken off the columns behind it along ``U[k]``. Columns with the largest moments go first.

Here for integer products: the scale of an output channel is searched beforehand, and a code may not overflow together
with its neighbour (:mod:`compress.quantize.integer`). H is damped by half its mean diagonal: moments come from a
hundred texts, and an error shifted onto a channel that was silent there is no gain elsewhere. Weights that are looked
up or multiplied in blocks are rounded to nearest.
"""

from __future__ import annotations

import numpy as np

from compress.contracts import FloatArray, QuantizedRows, ScaleFormat, Scheme
from compress.quantize.integer import PAIR_LIMIT, SignedArray, quantize_channels, unsigned
from compress.quantize.round_to_nearest import RoundToNearest
from compress.quantize.scheme import validate_scheme

DAMPING = 0.5
_BLOCK = 64


class Gptq:
    """GPTQ where the moments of the inputs are known, round-to-nearest elsewhere."""

    name = "gptq"

    def __init__(self) -> None:
        self._nearest = RoundToNearest()

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
        (:func:`compress.weights.write_weights` does).
        """
        if moments is None or scheme.activations == "none":
            return self._nearest.quantize(weight, scheme, importance, scale_format=scale_format)
        validate_scheme(scheme)
        _, scales = quantize_channels(weight, scheme.bits, np.ascontiguousarray(np.diagonal(moments)))
        return unsigned(compensated(weight, scales, moments, scheme.bits), scales, scheme.bits)


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
