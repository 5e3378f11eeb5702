"""Wanda and SparseGPT against their papers, written again column by column in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from compress.prune.masks import per_group, per_row
from compress.prune.sparsegpt import BLOCK, DAMPING
from compress.prune.sparsegpt import SPARSIFIER as SPARSEGPT
from compress.prune.wanda import SPARSIFIER as WANDA

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
CASES = [(0.5, None), (0.2, None), (0.9, None), (0.5, (2, 4)), (0.75, (1, 4)), (0.5, (4, 8))]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the driver calls it; threads that wait for each other take minutes on a busy machine."""
    with threadpool_limits(1, "blas"):
        yield


def layer(rows: int, columns: int, seed: int = 0, tokens: int = 400) -> tuple[Floats, Floats]:
    """Return a weight and the second moments of inputs that are correlated, with a few large channels."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(tokens, columns)) @ random.normal(size=(columns, columns)) / columns**0.5
    values = (0.5 * random.normal(size=(tokens, columns)) + mixed) * random.lognormal(0, 0.6, columns)
    weight = random.standard_t(5, (rows, columns)) * 0.05
    return weight.astype(np.float32), (values.T @ values / tokens).astype(np.float32)


def low_rank_layer(rows: int, columns: int, seed: int) -> tuple[Floats, Floats]:
    """Return a weight and moments of inputs that a quarter as many hidden causes explain for the most part."""
    random = np.random.default_rng(seed)
    causes = random.normal(size=(600, columns // 4)) @ random.normal(size=(columns // 4, columns))
    values = causes / (columns // 4) ** 0.5 + 0.3 * random.normal(size=(600, columns))
    values *= random.lognormal(0, 0.6, columns)
    weight = random.standard_t(5, (rows, columns)) * 0.05
    return weight.astype(np.float32), (values.T @ values / 600).astype(np.float32)


def damped(moments: Floats) -> Doubles:
    wide = moments.astype(np.float64)
    mean = np.mean(np.diagonal(wide)[np.diagonal(wide) > 0])
    return wide + DAMPING * mean * np.eye(len(wide))


def loss(weight: Floats, sparse: npt.NDArray[Any], moments: npt.NDArray[Any]) -> float:
    """Return ``trace(E H E^T)``: the mean square error of the outputs, summed over them."""
    error = sparse.astype(np.float64) - weight
    return float(np.sum((error @ moments.astype(np.float64)) * error))


def rows_of_inverses(matrix: Doubles) -> list[Doubles]:
    """Return the first row of the inverse of ``matrix[c:, c:]`` for every c, by elimination from the whole inverse."""
    left, rows = np.linalg.inv(matrix), []
    while len(left):
        rows.append(left[0])
        left = left[1:, 1:] - np.outer(left[1:, 0], left[0, 1:]) / left[0, 0]
    return rows


def oracle(
    weight: Floats, sparsity: float, pattern: tuple[int, int] | None, moments: Floats, *, update: float = 1.0
) -> Doubles:
    """SparseGPT with an inverse of its own for every column, of the moments of the columns that are left."""
    rest = weight.astype(np.float64)
    rows, columns = weight.shape
    inverses = rows_of_inverses(damped(moments))
    mask = np.zeros(weight.shape, np.bool_)
    for column in range(columns):
        size = pattern[1] if pattern else BLOCK
        if column % size == 0:
            block = range(column, min(column + size, columns))
            scores = np.stack([rest[:, c] ** 2 / inverses[c][0] for c in block], axis=1)
            if pattern:
                for row in range(rows):
                    mask[row, column + np.argsort(scores[row], kind="stable")[: size - pattern[0]]] = True
            else:
                count = round(sparsity * rows * block.stop) - round(sparsity * rows * block.start)
                chosen = np.argsort(scores, axis=None, kind="stable")[:count]
                mask[:, block.start : block.stop].reshape(rows, -1)[np.unravel_index(chosen, scores.shape)] = True
        for row in np.flatnonzero(mask[:, column]):
            direction = inverses[column] / inverses[column][0]
            rest[row, column:] -= update * rest[row, column] * direction
            rest[row, column] = 0
    return rest


@pytest.mark.parametrize(("sparsity", "pattern"), CASES)
@pytest.mark.parametrize("columns", [8, 64, 136, 264])
def test_sparsegpt_is_the_papers(columns: int, sparsity: float, pattern: tuple[int, int] | None) -> None:
    weight, moments = layer(12, columns, seed=columns)
    result, expected = (
        SPARSEGPT.sparsify(weight, sparsity, pattern, moments),
        oracle(weight, sparsity, pattern, moments),
    )
    assert result.dtype == np.float32 and result.flags.c_contiguous
    np.testing.assert_array_equal(result == 0, expected == 0)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5 * scale)
    # Negative controls: updates half as large, twice as large, and moments of independent inputs.
    for update in (0.5, 2.0):
        assert np.abs(result - oracle(weight, sparsity, pattern, moments, update=update)).max() > 2e-3 * scale
    alone = np.diag(np.diagonal(moments)).copy()
    assert np.abs(result - oracle(weight, sparsity, pattern, alone)).max() > 2e-3 * scale


@pytest.mark.parametrize("columns", [1, 2, 33, 129])
def test_sparsegpt_at_awkward_widths(columns: int) -> None:
    weight, moments = layer(7, columns, seed=columns)
    result, expected = SPARSEGPT.sparsify(weight, 0.4, None, moments), oracle(weight, 0.4, None, moments)
    np.testing.assert_array_equal(result == 0, expected == 0)
    np.testing.assert_allclose(result, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert np.count_nonzero(result == 0) == round(0.4 * weight.size)


def test_sparsegpt_is_the_least_squares_optimum_where_it_can_be() -> None:
    """If the columns that go are the first, all others may make up for them: the optimum, found here by brute force.

    Which ones go is no choice either: they are the cheapest of all sets of that size.
    """
    random = np.random.default_rng(3)
    mixed = random.normal(size=(50, 6)) @ (np.eye(6) + 0.3 * random.normal(size=(6, 6)))
    moments = (mixed.T @ mixed / 50).astype(np.float32)
    weight = np.array([[0.01, -0.02, 0.03, 1.0, -1.5, 2.0]], np.float32)
    result, wide = SPARSEGPT.sparsify(weight, 0.5, None, moments), damped(moments)

    def best(gone: tuple[int, ...]) -> tuple[float, Doubles]:
        left = [column for column in range(6) if column not in gone]
        target = wide[left] @ weight[0].astype(np.float64)
        solved = np.zeros((1, 6))
        solved[0, left] = np.linalg.solve(wide[np.ix_(left, left)], target)
        return loss(weight, solved, wide), solved

    losses = {gone: best(gone) for gone in itertools.combinations(range(6), 3)}
    gone = min(losses, key=lambda each: losses[each][0])
    assert gone == (0, 1, 2)
    np.testing.assert_allclose(result, losses[gone][1], rtol=0, atol=1e-6)
    # Negative control: without making up for it the weights are others by far.
    assert np.abs(np.where(result == 0, 0, weight) - losses[gone][1]).max() > 1e-3


@pytest.mark.parametrize("columns", [8, 33, 130])
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_wanda_is_the_papers(columns: int, sparsity: float) -> None:
    """One row after the other, with the score of every weight written out."""
    weight, moments = layer(9, columns, seed=columns)
    result = WANDA.sparsify(weight, sparsity, None, moments)
    for row in range(9):
        scores = [
            (abs(float(weight[row, column])) * float(moments[column, column]) ** 0.5, column)
            for column in range(columns)
        ]
        gone = {column for _, column in sorted(scores)[: round(sparsity * columns)]}
        assert gone == set(np.flatnonzero(result[row] == 0).tolist())
    np.testing.assert_array_equal(result[result != 0], weight[result != 0])
    # Negative controls: without the inputs, and with their mean squares, the choice is another.
    for power in (0, 2):
        scores_of = np.abs(weight) * np.sqrt(np.diagonal(moments)) ** power
        assert ((result == 0) != per_row(scores_of, sparsity)).any()


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6), st.integers(1, 70), st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (5, 8)]), st.integers(0, 99)
)
def test_patterns_are_kept_exactly(rows: int, groups: int, pattern: tuple[int, int], seed: int) -> None:
    kept, of = pattern
    weight, moments = layer(rows, groups * of, seed, tokens=50)
    for sparsifier in (WANDA, SPARSEGPT):
        result = sparsifier.sparsify(weight, 1 - kept / of, pattern, moments)
        assert (np.count_nonzero(result.reshape(rows, groups, of) == 0, axis=2) == of - kept).all()
    expected = per_group(np.abs(weight) * np.sqrt(np.diagonal(moments)), pattern)
    np.testing.assert_array_equal(WANDA.sparsify(weight, 1 - kept / of, pattern, moments) == 0, expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("sparsity", "pattern"), CASES)
def test_what_is_known_of_the_inputs_helps(seed: int, sparsity: float, pattern: tuple[int, int] | None) -> None:
    """On correlated inputs: making up for it beats choosing well, which beats magnitude."""
    weight, moments = low_rank_layer(32, 256, seed)
    plain = np.abs(weight)
    magnitude = np.where(per_row(plain, sparsity) if pattern is None else per_group(plain, pattern), 0, weight)
    losses = [
        loss(weight, each, moments)
        for each in (
            SPARSEGPT.sparsify(weight, sparsity, pattern, moments),
            WANDA.sparsify(weight, sparsity, pattern, moments),
            magnitude,
        )
    ]
    assert losses[0] < 0.95 * losses[1] and losses[1] < 0.8 * losses[2]
    assert sparsity == 0.9 or losses[0] < 0.6 * losses[1]


def test_channels_without_input_go_first_and_make_up_for_nothing() -> None:
    weight, moments = layer(6, 40, seed=5)
    moments[7], moments[:, 7] = 0, 0
    for sparsifier in (WANDA, SPARSEGPT):
        result = sparsifier.sparsify(weight, 0.25, None, moments)
        assert (result[:, 7] == 0).all()
    # More of them than are to go: those that stay are as they were.
    moments[:30], moments[:, :30] = 0, 0
    result = SPARSEGPT.sparsify(weight, 0.25, None, moments)
    assert (result[:, 30:] != 0).all()
    np.testing.assert_array_equal(result[result != 0], weight[result != 0])
    # Nothing is known: no error, half of each goes.
    for sparsifier in (WANDA, SPARSEGPT):
        assert np.count_nonzero(sparsifier.sparsify(weight, 0.5, None, np.zeros((40, 40), np.float32))) == 120


def test_with_a_pattern_rows_are_independent() -> None:
    weight, moments = layer(10, 128, seed=8)
    for sparsifier in (WANDA, SPARSEGPT):
        whole = sparsifier.sparsify(weight, 0.5, (2, 4), moments)
        np.testing.assert_allclose(sparsifier.sparsify(weight[3:7], 0.5, (2, 4), moments), whole[3:7], atol=1e-6)


def test_few_tokens_are_enough_for_moments_of_low_rank() -> None:
    weight, moments = layer(8, 96, seed=2, tokens=10)
    result = SPARSEGPT.sparsify(weight, 0.5, None, moments)
    assert np.isfinite(result).all()
    assert loss(weight, result, moments) < 0.2 * loss(weight, WANDA.sparsify(weight, 0.5, None, moments), moments)
