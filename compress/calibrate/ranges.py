"""Ranges of 8-bit inputs that are fixed by calibration, for providers that do not find them at run time.

The extremes of a calibration set are a bad range: one outlier costs all other values their resolution. ``percentile``
cuts off a share of the values at either end; ``entropy`` picks the range whose 8-bit histogram is nearest, in KL
divergence, to that of the values (Migacz, "8-bit Inference with TensorRT", 2017).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Method = Literal["percentile", "entropy", "minmax"]
BINS = 2048
#: Share of values cut off at each end.
TAIL = 5e-5
_LEVELS = 128
_CANDIDATES = 128


def choose_range(histogram: npt.NDArray[np.int64], low: float, high: float, method: Method) -> tuple[float, float]:
    """Return the range of values to represent; it contains 0.

    Args:
        histogram: Counts int64 ``[bins]`` of equally wide bins from ``low`` to ``high``.
        low: Least value.
        high: Greatest value.
        method: How to choose.
    """
    edges = np.linspace(low, high, len(histogram) + 1)
    if method == "minmax" or histogram.sum() == 0 or high <= low:
        first, last = low, high
    elif method == "percentile":
        share = np.cumsum(histogram) / histogram.sum()
        first = float(edges[int(np.searchsorted(share, TAIL, side="right"))])
        last = float(edges[min(int(np.searchsorted(share, 1 - TAIL, side="left")) + 1, len(edges) - 1)])
    else:
        first, last = _by_entropy(histogram, edges)
    return min(first, 0.0), max(last, 0.0)


def scale_and_zero_point(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Return scale and zero point of unsigned bytes for a range that contains 0."""
    scale = np.float32((high - low) / 255)
    if not scale > 0:  # nothing but zeros, or what float32 has no scale for
        return np.float32(1), np.uint8(0)
    return scale, np.uint8(np.clip(round(-low / float(scale)), 0, 255))


def _by_entropy(histogram: npt.NDArray[np.int64], edges: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Try ranges that keep a growing share of the bins around the median; keep the one with the least divergence."""
    counts = histogram.astype(np.float64)
    middle = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    best = (np.inf, 0, len(counts))
    for step in range(1, _CANDIDATES + 1):
        share = step / _CANDIDATES
        first, last = round(middle * (1 - share)), round(middle + (len(counts) - middle) * share)
        if last - first < _LEVELS:
            continue
        divergence = _divergence(counts, first, last)
        if divergence < best[0]:
            best = (divergence, first, last)
    return float(edges[best[1]]), float(edges[best[2]])


def _divergence(counts: npt.NDArray[np.float64], first: int, last: int) -> float:
    """Return KL(values || values rounded to :data:`_LEVELS` levels of the range), what lies outside at its ends."""
    inside = counts[first:last].copy()
    inside[0] += counts[:first].sum()
    inside[-1] += counts[last:].sum()
    kept = counts[first:last]
    level = np.arange(last - first) * _LEVELS // (last - first)
    sums = np.bincount(level, kept, _LEVELS)
    filled = np.bincount(level, kept > 0, _LEVELS)
    rounded = np.where(kept > 0, (sums / np.maximum(filled, 1))[level], 0)
    p, q = inside / inside.sum(), rounded / max(rounded.sum(), 1e-30)
    where = p > 0
    return float(np.sum(p[where] * np.log(p[where] / np.maximum(q[where], 1e-12))))
