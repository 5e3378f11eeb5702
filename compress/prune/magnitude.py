"""Removes the units of least weight: squares of everything that is coupled to a unit, summed, without any text.

Source: Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710, for a unit's producers and reader at
once.
"""

from __future__ import annotations

import numpy as np

from compress.contracts import Removal, Units
from compress.prune._units import by_unit, lowest_first


class Magnitude:
    """Scores a unit by the squares of the weights that write it and of those that read it."""

    name = "magnitude"
    reads_text = False

    def remove(self, units: Units, count: int, *, seed: int) -> Removal:
        """See :class:`compress.contracts.Pruner`."""
        read = np.square(units.weight, dtype=np.float64).sum(axis=0)
        return lowest_first(by_unit(read + units.produced, units.size), units, count)


PRUNER = Magnitude()
