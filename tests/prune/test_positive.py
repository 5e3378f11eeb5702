"""Factorisations in a matrix's own memory against NumPy's general ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from compress.contracts import Units
from compress.errors import CompressError
from compress.prune import _positive
from compress.prune._positive import invert, selected, solve
from compress.prune.refit import refit
from compress.prune.surgeon import PRUNER


def definite(size: int, kind: type[np.floating[Any]]) -> np.ndarray[Any, Any]:
    """Return a symmetric positive definite matrix with eigenvalues from about 0.1 to 4."""
    draw = np.random.default_rng(size).normal(size=(2 * size, size)) / (2 * size) ** 0.5
    return np.asarray(draw.T @ draw + 0.1 * np.eye(size), kind)


@pytest.mark.parametrize(("kind", "tolerance"), [(np.float32, 2e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("size", [1, 37, 600])
def test_the_inverse_and_the_solution_are_numpys(size: int, kind: type[np.floating[Any]], tolerance: float) -> None:
    matrix = definite(size, kind)
    rows = np.random.default_rng(1).normal(size=(300, size)).astype(kind)
    expected = np.linalg.inv(matrix.astype(np.float64))
    inverse, solution = matrix.copy(), rows.copy()
    assert invert(inverse)
    assert solve(matrix.copy(), solution, lambda work, pieces: [work(piece) for piece in pieces])
    scale = np.abs(expected).max()
    assert np.abs(inverse - expected).max() < tolerance * scale
    assert np.abs(solution - rows @ expected).max() < 10 * tolerance * scale
    # The negative control: what a forgotten half of the symmetric matrix would give.
    assert size == 1 or np.abs(np.tril(inverse) - expected).max() > 100 * tolerance * scale


def test_a_solution_does_not_depend_on_threads() -> None:
    def by_threads(work: Callable[[Any], Any], pieces: Iterable[Any]) -> list[Any]:
        with ThreadPoolExecutor(3) as pool:
            return list(pool.map(work, pieces))

    found = []
    for run in (by_threads, lambda work, pieces: [work(piece) for piece in pieces]):
        rows = np.random.default_rng(2).normal(size=(700, 90)).astype(np.float32)
        assert solve(definite(90, np.float32), rows, run)
        found.append(rows.tobytes())
    assert found[0] == found[1]


def test_a_matrix_that_is_not_definite_is_told() -> None:
    matrix = definite(20, np.float64)
    matrix[7] = matrix[:, 7] = 0
    matrix[7, 7] = -1
    rows = np.ones((3, 20))
    assert not solve(matrix.copy(), rows, lambda work, pieces: [work(piece) for piece in pieces])
    assert (rows == 1).all()
    assert not invert(matrix)


@pytest.mark.parametrize(("rows", "columns"), [([0, 3, 700], [1, 2]), (range(1, 701), range(0, 500, 2)), ([], [])])
def test_rows_and_columns_are_selected_in_place(rows: Iterable[int], columns: Iterable[int]) -> None:
    matrix = np.random.default_rng(3).normal(size=(701, 500))
    asked = np.array(list(rows), np.int64), np.array(list(columns), np.int64)
    expected = matrix[np.ix_(*asked)]
    found = selected(matrix, *asked)
    assert np.array_equal(found, expected)
    assert not found.size or np.shares_memory(found, matrix)


def correlated(tokens: int, channels: int) -> np.ndarray[Any, Any]:
    """Return float32 inputs whose channels say some of the same."""
    draw = np.random.default_rng(4)
    mixing = np.eye(channels) + 0.5 * draw.normal(size=(channels, channels)) / channels**0.5
    return np.asarray(draw.normal(size=(tokens, channels)) @ mixing, np.float32)


def test_very_wide_linears_are_pruned_the_same_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """From ``WIDE`` channels on all is float32, in the moments' own memory: here it begins at one channel."""
    x, draw = correlated(900, 96), np.random.default_rng(5)
    weight = draw.normal(size=(20, 96)).astype(np.float32)
    wanted = (x @ weight.T + 0.1 * draw.normal(size=(900, 20))).astype(np.float32)
    seen = (x.T @ x / len(x)).astype(np.float32)
    removals, fits, overwritten = [], [], []
    for least in (6000, 1):
        monkeypatch.setattr(_positive, "WIDE", least)
        moments = seen.copy()
        removals.append(PRUNER.remove(Units(weight, np.zeros(96, np.float32), moments), 70, seed=0))
        overwritten.append(not np.array_equal(moments, seen))
        part = np.ascontiguousarray(weight[:, :60])
        counts = np.ones(900, np.float32)
        run = lambda work, some: [work(piece) for piece in some]  # noqa: E731
        fits.append(refit(np.ascontiguousarray(x[:, :60]), wanted.copy(), part, None, counts, run))
    assert overwritten == [False, True]
    assert np.array_equal(removals[0].order, removals[1].order)
    np.testing.assert_allclose(removals[1].losses, removals[0].losses, rtol=1e-4)
    assert fits[0].share == fits[1].share and fits[1].after < fits[1].before
    change = np.abs(fits[0].weight - weight[:, :60]).max()
    assert np.abs(fits[1].weight - fits[0].weight).max() < 1e-4 * change
    # The negative control: without the correction of what stays another order comes out.
    diagonal = Units(weight, np.zeros(96, np.float32), np.diag(np.diagonal(seen)).copy())
    assert not np.array_equal(PRUNER.remove(diagonal, 70, seed=0).order, removals[0].order)


def test_moments_without_an_inverse_are_told() -> None:
    moments = np.diag([1.0, -1.0, 1.0]).astype(np.float32)
    with pytest.raises(CompressError, match="too near to singular"):
        PRUNER.remove(Units(np.ones((2, 3), np.float32), np.ones(3, np.float32), moments), 1, seed=0)
