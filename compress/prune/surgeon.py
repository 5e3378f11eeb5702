"""Removes the units whose loss the others can make up for best: structured Optimal Brain Surgeon.

With H the inputs' second moments and the other weights free to change, removing the channels S of ``y = W x`` costs
``tr(W_S (H^-1_SS)^-1 W_S^T)`` of the outputs' power. Units go one after the other: after each, W and H^-1 are what the
best correction leaves of them, so that of two channels which say the same only one is removed.

Many units of one channel are removed a few at a time (a 64th of those that are left), which Kurtic et al. find to cost
little; units of several channels one by one.

Source: Kurtic et al., "ZipLM", arXiv 2302.04089, section 3.1; Hassibi and Stork, "Second order derivatives for network
pruning: Optimal Brain Surgeon", NIPS 1992.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from compress.contracts import IntArray, Removal, Units
from compress.errors import CompressError
from compress.prune._positive import Floats, invert, kind, pieces, selected
from compress.prune._units import Quota, output_power

#: Of the mean of H's diagonal, added to it: channels that the text never used have no inverse otherwise.
DAMPING = 1e-2
#: Single channels that are removed at once: this part of those that are left.
_AT_ONCE = 64


class Surgeon:
    """Scores a unit by what its removal costs after the best correction."""

    name = "surgeon"
    reads_text = True

    def remove(self, units: Units, count: int, *, seed: int) -> Removal:
        """See :class:`compress.contracts.Pruner`."""
        assert units.moments is not None, "this algorithm reads a text"
        state = _State(units)
        quota = Quota(units, count)
        order: list[int] = []
        losses = [0.0]
        while len(order) < count:
            scores = state.scores()
            scores[~quota.open(state.units)] = np.inf
            most = max(1, (units.count - len(order)) // _AT_ONCE) if units.size == 1 else 1
            places = np.argsort(scores, kind="stable")[: min(most, count - len(order))]
            taken = np.array(
                [place for place in places if np.isfinite(scores[place]) and quota.take(int(state.units[place]))]
            )
            order += state.units[taken].tolist()
            lost = state.eliminate(taken)
            losses += [losses[-1] + lost * (index + 1) / len(taken) for index in range(len(taken))]
        return Removal(np.array(order, np.int64), np.array(losses) / max(state.power, 1e-30))


class _State:
    """W and H^-1 of ``units``: those that are left, and some that are gone; ``power`` is the outputs' with all."""

    def __init__(self, units: Units) -> None:
        assert units.moments is not None
        self.power = output_power(units)
        self.size, self.units = units.size, np.arange(units.count)
        self._there = np.ones(units.count, bool)
        self._inverse: Floats = _inverse(units.moments)
        # Scores only need W^T W's blocks; W itself is smaller than that where a block has fewer outputs than inputs.
        self._weight: Floats = units.weight.astype(self._inverse.dtype, order="C")  # the caller's stays as it is

    def scores(self) -> npt.NDArray[np.float64]:
        """Return what each unit's removal costs, float64 ``[units]``; infinite for those that are gone."""
        found = np.full(len(self.units), np.inf)
        there = np.flatnonzero(self._there)
        if self.size == 1:
            power = np.einsum("nk,nk->k", self._weight, self._weight, dtype=np.float64)
            found[there] = power[there] / np.diagonal(self._inverse)[there]
        else:
            found[there] = [self._cost(self._channels(np.array([place]))) for place in there]
        return found

    def eliminate(self, places: IntArray) -> float:
        """Remove the units at these places of what is left; return the loss."""
        gone = self._channels(places)
        cost = self._cost(gone)
        correction = np.linalg.solve(self._inverse[np.ix_(gone, gone)], self._inverse[gone])
        for matrix in (self._weight, self._inverse):
            known = matrix[:, gone]
            for rows in pieces(len(matrix)):
                matrix[rows] -= known[rows] @ correction
        self._there[places] = False
        if 2 * np.count_nonzero(self._there) <= len(self._there):
            self._compact()
        return cost

    def _compact(self) -> None:
        """Leave out the channels that are gone, in the memory of what there is: before that they are zeros."""
        left = self._channels(np.flatnonzero(self._there))
        self._weight = selected(self._weight, np.arange(len(self._weight)), left)
        self._inverse = selected(self._inverse, left, left)
        self.units, self._there = self.units[self._there], np.ones(np.count_nonzero(self._there), bool)

    def _channels(self, places: IntArray) -> IntArray:
        channels: IntArray = (places[:, None] * self.size + np.arange(self.size)).reshape(-1)
        return channels

    def _cost(self, channels: IntArray) -> float:
        weight = self._weight[:, channels]
        solved = np.linalg.solve(self._inverse[np.ix_(channels, channels)], weight.T)
        return float(np.einsum("kn,nk->", solved, weight, dtype=np.float64))


def _inverse(moments: Floats) -> Floats:
    """Return the inverse of damped moments, in their memory where they are of the kind that it is kept in."""
    inverse = np.ascontiguousarray(moments, kind(len(moments)))
    inverse[np.diag_indices_from(inverse)] += DAMPING * max(float(np.diagonal(moments).mean(dtype=np.float64)), 1e-30)
    if not invert(inverse):
        raise CompressError(
            "second moments of the text's activations are too near to singular for surgeon",
            hint="prune.algorithm=activation, or another --calibration-text",
        )
    return inverse


PRUNER = Surgeon()
