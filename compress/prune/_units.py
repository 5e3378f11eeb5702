"""What the algorithms share: scores a unit, and an order that takes equally many of every class."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from compress.contracts import IntArray, Removal, Units
from compress.prune._positive import pieces

Scores = npt.NDArray[np.float64]


def by_unit(channels: npt.NDArray[np.floating], size: int) -> Scores:
    """Return sums over each unit's channels, float64 ``[units]``, of ``channels`` ``[K]``."""
    found: Scores = channels.astype(np.float64).reshape(-1, size).sum(axis=1)
    return found


def output_power(units: Units) -> float:
    """Return the power of the reading linear's outputs while all units are there: ``tr(W H W^T)``."""
    assert units.moments is not None
    rows = (units.weight[some] for some in pieces(len(units.weight)))  # no second array of the weight's size
    return sum(float(np.einsum("nk,nk->", part @ units.moments, part, dtype=np.float64)) for part in rows)


def lowest_first(scores: Scores, units: Units, count: int) -> Removal:
    """Remove the ``count`` units of the lowest scores, equally many of every class; losses are unknown."""
    order = np.argsort(scores, kind="stable")
    allowed = Quota(units, count)
    chosen = [int(unit) for unit in order if allowed.take(int(unit))]
    return Removal(np.array(chosen, np.int64), np.full(count + 1, np.nan))


class Quota:
    """How many units of every class may still be removed."""

    def __init__(self, units: Units, count: int) -> None:
        self._class: IntArray = np.zeros(units.count, np.int64) if units.classes is None else units.classes
        kinds = np.unique(self._class)
        if count % len(kinds) or not 0 <= count < units.count:
            raise ValueError(f"{count} of {units.count} units of {len(kinds)} classes")
        self._left = dict.fromkeys(kinds.tolist(), count // len(kinds))

    def take(self, unit: int) -> bool:
        """Return whether the unit may go, and count it."""
        kind = int(self._class[unit])
        if not self._left[kind]:
            return False
        self._left[kind] -= 1
        return True

    def open(self, remaining: IntArray) -> npt.NDArray[np.bool_]:
        """Return which of the remaining units may go."""
        allowed = np.array([kind for kind, left in self._left.items() if left], np.int64)
        return np.isin(self._class[remaining], allowed)
