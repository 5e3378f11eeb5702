"""What algorithms choose: against brute force, on planted parts, and the contract that each of them keeps."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest

from compress.contracts import Units
from compress.errors import UsageError
from compress.prune import available, load_depth_pruner, load_pruner
from compress.prune.surgeon import DAMPING

PRUNERS, DEPTH_PRUNERS = available("PRUNER"), available("DEPTH_PRUNER")


def units(count: int = 12, size: int = 1, outputs: int = 5, seed: int = 0, classes: int = 1) -> Units:
    draw = np.random.default_rng(seed)
    width = count * size
    x = draw.normal(size=(400, width)) @ (np.eye(width) + 0.5 * draw.normal(size=(width, width)) / width**0.5)
    moments = (x.T @ x / len(x)).astype(np.float32)
    weight, produced = (
        draw.normal(size=(outputs, width)).astype(np.float32),
        draw.uniform(1, 2, width).astype(np.float32),
    )
    kinds = np.arange(count) // (count // classes) if classes > 1 else None
    return Units(weight, produced, moments, size, kinds)


def missed(given: Units, gone: npt.NDArray[np.int64]) -> float:
    """Return the share of the outputs' power that is lost when others make up for removed units best, float64."""
    assert given.moments is not None
    moments = given.moments.astype(np.float64)
    moments[np.diag_indices_from(moments)] += DAMPING * np.diagonal(given.moments).mean(dtype=np.float64)
    weight = given.weight.astype(np.float64)
    channels = np.array([unit * given.size + part for unit in gone for part in range(given.size)])
    stay = np.setdiff1d(np.arange(len(moments)), channels)
    change = weight[:, channels] @ moments[np.ix_(channels, stay)] @ np.linalg.inv(moments[np.ix_(stay, stay)])
    rest = np.zeros_like(weight)
    rest[:, channels], rest[:, stay] = weight[:, channels], -change
    power = np.trace(weight @ given.moments @ weight.T)
    return float(np.trace(rest @ moments @ rest.T) / power)


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize(("count", "size", "classes"), [(12, 1, 1), (33, 1, 3), (6, 4, 1), (6, 4, 2)])
def test_every_algorithm_keeps_the_contract(name: str, count: int, size: int, classes: int) -> None:
    given, pruner = units(count, size, classes=classes), load_pruner(name)
    removed = count // 2 // classes * classes
    found = pruner.remove(given, removed, seed=4)
    assert len(set(found.order.tolist())) == removed and found.order.min() >= 0 and found.order.max() < count
    assert found.losses.shape == (removed + 1,)
    if given.classes is not None:
        assert set(np.bincount(given.classes[found.order], minlength=classes)) == {removed // classes}
    again = pruner.remove(given, removed, seed=4)
    assert np.array_equal(found.order, again.order)
    assert pruner.name == name and not pruner.remove(given, 0, seed=0).order.size


def test_only_random_reads_the_seed() -> None:
    given = units(64)
    for name in PRUNERS:
        first, second = (load_pruner(name).remove(given, 32, seed=seed).order for seed in (1, 2))
        assert np.array_equal(first, second) == (name != "random")


@pytest.mark.parametrize("size", [1, 3])
def test_the_surgeons_losses_are_those_of_the_best_correction(size: int) -> None:
    given = units(10, size)
    found = load_pruner("surgeon").remove(given, 6, seed=0)
    for removed in range(1, 7):
        assert found.losses[removed] == pytest.approx(missed(given, found.order[:removed]), rel=2e-2)
    # Greedy, so not always the best set; on ten units it is near it, and far from the worst.
    sets = [missed(given, np.array(some)) for some in itertools.combinations(range(10), 3)]
    assert found.losses[3] <= 1.15 * min(sets) and found.losses[3] < 0.5 * max(sets)


def test_the_surgeon_sees_what_others_do_not() -> None:
    """A unit that another one repeats is worth nothing, however large it is."""
    given = units(16)
    assert given.moments is not None
    x = np.random.default_rng(5).normal(size=(500, 16))
    x[:, 3] = 4 * x[:, 7] + 0.01 * x[:, 3]
    given = Units(given.weight, given.produced, (x.T @ x / 500).astype(np.float32))
    assert int(load_pruner("surgeon").remove(given, 1, seed=0).order[0]) in (3, 7)
    assert int(load_pruner("activation").remove(given, 1, seed=0).order[0]) not in (3, 7)


def test_activation_and_magnitude_are_their_formulas() -> None:
    given = units(20)
    assert given.moments is not None
    read = np.square(given.weight.astype(np.float64)).sum(axis=0)
    by_power = np.argsort(read * np.diagonal(given.moments))[:5]
    assert set(load_pruner("activation").remove(given, 5, seed=0).order.tolist()) == set(by_power.tolist())
    by_size = np.argsort(read + given.produced)[:5]
    assert set(load_pruner("magnitude").remove(given, 5, seed=0).order.tolist()) == set(by_size.tolist())
    assert set(by_power.tolist()) != set(by_size.tolist())


def states(blocks: int, still: tuple[int, ...], seed: int = 0) -> npt.NDArray[np.float32]:
    """Return hidden states that turn little in the ``still`` blocks."""
    draw = np.random.default_rng(seed)
    found = [draw.normal(size=(50, 16))]
    for block in range(blocks):
        found.append(found[-1] + (0.01 if block in still else 1.0) * draw.normal(size=(50, 16)))
    return np.stack(found).astype(np.float32)


@pytest.mark.parametrize("name", DEPTH_PRUNERS)
def test_blocks_that_do_little_go(name: str) -> None:
    assert load_depth_pruner(name).remove(states(8, (4, 5)), 2).tolist() == [4, 5]
    assert load_depth_pruner(name).remove(states(8, (2,)), 1).tolist() == [2]


def test_only_neighbours_are_a_run() -> None:
    apart = states(8, (1, 6))
    assert load_depth_pruner("block-influence").remove(apart, 2).tolist() == [1, 6]
    run = load_depth_pruner("angular-distance").remove(apart, 2)
    assert run[1] == run[0] + 1


def test_an_unknown_algorithm_is_told() -> None:
    with pytest.raises(UsageError, match="surgeom") as error:
        load_pruner("surgeom")
    assert "surgeon" in str(error.value.hint)
    with pytest.raises(UsageError, match="wanda"):
        load_depth_pruner("wanda")
