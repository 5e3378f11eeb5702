"""Amounts by budget: against an exhaustive search written another way, and under plausible mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import EXIT_OUTSIDE_BUDGET, BudgetError, UsageError
from compress.prune.amounts import Amounts
from compress.prune.search import Curves, Mix, Steps, candidates, choose, most_within, pareto, predicted_loss

FULL = Amounts(inner=1536, heads=9, kv_heads=3, layers=6)
CURVES = Curves(
    inner={1536: 0.0, 1024: 0.1, 512: 0.4, 256: 0.9},
    heads={3: 0.0, 2: 0.3, 1: 1.0},
    layers={6: 0.0, 5: 0.15, 4: 0.6, 3: 1.5},
)


def latency(amounts: Amounts) -> float:
    return 1e-4 + amounts.layers * (2e-7 * amounts.inner + 5e-5 * amounts.kv_heads + 2e-5)


def exhaustive(speedup: float) -> tuple[float, float]:
    """Return loss and seconds of the best mix, by the tables alone."""
    inner = {1536: 0.0, **{size: _line(size) for size in range(256, 1536, 128)}}
    best = (math.inf, math.inf)
    for (width, a), (groups, b), (layers, c) in product(inner.items(), CURVES.heads.items(), CURVES.layers.items()):
        seconds = latency(Amounts(width, groups * 3, groups, layers))
        if latency(FULL) / seconds >= speedup:
            best = min(best, (a + b + c, seconds))
    return best


def _line(size: int) -> float:
    for low, high in ((256, 512), (512, 1024), (1024, 1536)):
        if low <= size <= high:
            share = (size - low) / (high - low)
            return (1 - share) * CURVES.inner[low] + share * CURVES.inner[high]
    raise AssertionError(size)


@pytest.mark.parametrize("speedup", [1.05, 1.3, 1.5, 2.0, 3.0])
def test_the_least_loss_that_reaches_a_speedup(speedup: float) -> None:
    best = choose(CURVES, FULL, latency, speedup=speedup).best
    loss, seconds = exhaustive(speedup)
    assert best.speedup >= speedup
    assert best.loss == pytest.approx(loss, rel=1e-12)
    assert best.seconds == pytest.approx(seconds, rel=1e-12)


def test_one_kind_alone_is_worse() -> None:
    # The negative control: were the search to look at widths only, the oracle above would see it.
    mixed = choose(CURVES, FULL, latency, speedup=2.0).best
    only_width = Curves(inner=CURVES.inner, heads={}, layers={})
    assert mixed.loss < choose(only_width, FULL, latency, speedup=1.9).best.loss
    assert mixed.amounts.inner < FULL.inner and mixed.amounts.layers < FULL.layers


def test_the_fastest_within_a_loss() -> None:
    best = choose(CURVES, FULL, latency, max_loss=0.5).best
    others = [Mix(a, predicted_loss(CURVES, FULL, a), latency(a), 0) for a in candidates(CURVES, FULL, Steps())]
    assert best.loss <= 0.5
    assert best.seconds == min(mix.seconds for mix in others if mix.loss <= 0.5)
    assert choose(CURVES, FULL, latency, max_loss=0).best.amounts == FULL


def test_sizes_are_whole_steps_and_whole_groups() -> None:
    offered = candidates(CURVES, FULL, Steps(inner=256, heads=2, layers=2))
    assert offered[0] == FULL
    assert {a.inner for a in offered} == {1536, 1280, 1024, 768, 512, 256}
    assert {(a.heads, a.kv_heads) for a in offered} == {(9, 3), (6, 2)}
    assert {a.layers for a in offered} == {6, 4}


def test_an_odd_full_size_is_offered_and_what_does_not_fit_is_not() -> None:
    full = Amounts(inner=1200, heads=12, kv_heads=12, layers=4)
    curves = Curves(inner={600: 0.5}, heads={3: 0.4}, layers={})
    offered = candidates(curves, full, Steps(), lambda amounts: 312 % amounts.heads == 0)
    assert {a.inner for a in offered} == {1200, 1152, 1024, 896, 768, 640}
    assert {a.heads for a in offered} == {12, 8, 6, 4, 3}
    assert {a.layers for a in offered} == {4}
    assert predicted_loss(curves, full, Amounts(900, 12, 12, 4)) == pytest.approx(0.25)


def test_a_speedup_out_of_reach_says_what_is_in_reach() -> None:
    with pytest.raises(
        BudgetError, match=r"no mix .* 50 times faster: \d\.\d+ is the most, with 256 neurons"
    ) as caught:
        choose(CURVES, FULL, latency, speedup=50)
    assert caught.value.exit_code == EXIT_OUTSIDE_BUDGET
    assert caught.value.hint is not None
    reachable = float(caught.value.hint.split("=")[1].split(",")[0])
    assert choose(CURVES, FULL, latency, speedup=reachable).best.amounts == Amounts(256, 3, 1, 3)


@pytest.mark.parametrize(
    ("aim", "message"),
    [
        ({}, "one aim"),
        ({"speedup": 2.0, "max_loss": 1.0}, "one aim"),
        ({"speedup": 1.0}, "a speedup of 1 is none"),
        ({"speedup": math.nan}, "a speedup of nan"),
        ({"max_loss": -1.0}, "cannot be a limit"),
        ({"max_loss": math.nan}, "cannot be a limit"),
    ],
)
def test_an_aim_that_makes_no_sense(aim: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose(CURVES, FULL, latency, **aim)


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        (Curves({2000: 0.1}, {}, {}), "2000 inner cannot be kept of 1536"),
        (Curves({}, {0: 0.1}, {}), "0 heads cannot be kept of 3"),
        (Curves({}, {}, {5: math.nan}), "keeping 5 layers cannot lose nan"),
        (Curves({512: -0.1}, {}, {}), "keeping 512 inner cannot lose -0.1"),
    ],
)
def test_curves_that_make_no_sense(curves: Curves, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose(curves, FULL, latency, speedup=1.1)


def test_a_time_that_is_none_is_a_defect() -> None:
    for seconds in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="a run cannot take"):
            choose(CURVES, FULL, lambda amounts, bad=seconds: bad, speedup=1.1)  # type: ignore[misc]


_losses = st.floats(min_value=0, max_value=3)
_curves = st.builds(
    Curves,
    st.dictionaries(st.integers(1, 1536), _losses, max_size=6),
    st.dictionaries(st.integers(1, 3), _losses, max_size=3),
    st.dictionaries(st.integers(1, 6), _losses, max_size=6),
)


@given(_curves, st.floats(min_value=1.01, max_value=4), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_nothing_that_is_offered_is_better(curves: Curves, speedup: float, random: object) -> None:
    try:
        choice = choose(curves, FULL, latency, speedup=speedup)
    except BudgetError:
        assert all(latency(FULL) / latency(a) < speedup for a in candidates(curves, FULL, Steps()))
        return
    every = [(predicted_loss(curves, FULL, a), latency(a)) for a in candidates(curves, FULL, Steps())]
    fast = [loss for loss, seconds in every if latency(FULL) / seconds >= speedup]
    assert choice.best.loss == min(fast)
    for mix in choice.frontier:
        assert not any(loss <= mix.loss and seconds < mix.seconds for loss, seconds in every)
        assert not any(loss < mix.loss and seconds <= mix.seconds for loss, seconds in every)
    # The order in which mixes come makes no difference.
    mixes = [Mix(m.amounts, m.loss, m.seconds, m.speedup) for m in choice.frontier]
    random.shuffle(mixes)  # type: ignore[attr-defined]
    assert pareto(mixes) == choice.frontier
    assert choose(curves, FULL, latency, speedup=speedup) == choice


def _frontier(count: int) -> list[Mix]:
    """Return the full model and ``count`` mixes, each faster and worse than the one before."""
    return [Mix(Amounts(1536 - 8 * i, 9, 3, 6), 0.01 * i, 1 / (1 + 0.05 * i), 1 + 0.05 * i) for i in range(count + 1)]


def counted(loss_of: Callable[[Amounts], float]) -> tuple[Callable[[Amounts], float], list[Amounts]]:
    asked: list[Amounts] = []

    def measure(amounts: Amounts) -> float:
        asked.append(amounts)
        return loss_of(amounts)

    return measure, asked


@given(st.integers(1, 31), st.integers(0, 40))
@settings(max_examples=80, deadline=None)
def test_bisection_finds_the_last_that_keeps_the_limit(count: int, keeping: int) -> None:
    frontier = _frontier(count)
    # The measured loss is another number than the predicted one, in the same order.
    measure, asked = counted(lambda amounts: ((1536 - amounts.inner) / 8) ** 2 * 1e-3)
    limit = (keeping + 0.5) ** 2 * 1e-3
    if keeping == 0:
        with pytest.raises(BudgetError, match="1528 neurons.*came nearest"):
            most_within(frontier, measure, limit)
    else:
        best, measured = most_within(frontier, measure, limit)
        assert best == frontier[min(keeping, count)]
        assert measured[best.amounts] <= limit
    assert len(asked) == len(set(asked)) <= 5
    assert FULL not in asked


def test_a_long_frontier_takes_no_more_measurements() -> None:
    measure, asked = counted(lambda amounts: 1536 - amounts.inner)
    best, measured = most_within(_frontier(180), measure, 8 * 100)
    assert list(measured) == asked and len(asked) == 5
    assert 1536 - 8 * 100 <= best.amounts.inner <= 1536 - 8 * 94


def test_what_is_returned_was_measured_to_keep_the_limit() -> None:
    # Measured losses out of order: the answer may be any, but never one that exceeds the limit.
    for seed in range(20):
        measure, _ = counted(lambda amounts, seed=seed: (amounts.inner * (seed + 3)) % 17)  # type: ignore[misc]
        try:
            best, measured = most_within(_frontier(31), measure, 6)
        except BudgetError:
            continue
        assert measured[best.amounts] <= 6


def test_a_loss_that_is_no_number_keeps_no_limit() -> None:
    with pytest.raises(BudgetError, match="no amount that was measured keeps a loss of 0.1: nan"):
        most_within(_frontier(7), lambda amounts: math.nan, 0.1)
    with pytest.raises(BudgetError, match="no amount that was measured keeps a loss of 0.1\n"):
        most_within(_frontier(0), lambda amounts: 0.0, 0.1)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(UsageError, match="cannot be a limit"):
            most_within(_frontier(7), lambda amounts: 0.0, limit)
