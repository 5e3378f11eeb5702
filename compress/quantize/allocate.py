"""Bits and block sizes, tensor by tensor: the least loss that a byte budget allows, or the fewest bytes for a loss.

**Losses add up.** A tensor's loss is what the model loses (KL divergence, nats a token) when this tensor alone is
stored so; an assignment's is taken to be the sum. To second order that holds for errors that are independent of each
other, and it is the better the smaller they are: at a predicted loss of a nat or more the sum says which assignment is
better, not how good it is. The artifact is measured in the end, and the report shows both numbers.

**Time counts.** The loss is weighed against decode time: being as slow again as the fastest assignment is held to be
worth ``time_weight`` nats. Under a limit on the loss, where bytes are minimised, those nats are turned into bytes at
the rate that the frontier has there.

The search itself is :mod:`compress.quantize.knapsack`; it is exact to within the ``gap`` that an allocation states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.contracts import Role, Scheme
from compress.errors import BudgetError, CompressError, UsageError
from compress.quantize.knapsack import Float64Array, Solution, solve, sweep
from compress.quantize.scheme import scheme_name
from compress.sizes import format_size

#: Nats that twice the decode time is worth: a fiftieth of what int4 costs a small model, so that time decides between
#: options that are about as good.
TIME_WEIGHT = 0.002
#: As many points of the frontier are kept: enough for a plot.
_POINTS = 33


@dataclass(frozen=True)
class Option:
    """One way to store one tensor.

    Attributes:
        scheme: Bits, block size, symmetry.
        nbytes: Bytes of codes, scales and zero points.
        loss: What the model loses by it, nats a token; 0 or more.
        cost: Its decode time, in any unit that all options share.
    """

    scheme: Scheme
    nbytes: int
    loss: float
    cost: float


@dataclass(frozen=True)
class Candidate:
    """A tensor and the ways in which it may be stored, one at least."""

    name: str
    role: Role
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Choice:
    """How a tensor is stored, and why: what its neighbours in accuracy and in size would have changed."""

    name: str
    role: Role
    option: Option
    why: str


@dataclass(frozen=True)
class FrontierPoint:
    """An assignment that none of fewer bytes beats: all bytes, predicted loss in nats, decode time."""

    nbytes: int
    loss: float
    cost: float


@dataclass(frozen=True)
class Allocation:
    """An assignment, by name, and the frontier that it was chosen from.

    Attributes:
        choices: One a candidate, sorted by name.
        nbytes: All bytes, the fixed ones included.
        loss: Predicted: the sum of the choices' losses, nats a token.
        cost: Decode time of the choices.
        price: Nats that a byte more would save, at the margin; 0 where everything fits.
        gap: At most this share of the objective could have been saved by a better search.
        frontier: From the fewest bytes to the least loss.
    """

    choices: tuple[Choice, ...]
    nbytes: int
    loss: float
    cost: float
    price: float
    gap: float
    frontier: tuple[FrontierPoint, ...]

    @property
    def schemes(self) -> dict[str, Scheme]:
        """Return every tensor's scheme by name, as :func:`compress.planning.make_plan` takes them."""
        return {choice.name: choice.option.scheme for choice in self.choices}


def allocate(
    candidates: Sequence[Candidate],
    *,
    fixed_bytes: int,
    max_bytes: int | None,
    max_loss: float | None,
    time_weight: float = TIME_WEIGHT,
) -> Allocation:
    """Choose an option for every candidate.

    With ``max_bytes``: the least loss and time within it; with ``max_loss`` alone: the fewest bytes and the least time
    within it; with both: the least loss and time within both, or the least loss alone where time does not leave room.

    Args:
        candidates: The tensors; their order does not matter.
        fixed_bytes: Bytes of everything else.
        max_bytes: The most bytes in total.
        max_loss: The most predicted loss in total, nats a token.
        time_weight: Nats that being as slow again as the fastest assignment is worth; 0 leaves time out.

    Raises:
        BudgetError: No assignment keeps the budget; the message says the nearest one that can be kept.
        CompressError: A loss or a time is negative or not finite (whose).
        UsageError: Neither limit is given.
    """
    if max_bytes is None and max_loss is None:
        raise UsageError("there is no budget to choose bits for", hint="--set budget.max_bytes=SIZE or budget.max_kl=X")
    problem = _Problem(candidates, fixed_bytes, time_weight)
    if max_bytes is None:
        assert max_loss is not None
        solution = problem.smallest(max_loss)
    else:
        solution = problem.most_accurate(max_bytes, max_loss)
    return problem.allocation(solution)


@dataclass(frozen=True)
class _Found:
    """A solution by whichever limit, with its price in nats a byte."""

    picks: tuple[int, ...]
    price: float
    gap: float


