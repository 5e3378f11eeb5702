"""How much of each kind to remove: the mix of width, heads and depth that costs the least for a wanted speedup.

Requires what each kind is predicted to cost (a curve a kind, from the calibration pass) and how long a model of given
sizes takes (:mod:`compress.latency`); ensures that no other mix of the offered sizes is predicted to be better.

**Losses add up.** A mix's loss is taken to be the sum of its parts'. Neurons of a block that is removed altogether are
counted twice, which errs on the side of caution. The sum says which mix is better; how good it is, is measured:
:func:`most_within` finds the largest amounts that keep a limit by a few measurements along the frontier.

The search looks at every mix. There are some thousands: FFN widths in whole kernel blocks, whole groups of heads that
share keys and values, and blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compress.errors import BudgetError, UsageError
from compress.prune.amounts import Amounts

#: Relative slack of a comparison of times: sums of the same numbers in another order.
_SLACK = 1e-9
#: Measurements of a pruned model are minutes each.
MEASUREMENTS = 5

Fits = Callable[[Amounts], bool]


@dataclass(frozen=True)
class Curves:
    """Predicted loss by what is kept: ``inner`` neurons (all blocks together), key/value ``heads``, ``layers``.

    Sizes between two given ones are interpolated; below the smallest nothing is known, so nothing is offered. All that
    there is costs nothing and need not be given.
    """

    inner: Mapping[int, float]
    heads: Mapping[int, float]
    layers: Mapping[int, float]


@dataclass(frozen=True)
class Steps:
    """Which sizes are offered: multiples of these, and the full size.

    ``inner``: a width that is not whole kernel blocks gains less than it loses, and quantized blocks have to be whole.
    ``heads`` counts key/value heads with all the query heads that share them.
    """

    inner: int = 128
    heads: int = 1
    layers: int = 1


@dataclass(frozen=True)
class Mix:
    """A mix of sizes: its predicted loss, seconds of a run, and how many times faster than the full model that is."""

    amounts: Amounts
    loss: float
    seconds: float
    speedup: float


@dataclass(frozen=True)
class Choice:
    """The best mix, and the frontier: mixes that none is better than in both loss and time, slowest first."""

    best: Mix
    frontier: tuple[Mix, ...]


def candidates(curves: Curves, full: Amounts, steps: Steps, fits: Fits | None = None) -> list[Amounts]:
    """Return every mix that is offered, the full model first; ``fits`` says what a model of that kind can be.

    Raises:
        UsageError: A curve that is empty of sense: a loss that is no number, a size that does not exist.
    """
    if full.heads % full.kv_heads:
        raise UsageError(f"{full.heads} query heads are not shared evenly by {full.kv_heads} key/value heads")
    group = full.heads // full.kv_heads
    sizes = (
        _offered("inner", curves.inner, full.inner, steps.inner),
        _offered("heads", curves.heads, full.kv_heads, steps.heads),
        _offered("layers", curves.layers, full.layers, steps.layers),
    )
    found = [Amounts(inner, kept * group, kept, layers) for inner, kept, layers in itertools.product(*sizes)]
    return [amounts for amounts in found if fits is None or amounts == full or fits(amounts)]


def predicted_loss(curves: Curves, full: Amounts, amounts: Amounts) -> float:
    """Return the sum of the parts' losses."""
    return math.fsum(
        (
            _at(curves.inner, full.inner, amounts.inner),
            _at(curves.heads, full.kv_heads, amounts.kv_heads),
            _at(curves.layers, full.layers, amounts.layers),
        )
    )


def choose(
    curves: Curves,
    full: Amounts,
    latency: Callable[[Amounts], float],
    *,
    speedup: float | None = None,
    max_loss: float | None = None,
    steps: Steps | None = None,
    fits: Fits | None = None,
) -> Choice:
    """Choose the mix of least predicted loss that reaches a speedup, or the fastest within a predicted loss.

    Args:
        curves: What each kind is predicted to cost.
        full: What there is.
        latency: Predicted seconds of a run, positive.
        speedup: How many times faster than the full model, more than 1.
        max_loss: The predicted loss that is allowed, 0 or more.
        steps: Which sizes are offered.
        fits: Which of these mixes a model of that kind can be; all by default.

    Raises:
        UsageError: Not exactly one of ``speedup`` and ``max_loss``, or one that makes no sense.
        BudgetError: No mix reaches the speedup; the message says the most that one reaches.
    """
    if (speedup is None) == (max_loss is None):
        raise UsageError("pruning follows one aim: a speedup or a limit on the loss")
    if speedup is not None and not (math.isfinite(speedup) and speedup > 1):
        raise UsageError(f"a speedup of {speedup:g} is none", hint="--set prune.speedup=1.5")
    if max_loss is not None and not (math.isfinite(max_loss) and max_loss >= 0):
        raise UsageError(f"a loss of {max_loss:g} cannot be a limit", hint="give a number of 0 or more")
    mixes = _mixes(candidates(curves, full, steps or Steps(), fits), curves, full, latency)
    frontier = pareto(mixes)
    if max_loss is not None:
        # The full model loses nothing: there always is one.
        return Choice(min((mix for mix in frontier if mix.loss <= max_loss), key=_faster), frontier)
    assert speedup is not None
    enough = [mix for mix in frontier if mix.speedup >= speedup * (1 - _SLACK)]
    if not enough:
        most = min(frontier, key=_faster)
        raise BudgetError(
            f"no mix of widths, heads and layers makes this model {speedup:g} times faster: "
            f"{most.speedup:.2f} is the most, with {told(most.amounts)}",
            hint=f"--set prune.speedup={math.floor(most.speedup * 100) / 100:g}, or a quantizing profile",
        )
    return Choice(min(enough, key=_better), frontier)


