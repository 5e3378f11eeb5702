"""How far stored weights are from what the quantizer was given, on a few rows of each.

The relative error of a weight is ``||W_hat - W||_F / ||W||_F`` over at most :data:`SAMPLED_ROWS` of its rows, evenly
spaced: the first and the last among them, all of a smaller weight. ``W_hat`` is unpacked from the bytes that are
written, so that a mistake in packing shows as an error and not as a surprise at run time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from compress.contracts import FloatArray

SAMPLED_ROWS = 64
Rows = list[list[float]]


def sampled(rows: int, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Return which of the rows ``[start, stop)`` of a weight of ``rows`` rows are compared, counted from ``start``."""
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, SAMPLED_ROWS)).round().astype(np.int64))
    return chosen[(chosen >= start) & (chosen < stop)] - start


class StoredErrors:
    """Collects errors while weights are written, in any order and from several threads."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[int, tuple[float, float]]] = {}
        self._lock = threading.Lock()

    def note(self, name: str, places: npt.NDArray[np.int64], given: FloatArray, stored: FloatArray) -> None:
        """Compare rows of a weight, float32 ``[rows, columns]`` each, which stand at ``places`` in it."""
        wide = given.astype(np.float64)
        squares, lost = (wide**2).sum(axis=1), ((stored - wide) ** 2).sum(axis=1)
        pairs = zip(lost.tolist(), squares.tolist(), strict=True)
        with self._lock:
            self._rows.setdefault(name, {}).update(zip(places.tolist(), pairs, strict=True))

    def names(self) -> list[str]:
        """Return the weights that something was noted of."""
        with self._lock:
            return sorted(self._rows)

    def rows(self, name: str) -> Rows:
        """Return what was noted of a weight: ``[row, squared error, squared norm]``, in the order of the rows."""
        with self._lock:
            return [[row, *pair] for row, pair in sorted(self._rows.get(name, {}).items())]

    def restore(self, known: Mapping[str, Rows]) -> None:
        """Take what :meth:`rows` returned of some weights, in an earlier run for instance."""
        with self._lock:
            for name, rows in known.items():
                self._rows[name] = {int(row): (lost, power) for row, lost, power in rows}

    def relative(self) -> dict[str, float]:
        """Return the relative error of each weight by its name, in four digits; a weight of zeros has none.

        Sums run over rows in their order: pieces, and threads, do not change a digit.
        """
        found = {}
        for name, rows in sorted(self._rows.items()):
            lost, power = (sum(rows[row][part] for row in sorted(rows)) for part in (0, 1))
            if power > 0:
                found[name] = float(f"{(lost / power) ** 0.5:.4g}")
        return found
