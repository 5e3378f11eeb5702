"""Removes the run of neighbouring blocks across which the residual stream turns by the smallest angle.

Source: Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv 2403.17887.
"""

from __future__ import annotations

import numpy as np

from compress.contracts import FloatArray, IntArray
from compress.prune._states import cosines


class AngularDistance:
    """Scores every run of ``count`` blocks by the mean angle between what goes in and what comes out."""

    name = "angular-distance"

    def remove(self, states: FloatArray, count: int) -> IntArray:
        """See :class:`compress.contracts.DepthPruner`."""
        starts = range(len(states) - count)
        angles = [np.arccos(np.clip(cosines(states[at], states[at + count]), -1, 1)).mean() for at in starts]
        return np.arange(count) + int(np.argmin(angles))


DEPTH_PRUNER = AngularDistance()
