"""What removing parts would cost, predicted from one pass over the source: a curve a kind, in one unit.

The unit is the mean square of what a block's residual stream would miss, as a share of that stream's own power,
summed over blocks. Neurons and heads are charged what :mod:`compress.prune.surgeon` finds the best correction to
leave; a block is charged the whole change that it makes. The sum ranks mixes of widths, heads and depth; how good one
is, is measured.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from compress.contracts import FloatArray, Units
from compress.prune._units import output_power
from compress.prune.surgeon import PRUNER as SURGEON

#: Of the neurons, this share stays at least: what is left of less is another model.
_LEAST = 8

Curve = Mapping[int, float]


def of_units(units: Units, scale: float, least: int) -> dict[int, float]:
    """Return what is lost by how many units stay, down to ``least``.

    Args:
        units: Of one block.
        scale: Power of the stream that a power of the reading linear's outputs is a share of, inverted.
        least: How many units stay at least.
    """
    power = output_power(units)
    lost = SURGEON.remove(units, units.count - least, seed=0).losses * power * scale
    return {units.count - removed: float(value) for removed, value in enumerate(lost)}


def least_neurons(count: int) -> int:
    """Return how many of a block's neurons stay at least."""
    return max(1, count // _LEAST)


def summed(curves: list[dict[int, float]]) -> dict[int, float]:
    """Return the sum of the blocks' curves over the sizes that all of them have."""
    sizes = set.intersection(*(set(curve) for curve in curves))
    return {size: sum(curve[size] for curve in curves) for size in sorted(sizes)}


def of_depth(states: FloatArray, removed: Mapping[int, npt.NDArray[np.int64]]) -> dict[int, float]:
    """Return what is lost by how many blocks stay.

    Args:
        states: float32 ``[blocks + 1, tokens, hidden]``.
        removed: The blocks that go, by how many go.
    """
    before, after = states[:-1].astype(np.float64), states[1:].astype(np.float64)
    change = (np.square(after - before).sum(axis=2) / np.maximum(np.square(after).sum(axis=2), 1e-30)).mean(axis=1)
    blocks = len(change)
    return {blocks: 0.0, **{blocks - count: float(change[gone].sum()) for count, gone in removed.items()}}
