"""Removes units at random: what every other algorithm has to beat."""

from __future__ import annotations

import numpy as np

from compress.contracts import Removal, Units
from compress.prune._units import lowest_first


class Random:
    """Draws a score for every unit."""

    name = "random"
    reads_text = False

    def remove(self, units: Units, count: int, *, seed: int) -> Removal:
        """See :class:`compress.contracts.Pruner`."""
        return lowest_first(np.random.default_rng(seed).random(units.count), units, count)


PRUNER = Random()
