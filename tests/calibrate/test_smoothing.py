"""Which channels are scaled and which neurons repeated, and what becomes of weights, biases and moments."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from compress.adjust import Adjustment, NormAdjustment
from compress.calibrate.smoothing import (
    GROWTH,
    MOST,
    REPEAT_FROM,
    SHARE,
    ChannelStatistics,
    outlier_scale,
    repeat_outliers,
)

Floats = npt.NDArray[np.float32]


def array(*numbers: float) -> Floats:
    return np.array(numbers, np.float32)


# -------------------------------------------------------------------------------------------------- which and by what


def test_only_outliers_are_scaled() -> None:
    extent = array(1, 1, 1, 1.4, 1.5, 3, 30, 0, 0.1)
    scale = outlier_scale(extent, 1.5)
    np.testing.assert_allclose(scale, [1, 1, 1, 1, 1, 2, 20, 1, 1], rtol=1e-6)
    assert scale.dtype == np.float32
    brought = extent / scale
    assert brought.max() == pytest.approx(1.5, rel=1e-6)
    assert np.array_equal(outlier_scale(extent, 100), np.ones(9))


@pytest.mark.parametrize("extent", [array(0, 0, 0), array(0, 0, 5), array(2, 2, 2), array(7)])
def test_nothing_is_scaled_where_no_median_says_what_is_usual(extent: Floats) -> None:
    assert np.array_equal(outlier_scale(extent, 1.5), np.ones(len(extent)))


def test_scales_are_bounded() -> None:
    """Most channels are silent: float32 would overflow."""
    extent = array(1e-42, 1e-42, 1e-42, 1, 3e38)
    with np.errstate(all="raise", under="ignore"):
        assert outlier_scale(extent, 1.5).max() == MOST


def neurons(count: int, loud: dict[int, float], seed: int = 0) -> ChannelStatistics:
    random = np.random.default_rng(seed)
    high = random.uniform(0.8, 1.2, count).astype(np.float32)
    for neuron, factor in loud.items():
        high[neuron] *= factor
    return ChannelStatistics(np.full(count, -0.17, np.float32), high, random.uniform(0.1, 1, count).astype(np.float32))


@pytest.mark.parametrize("count", [63, 64, 65, 160])
def test_copies_share_the_neurons_weight(count: int) -> None:
    loud = {3: 8.0, 20: 5.0, 41: 2.5}
    inner = neurons(count, loud)
    columns, share, inverse = repeat_outliers(inner)
    scale = np.maximum(1, inner.high / (2 * np.median(inner.high)))
    assert columns.dtype == np.int64 and share.dtype == inverse.dtype == np.float32
    assert set(columns.tolist()) == set(range(count)), "every neuron is there"
    total = np.zeros(count)
    np.add.at(total, columns, share.astype(np.float64) * inverse)
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    times = np.bincount(columns)
    for neuron in range(count):
        expected = int(np.ceil(np.float32(scale[neuron]) / SHARE)) if scale[neuron] > REPEAT_FROM else 1
        assert times[neuron] == expected
    assert times[3] >= 3 and times[20] == 2 and times[41] == 1 and scale[41] > 1, "all three kinds"
    assert share[times[columns] > 1].max() <= SHARE and share.max() <= REPEAT_FROM
    np.testing.assert_allclose(inverse, (1 / scale)[columns], rtol=1e-6)


@pytest.mark.parametrize("count", [5, 64, 65])
def test_of_two_neighbours_one_has_small_weights(count: int) -> None:
    """The n-th largest stands beside the n-th smallest."""
    inner = neurons(count, {2: 3.0} if count > 5 else {})
    columns, share, _ = repeat_outliers(inner)
    sizes = inner.peak[columns] * share
    pairs = sizes[: len(sizes) // 2 * 2].reshape(-1, 2)
    greater, smaller = np.sort(sizes)[::-1], np.sort(sizes)
    half = len(pairs)
    np.testing.assert_array_equal(np.sort(pairs[:, 0])[::-1], greater[:half])
    np.testing.assert_array_equal(np.sort(pairs[:, 1]), smaller[:half])
    if count > 5:
        unsorted = (inner.peak[np.sort(columns)])[: half * 2].reshape(-1, 2)
        assert pairs.sum(1).max() < 0.8 * unsorted.sum(1).max(), "the negative control"
    if len(sizes) % 2:
        assert sizes[-1] == np.median(sizes), "the one that is left over is of medium size"


def test_copies_stay_few() -> None:
    """Most neurons are silent on the texts: what is ordinary must not be repeated a million times."""
    high = np.full(64, 1e-7, np.float32)
    high[40:] = np.random.default_rng(0).uniform(1, 10, 24)
    inner = ChannelStatistics(-high, high, np.ones(64, np.float32))
    columns, share, inverse = repeat_outliers(inner)
    assert len(columns) <= (1 + GROWTH) * 64
    total = np.zeros(64)
    np.add.at(total, columns, share.astype(np.float64) * inverse)
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    silent = replace(inner, low=np.zeros(64, np.float32), high=np.zeros(64, np.float32))
    assert sorted(repeat_outliers(silent)[0].tolist()) == list(range(64))


# ----------------------------------------------------------------------------------------------------- what is changed


@pytest.fixture(params=range(2), ids=["odd", "even"])
def changed(request: pytest.FixtureRequest) -> tuple[Adjustment, Floats, Floats, Floats]:
    """Return a change with every part, a weight ``[7, K]``, a bias and inputs ``[50, K]``."""
    random, inner = np.random.default_rng(request.param), 9 + request.param
    order = np.concatenate([np.arange(inner), [3, 3, 5]])
    random.shuffle(order)
    change = Adjustment(
        rows=np.array([0, 1, 2, 3, 4, 5, 6, 6, 2], np.int64),
        row_scale=random.uniform(0.2, 2, 9).astype(np.float32),
        columns=order.astype(np.int64),
        column_scale=random.uniform(0.5, 3, inner + 3).astype(np.float32),
        shift=random.normal(0, 5, inner).astype(np.float32),
        offset=random.normal(0, 1, 9).astype(np.float32),
    )
    weight, bias = random.normal(size=(7, inner)), random.normal(size=7)
    inputs = random.normal(3, 2, (50, inner))
    return change, weight.astype(np.float32), bias.astype(np.float32), inputs.astype(np.float32)


def test_weights_and_biases_element_by_element(changed: tuple[Adjustment, Floats, Floats, Floats]) -> None:
    change, weight, bias, _ = changed
    assert change.rows is not None and change.columns is not None and change.shift is not None
    assert change.row_scale is not None and change.column_scale is not None and change.offset is not None
    stored, moved = change.weight(weight), change.bias(bias, weight)
    assert stored.dtype == moved.dtype == np.float32 and stored.flags.c_contiguous
    for n, row in enumerate(change.rows):
        total = float(bias[row])
        for k in range(weight.shape[1]):
            total += float(weight[row, k]) * float(change.shift[k])
        assert moved[n] == pytest.approx(total * change.row_scale[n] + change.offset[n], rel=1e-6, abs=1e-6)
        for k, column in enumerate(change.columns):
            expected = float(weight[row, column]) * change.column_scale[k] * change.row_scale[n]
            assert stored[n, k] == pytest.approx(expected, rel=1e-6)


def test_the_changed_linear_computes_the_same(changed: tuple[Adjustment, Floats, Floats, Floats]) -> None:
    """``(x' W'^T + b')`` is the rows of ``x W^T + b`` scaled and moved; without any one part it is not."""
    change, weight, bias, inputs = changed
    # An input's copies add up: each is divided by its column's factor and by how many there are.
    found = change.inputs(inputs).astype(np.float64) @ change.weight(weight).T.astype(np.float64)
    found += change.bias(bias, weight)
    whole = inputs.astype(np.float64) @ weight.T.astype(np.float64) + bias
    assert change.rows is not None and change.row_scale is not None and change.offset is not None
    expected = whole[:, change.rows] * change.row_scale + change.offset
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    for part in ("shift", "row_scale", "offset"):
        without = replace(change, **{part: None})
        other = change.inputs(inputs).astype(np.float64) @ without.weight(weight).T.astype(np.float64)
        other += without.bias(bias, weight)
        assert np.abs(other - expected).max() > 0.01 * np.abs(expected).max(), part


def test_moments_are_those_of_the_changed_inputs(changed: tuple[Adjustment, Floats, Floats, Floats]) -> None:
    change, _, _, inputs = changed
    wide = inputs.astype(np.float64)
    second, mean = (wide.T @ wide / len(wide)).astype(np.float32), wide.mean(axis=0).astype(np.float32)
    seen = change.inputs(inputs).astype(np.float64)
    expected = seen.T @ seen / len(seen)
    found = change.moments(second, mean)
    assert found.dtype == np.float32 and np.array_equal(found, found.T)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    for part in ("shift", "column_scale"):
        other = replace(change, **{part: None}).moments(second, mean)
        assert np.abs(other - expected).max() > 0.01 * np.abs(expected).max(), part


def test_a_change_of_nothing_changes_nothing() -> None:
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(5, 7)).astype(np.float32), random.normal(size=5).astype(np.float32)
    moments, nothing = random.normal(size=(7, 7)).astype(np.float32), Adjustment()
    assert np.array_equal(nothing.weight(weight), weight) and np.array_equal(nothing.bias(bias, weight), bias)
    assert np.array_equal(nothing.inputs(weight), weight)
    assert np.array_equal(nothing.moments(moments, weight[0]), moments)


def test_a_norm_emits_what_is_shifted_and_scaled() -> None:
    random = np.random.default_rng(0)
    weight, bias, normed = (random.normal(size=size).astype(np.float32) for size in (8, 8, (20, 8)))
    change = NormAdjustment(random.uniform(1, 9, 8).astype(np.float32), random.normal(0, 4, 8).astype(np.float32))
    before = normed.astype(np.float64) * weight + bias
    after = normed.astype(np.float64) * change.weight(weight) + change.bias(bias)
    np.testing.assert_allclose(after * change.scale + change.shift, before, atol=1e-5)
    assert np.abs(after - before).max() > 0.1