def pareto(mixes: Sequence[Mix]) -> tuple[Mix, ...]:
    """Return the mixes that no other beats in loss or time without losing in the other, slowest first."""
    found: list[Mix] = []
    for mix in sorted(mixes, key=_faster):
        if not found or mix.loss < found[-1].loss:
            found.append(mix)
    return tuple(reversed(found))


def most_within(
    frontier: Sequence[Mix], measure: Callable[[Amounts], float], limit: float, *, measurements: int = MEASUREMENTS
) -> tuple[Mix, Mapping[Amounts, float]]:
    """Find by bisection the fastest mix of a frontier whose measured loss keeps a limit.

    The measured loss is taken to rise along the frontier; where it does not, a mix that keeps the limit is found,
    though perhaps not the fastest. A frontier of fewer than ``2 ** measurements`` mixes is searched to the end.

    Args:
        frontier: Of :func:`choose`, slowest first. A first mix that loses nothing is the model as it is: not measured.
        measure: The loss of a model of these sizes; expensive.
        limit: What is allowed.
        measurements: How often ``measure`` may be called.

    Returns:
        The mix, and everything that was measured, in order.

    Raises:
        UsageError: A limit that is none.
        BudgetError: Nothing that was measured keeps it; the message says what came nearest.
    """
    if not limit > 0:
        raise UsageError(f"a loss of {limit:g} cannot be a limit", hint="--set prune.max_kl=0.05")
    pruned = [mix for mix in frontier if mix.loss > 0 or mix.speedup > 1 + _SLACK]
    measured: dict[Amounts, float] = {}
    best: Mix | None = None
    low, high = 0, len(pruned)  # all before `low` are taken to keep the limit, all from `high` on not to
    while low < high and len(measured) < measurements:
        middle = (low + high) // 2
        loss = measure(pruned[middle].amounts)
        measured[pruned[middle].amounts] = loss
        if loss <= limit:
            best, low = pruned[middle], middle + 1
        else:
            high = middle
    if best is None:
        nearest = min(measured.items(), key=lambda item: (not math.isfinite(item[1]), item[1]), default=None)
        came = "" if nearest is None else f": {nearest[1]:.4g} with {told(nearest[0])} came nearest"
        raise BudgetError(f"no amount that was measured keeps a loss of {limit:g}{came}", hint="raise the limit")
    return best, measured


def told(amounts: Amounts) -> str:
    """Return amounts in words."""
    heads = f"{amounts.heads} heads"
    if amounts.kv_heads != amounts.heads:
        heads += f" in {amounts.kv_heads} groups"
    return f"{amounts.inner} neurons, {heads}, {amounts.layers} layers"


def _mixes(offered: Sequence[Amounts], curves: Curves, full: Amounts, latency: Callable[[Amounts], float]) -> list[Mix]:
    whole = _checked(latency(full))
    found = []
    for amounts in offered:
        seconds = _checked(latency(amounts))
        found.append(Mix(amounts, predicted_loss(curves, full, amounts), seconds, whole / seconds))
    return found


def _checked(seconds: float) -> float:
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"a run cannot take {seconds} s")
    return seconds


def _offered(kind: str, curve: Mapping[int, float], full: int, step: int) -> list[int]:
    """Return the sizes of a kind, largest first."""
    for size, loss in curve.items():
        if not 0 < size <= full:
            raise UsageError(f"{size} {kind} cannot be kept of {full}")
        if not (math.isfinite(loss) and loss >= 0):
            raise UsageError(f"keeping {size} {kind} cannot lose {loss}")
    if step < 1:
        raise UsageError(f"{kind} cannot be removed in steps of {step}")
    least = min(curve, default=full)
    below = range((full - 1) // step * step, 0, -step)
    return [full, *(size for size in below if size >= least)]


def _at(curve: Mapping[int, float], full: int, size: int) -> float:
    """Return a curve's loss at a size, by linear interpolation; nothing at the full size."""
    points = {**curve, full: 0.0}
    if size in points:
        return points[size]
    low = max((known for known in points if known < size), default=None)
    if low is None:
        raise ValueError(f"nothing is known of keeping {size}")
    high = min(known for known in points if known > size)
    return points[low] + (points[high] - points[low]) * (size - low) / (high - low)


def _sizes(mix: Mix) -> tuple[int, ...]:
    """Return a key that puts the mix that keeps more first: equals are chosen among the same way every time."""
    amounts = mix.amounts
    return (-amounts.layers, -amounts.kv_heads, -amounts.inner)


def _faster(mix: Mix) -> tuple[float, float, tuple[int, ...]]:
    return (mix.seconds, mix.loss, _sizes(mix))


def _better(mix: Mix) -> tuple[float, float, tuple[int, ...]]:
    return (mix.loss, mix.seconds, _sizes(mix))
