"""Removes the blocks that turn the residual stream least: one minus the cosine between what goes in and what comes out.

Source: Men et al., "ShortGPT", arXiv 2403.03853.
"""

from __future__ import annotations

import numpy as np

from compress.contracts import FloatArray, IntArray
from compress.prune._states import cosines


class BlockInfluence:
    """Scores every block alone."""

    name = "block-influence"

    def remove(self, states: FloatArray, count: int) -> IntArray:
        """See :class:`compress.contracts.DepthPruner`."""
        influence = np.array([1 - cosines(*pair).mean() for pair in zip(states, states[1:], strict=False)])
        return np.sort(np.argsort(influence, kind="stable")[:count])


DEPTH_PRUNER = BlockInfluence()
