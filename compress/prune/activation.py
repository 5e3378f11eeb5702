"""Removes the units that add least to the reading linear's outputs, each alone: Wanda's measure, a unit at a time.

A channel's share of the outputs' power is ``|W[:, k]|^2 E[x_k^2]``; a unit's is the sum over its channels.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695, whose score
of a single weight is ``|W[n, k]| sqrt(E[x_k^2])``; An et al., "Fluctuation-based Adaptive Structured Pruning", arXiv
2312.11983, for whole channels.
"""

from __future__ import annotations

import numpy as np

from compress.contracts import Removal, Units
from compress.prune._units import by_unit, lowest_first


class Activation:
    """Scores a unit by the power that its channels give to the outputs."""

    name = "activation"
    reads_text = True

    def remove(self, units: Units, count: int, *, seed: int) -> Removal:
        """See :class:`compress.contracts.Pruner`."""
        assert units.moments is not None, "this algorithm reads a text"
        read = np.square(units.weight, dtype=np.float64).sum(axis=0)
        return lowest_first(by_unit(read * np.diagonal(units.moments), units.size), units, count)


PRUNER = Activation()