class _Problem:
    """The candidates as arrays, sorted so that neither their order nor their options' decides between equals."""

    def __init__(self, candidates: Sequence[Candidate], fixed_bytes: int, time_weight: float) -> None:
        self.candidates = sorted(candidates, key=lambda candidate: candidate.name)
        _check(self.candidates)
        self.options = [
            sorted(c.options, key=lambda o: (o.nbytes, o.loss, o.cost, scheme_name(o.scheme))) for c in self.candidates
        ]
        self.fixed_bytes = fixed_bytes
        self.bytes = [_column([option.nbytes for option in options]) for options in self.options]
        self.loss = [_column([option.loss for option in options]) for options in self.options]
        cost = [_column([option.cost for option in options]) for options in self.options]
        fastest = sum(float(column.min()) for column in cost)
        rate = time_weight / fastest if fastest > 0 else 0.0
        self.time = [column * rate for column in cost]

    def most_accurate(self, max_bytes: int, max_loss: float | None) -> _Found:
        limit = max_bytes - self.fixed_bytes
        with_time = [loss + time for loss, time in zip(self.loss, self.time, strict=True)]
        for values in (with_time, self.loss):
            solution = solve(values, self.bytes, limit)
            if solution is None:
                raise self._too_few_bytes(max_bytes)
            if max_loss is None or _within(self._loss(solution), max_loss):
                return _Found(solution.picks, solution.price, _gap(solution))
        assert max_loss is not None and solution is not None
        least = self._least_loss()
        if not _within(least, max_loss):
            raise self._too_little_loss(max_loss, least)
        smallest = solve(self.bytes, self.loss, max_loss)
        assert smallest is not None
        needed, loss = _size_up(self.fixed_bytes + int(smallest.value)), _loss_up(self._loss(solution))
        raise BudgetError(
            f"a KL divergence of {max_loss:g} within {format_size(max_bytes)} cannot be met: "
            f"such a loss takes {needed}, such a size loses {loss}",
            hint=f"--set budget.max_bytes={needed} or --set budget.max_kl={loss}",
        )

    def smallest(self, max_loss: float) -> _Found:
        solution = solve(self.bytes, self.loss, max_loss)
        if solution is None:
            raise self._too_little_loss(max_loss, self._least_loss())
        # Bytes a nat there: what time is worth in bytes.
        rate = solution.price
        if rate > 0 and any(column.any() for column in self.time):
            values = [size + rate * time for size, time in zip(self.bytes, self.time, strict=True)]
            solution = solve(values, self.loss, max_loss) or solution
        return _Found(solution.picks, 1 / rate if rate > 0 else 0.0, _gap(solution))

    def allocation(self, found: _Found) -> Allocation:
        chosen = [options[pick] for options, pick in zip(self.options, found.picks, strict=True)]
        choices = tuple(
            Choice(candidate.name, candidate.role, option, _why(option, options, found.price))
            for candidate, option, options in zip(self.candidates, chosen, self.options, strict=True)
        )
        return Allocation(
            choices=choices,
            nbytes=self.fixed_bytes + sum(option.nbytes for option in chosen),
            loss=math.fsum(option.loss for option in chosen),
            cost=math.fsum(option.cost for option in chosen),
            price=found.price,
            gap=found.gap,
            frontier=self.frontier(),
        )

    def frontier(self) -> tuple[FrontierPoint, ...]:
        """Return what a sweep over the price of a byte gives, evenly thinned; dominated points are left out."""
        values = [loss + time for loss, time in zip(self.loss, self.time, strict=True)]
        picks, steps = sweep(values, self.bytes)
        changed = [self._point(picks)]
        for step in steps:
            before = self.options[step.item][picks[step.item]]
            after = self.options[step.item][step.option]
            picks[step.item] = step.option
            last = changed[-1]
            changed.append(
                FrontierPoint(
                    last.nbytes + after.nbytes - before.nbytes,
                    last.loss + (after.loss - before.loss),
                    last.cost + (after.cost - before.cost),
                )
            )
        points: list[FrontierPoint] = []
        for point in changed:
            if not points or (point.loss < points[-1].loss and point.nbytes > points[-1].nbytes):
                points.append(point)
        if len(points) <= _POINTS:
            return tuple(points)
        sizes = np.array([point.nbytes for point in points])
        wanted = np.linspace(sizes[0], sizes[-1], _POINTS)
        return tuple(points[index] for index in sorted({int(np.abs(sizes - size).argmin()) for size in wanted}))

    def _point(self, picks: Sequence[int]) -> FrontierPoint:
        chosen = [options[pick] for options, pick in zip(self.options, picks, strict=True)]
        return FrontierPoint(
            self.fixed_bytes + sum(option.nbytes for option in chosen),
            math.fsum(option.loss for option in chosen),
            math.fsum(option.cost for option in chosen),
        )

    def _loss(self, solution: Solution) -> float:
        return math.fsum(float(loss[pick]) for loss, pick in zip(self.loss, solution.picks, strict=True))

    def _least_loss(self) -> float:
        return math.fsum(float(column.min()) for column in self.loss)

    def _too_few_bytes(self, max_bytes: int) -> BudgetError:
        least = self.fixed_bytes + int(sum(float(column.min()) for column in self.bytes))
        return BudgetError(
            f"no assignment of bits fits into {format_size(max_bytes)}: the smallest takes {_size_up(least)}",
            hint=f"--set budget.max_bytes={_size_up(least)} or more, or a smaller model",
        )

    def _too_little_loss(self, max_loss: float, least: float) -> BudgetError:
        return BudgetError(
            f"no assignment of bits keeps a KL divergence of {max_loss:g}: the least predicted is {_loss_up(least)}",
            hint=f"--set budget.max_kl={_loss_up(least)} or more",
        )


