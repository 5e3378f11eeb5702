"""Signed bytes for integer products: one scale an output channel, and no sum that overflows on the way.

``y = x W^T`` with x in unsigned and W in signed bytes. Processors with VNNI (or its ARM counterparts) add four products
in 32 bits. AVX2 without it has ``vpmaddubsw``, which adds two *neighbouring* products in 16 bits and clips: 255 * 127
twice is 64,770, 32,767 fits. The usual remedy, 7-bit weights, doubles every weight's error. Here only the pairs that
could overflow are brought back: neighbours ``(2i, 2i + 1)`` of one sign keep ``|a| + |b| <= 128``; of two signs they
cannot overflow. Few pairs are that large when the largest weight is 127, and the same integers come out everywhere.

The scale is searched: a smaller largest code clips fewer pairs and rounds the others more coarsely.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from compress.contracts import FloatArray, QuantizedRows

SignedArray = npt.NDArray[np.int8]

#: Largest sum of two codes' magnitudes: 255 times it fits into 16 bits.
PAIR_LIMIT = 128
#: What the largest weight of a channel becomes, for each number of bits, in the order that decides ties.
_LARGEST: dict[int, tuple[float, ...]] = {
    8: (127.0, 122.0, 117.0, 112.0, 106.0, 100.0, 94.0, 88.0, 82.0, 76.0, 70.0, 64.0),
    7: (63.0, 65.0, 67.0, 70.0),
}
_CHUNK = 1 << 18
#: Rows without a greater magnitude count as zeros: the reciprocal of their scale would overflow float32.
_NEGLIGIBLE = np.float32(1e-36)


def quantize_channels(
    weight: FloatArray, bits: int, importance: FloatArray | None = None
) -> tuple[SignedArray, FloatArray]:
    """Quantize every row by itself.

    Args:
        weight: float32 ``[N, K]``, finite.
        bits: 8, or 7 for codes that could never overflow.
        importance: float32 ``[K]``, not negative: how much an input channel's error counts.

    Returns:
        int8 codes ``[N, K]`` and float32 scales ``[N]``; a row of zeros (below 1e-36 throughout) has scale 0.

    Raises:
        KeyError: ``bits`` is neither.
    """
    rows, columns = weight.shape
    codes, scales = np.zeros((rows, columns), np.int8), np.zeros(rows, np.float32)
    step = max(1, _CHUNK // max(columns, 1))
    weights = None
    if importance is not None:
        weights = (importance / max(float(importance.max(initial=0)), 1e-30)).astype(np.float32)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        codes[part], scales[part] = _search(weight[part], _LARGEST[bits], float((1 << (bits - 1)) - 1), weights)
    return codes, scales


def unsigned(codes: SignedArray, scales: FloatArray, bits: int) -> QuantizedRows:
    """Return signed codes ``[N, K]`` and scales ``[N]`` as every quantizer does: shifted to the middle of the range."""
    shifted = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    return QuantizedRows(shifted, scales[:, None], None)


def bring_pairs_back(codes: FloatArray) -> FloatArray:
    """Bring neighbours of one sign to a sum of at most :data:`PAIR_LIMIT`, each giving half of the excess.

    Args:
        codes: Whole numbers float32 ``[N, K]``, of magnitude 127 at most; changed in place and returned.
    """
    even = codes[:, 0 : codes.shape[1] // 2 * 2 : 2]
    odd = codes[:, 1::2]
    excess = np.where(even * odd > 0, np.abs(even) + np.abs(odd) - PAIR_LIMIT, 0)
    np.maximum(excess, 0, out=excess)
    half = np.floor(excess / 2)
    even -= np.sign(even) * half
    odd -= np.sign(odd) * (excess - half)
    return codes


def _search(
    weight: FloatArray, candidates: tuple[float, ...], top: float, importance: FloatArray | None
) -> tuple[SignedArray, FloatArray]:
    largest = np.abs(weight).max(axis=1, initial=0).astype(np.float32)
    largest[largest < _NEGLIGIBLE] = 0
    best = np.full(len(weight), np.inf, np.float32)
    codes, scales = np.zeros(weight.shape, np.int8), np.zeros(len(weight), np.float32)
    exact, trial = np.empty_like(weight), np.empty_like(weight)
    for candidate in candidates:
        scale = largest / np.float32(candidate)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
        np.multiply(weight, inverse[:, None], out=exact)
        np.rint(exact, out=trial)
        np.clip(trial, -top, top, out=trial)
        bring_pairs_back(trial)
        # In units of the largest weight: huge and tiny rows meet the same arithmetic. No BLAS: its sums depend on
        # threads.
        error = np.square(np.subtract(exact, trial, out=exact), out=exact)
        if importance is not None:
            error *= importance
        loss = error.sum(axis=1) / np.float32(candidate * candidate)
        better = loss < best
        best[better], scales[better] = loss[better], scale[better]
        codes[better] = trial[better].astype(np.int8)
    return codes, scales
