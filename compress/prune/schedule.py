"""When distillation learns how fast, from which sequences, and when it ends: pure functions of step and history.

Nothing here has a state, so a run that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
#: Held-out losses: (steps done, loss), the first before any step.
History = Sequence[tuple[int, float]]

#: Of the sequences, never trained on: a share of them, but no more than about so many tokens.
HELD_OUT_SHARE, HELD_OUT_TOKENS = 0.15, 4096
#: Evaluations without a gain of this share of the loss, after which it no longer helps.
PATIENCE, LEAST_GAIN = 4, 0.005
#: Parts of the steps: learning rate rises, learning rate falls.
WARM_UP, COOL_DOWN = 0.05, 0.3
#: How often held-out loss is measured: so many times a run, but not after fewer steps than this.
EVALUATIONS, LEAST_INTERVAL = 20, 5


@dataclass(frozen=True)
class Split:
    """Indices of sequences: int64, sorted; no sequence is in both."""

    training: IntArray
    held_out: IntArray


def split(lengths: IntArray, seed: int) -> Split:
    """Draw the sequences that are held out, at least one; ``lengths`` are their tokens."""
    count = max(1, min(round(HELD_OUT_SHARE * len(lengths)), round(HELD_OUT_TOKENS / float(lengths.mean()))))
    order = np.random.default_rng([seed, 0]).permutation(len(lengths))
    return Split(np.sort(order[count:]), np.sort(order[:count]))


def batch(training: IntArray, step: int, size: int, seed: int) -> IntArray:
    """Return the sequences of a step (the first is 1): each epoch is a permutation of its own, one after the other."""
    places = np.arange((step - 1) * size, step * size)
    epochs = {int(epoch) for epoch in places // len(training)}
    orders = {epoch: np.random.default_rng([seed, 1, epoch]).permutation(training) for epoch in epochs}
    return np.array([orders[int(place // len(training))][place % len(training)] for place in places], np.int64)


def plateaued(history: History) -> bool:
    """Return whether the last :data:`PATIENCE` evaluations brought less than :data:`LEAST_GAIN` of the best loss."""
    if len(history) <= PATIENCE:
        return False
    losses = [loss for _, loss in history]
    best = min(losses[:-PATIENCE])
    return min(losses[-PATIENCE:]) > (1 - LEAST_GAIN) * best


@dataclass(frozen=True)
class Course:
    """Warm-up, a constant learning rate, and a linear descent to zero that begins when it no longer helps.

    The descent is where most of the noise goes out of the weights, so a plateau leads to it, not to an abrupt end:
    Hu et al., "MiniCPM", arXiv:2404.06395 (2024), section 4 (warm-up, stable, decay).

    Attributes:
        steps: The most steps.
        rate: The constant learning rate.
    """

    steps: int
    rate: float

    @property
    def interval(self) -> int:
        """Steps from one evaluation to the next."""
        return max(LEAST_INTERVAL, round(self.steps / EVALUATIONS))

    @property
    def descent(self) -> int:
        """Steps of the descent."""
        return max(1, round(COOL_DOWN * self.steps))

    def turn(self, history: History) -> int:
        """Return the step after which the learning rate falls: where a plateau was seen, or late enough for the end."""
        latest = self.steps - self.descent
        seen = (history[index][0] for index in range(len(history)) if plateaued(history[: index + 1]))
        return min(next(seen, latest), latest)

    def end(self, history: History) -> int:
        """Return the last step, by what is known so far."""
        return self.turn(history) + self.descent

    def rate_of(self, step: int, history: History) -> float:
        """Return the learning rate of a step; the first step is 1."""
        warm, turn = max(1, round(WARM_UP * self.steps)), self.turn(history)
        return self.rate * min(1.0, step / warm, (turn + self.descent + 1 - step) / (self.descent + 1))

    def evaluates(self, step: int, history: History) -> bool:
        """Return whether held-out loss is measured after a step."""
        return step % self.interval == 0 or step == self.end(history)