def _check(candidates: Sequence[Candidate]) -> None:
    for before, after in zip(candidates, candidates[1:], strict=False):
        if before.name == after.name:
            raise ValueError(f"two candidates are called {after.name}")
    for candidate in candidates:
        if not candidate.options:
            raise ValueError(f"{candidate.name} has no options")
        for option in candidate.options:
            for what, value in (("loss", option.loss), ("decode time", option.cost)):
                if not (math.isfinite(value) and value >= 0):
                    raise CompressError(
                        f"the {what} of {scheme_name(option.scheme)} is {value:g}, which cannot be",
                        where=candidate.name,
                        hint="other calibration text; if it stays so, --set quantize.allocation=roles",
                    )


def _column(values: Sequence[float]) -> Float64Array:
    return np.array(values, np.float64)


def _gap(solution: Solution) -> float:
    return max(0.0, solution.value - solution.bound) / abs(solution.value) if solution.value else 0.0


def _within(loss: float, limit: float) -> bool:
    return loss <= limit * (1 + 1e-12)


def _why(option: Option, options: Sequence[Option], price: float) -> str:
    """Return what the next better and the next cheaper option would have changed, beside what a byte is worth."""
    going = f"a MB is worth {price * 1e6:.2g} here" if price > 0 else "there is room for all"
    return f"{_better(option, options)}; {_cheaper(option, options)}; {going}"


def _better(option: Option, options: Sequence[Option]) -> str:
    better = [other for other in options if other.loss < option.loss]
    larger = [other for other in better if other.nbytes > option.nbytes]
    if larger:
        other = max(larger, key=lambda o: (option.loss - o.loss) / (o.nbytes - option.nbytes))
        return f"{scheme_name(other.scheme)} would lose {_exchange(option, other)} more"
    if better:
        other = min(better, key=lambda o: o.loss)
        return f"{scheme_name(other.scheme)} would lose {option.loss - other.loss:.2g} KL less but decode slower"
    return "no option loses less"


def _cheaper(option: Option, options: Sequence[Option]) -> str:
    cheaper = [other for other in options if other.nbytes < option.nbytes]
    if not cheaper:
        return "no option is smaller"
    other = min(cheaper, key=lambda o: (o.loss - option.loss) / (option.nbytes - o.nbytes))
    if other.loss <= option.loss:
        return f"{scheme_name(other.scheme)} would be smaller but decode slower"
    return f"{scheme_name(other.scheme)} would lose {_exchange(option, other)} less"


def _exchange(option: Option, other: Option) -> str:
    """Return what the other option changes: ``0.0012 KL more (0.0041 a MB) for 0.29 MB``."""
    change, size = other.loss - option.loss, abs(other.nbytes - option.nbytes)
    word = "more" if change > 0 else "less"
    return f"{abs(change):.2g} KL {word} ({abs(change) / size * 1e6:.2g} a MB) for {format_size(size)}"


def _size_up(nbytes: int) -> str:
    """Return a size as ``--set`` takes it, rounded up so that it suffices."""
    if nbytes < 1_000_000:
        return f"{math.ceil(nbytes / 1000)}KB"
    return f"{math.ceil(nbytes / 1e4) / 100:.2f}MB"


def _loss_up(loss: float) -> str:
    """Return a loss with three digits, rounded up so that it suffices."""
    if loss <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(loss)) - 2)
    return f"{math.ceil(loss / unit * (1 - 1e-12)) * unit:.6g}"
