"""Which weights go: exact counts, exact groups, ties, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compress.contracts import Sparsifier
from compress.errors import CompressError, UsageError
from compress.prune import sparsegpt, wanda
from compress.prune.masks import lowest, per_group, per_row

SPARSIFIERS: list[Sparsifier] = [wanda.SPARSIFIER, sparsegpt.SPARSIFIER]
by_name = pytest.mark.parametrize("sparsifier", SPARSIFIERS, ids=lambda each: each.name)


def sorted_lowest(scores: npt.NDArray[Any], count: int) -> npt.NDArray[np.bool_]:
    """The oracle: a stable sort, row by row."""
    mask = np.zeros(scores.shape, np.bool_)
    for row, line in enumerate(scores):
        mask[row, sorted(range(len(line)), key=lambda place: (line[place], place))[:count]] = True
    return mask


@given(st.data())
def test_the_lowest_and_of_equal_ones_the_first(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 33)))
    # Few values, so that most are equal to others.
    scores = data.draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0])))
    count = data.draw(st.integers(0, shape[1]))
    np.testing.assert_array_equal(lowest(scores, count), sorted_lowest(scores, count))


def test_counts_are_exact() -> None:
    scores = np.random.default_rng(0).random((5, 33)).astype(np.float32)
    for sparsity in (0.0, 0.01, 0.3, 0.5, 0.99):
        assert (per_row(scores, sparsity).sum(axis=1) == round(sparsity * 33)).all()
    mask = per_group(scores[:, :32], (2, 4))
    assert (mask.reshape(5, 8, 4).sum(axis=2) == 2).all()
    kept, removed = (np.where(each, scores[:, :32], fill) for each, fill in ((~mask, np.inf), (mask, -np.inf)))
    assert (kept.reshape(5, 8, 4).min(axis=2) >= removed.reshape(5, 8, 4).max(axis=2)).all()
    assert per_group(np.array([[4, 3, 2, 1, 1, 2, 3, 4]], np.float32), (1, 4)).astype(int).tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 0]
    ]
    with pytest.raises(ValueError, match="34 of 33"):
        lowest(scores, 34)


def inputs(columns: int = 8, rows: int = 3) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    return np.ones((rows, columns), np.float32), np.eye(columns, dtype=np.float32)


@by_name
@pytest.mark.parametrize(
    ("sparsity", "pattern", "message"),
    [
        (1.0, None, "a sparsity of 1 leaves nothing"),
        (-0.1, None, "makes no sense"),
        (float("nan"), None, "makes no sense"),
        (0.5, (4, 4), "the pattern 4:4 makes no sense"),
        (1.0, (0, 4), "leaves nothing"),
        (0.3, (2, 4), "the pattern 2:4 sets 0.5 of the weights to zero, not 0.3"),
        (0.5, (3, 6), "rows of 8 weights: 8 is no multiple of 6"),
    ],
)
def test_what_makes_no_sense(sparsifier: Sparsifier, sparsity: float, pattern: Any, message: str) -> None:
    weight, moments = inputs()
    with pytest.raises(UsageError, match=message):
        sparsifier.sparsify(weight, sparsity, pattern, moments)


@by_name
def test_arrays_that_do_not_fit(sparsifier: Sparsifier) -> None:
    weight, moments = inputs()
    for bad in ((weight, moments[:7]), (weight[0], moments), (weight.astype(np.float64), moments)):
        with pytest.raises(ValueError, match=r"do not fit|must be float32"):
            sparsifier.sparsify(bad[0], 0.5, None, bad[1])  # type: ignore[arg-type]
    spoilt = weight.copy()
    spoilt[1, 2] = np.nan
    with pytest.raises(CompressError, match=r"weight\[1, 2\] is nan"):
        sparsifier.sparsify(spoilt, 0.5, None, moments)
    for value in (np.nan, -1.0):
        wrong = moments.copy()
        wrong[3, 3] = value
        with pytest.raises(CompressError, match=r"moments\[3, 3\] is"):
            sparsifier.sparsify(weight, 0.5, None, wrong)


@by_name
@pytest.mark.parametrize("rows", [1, 4])
def test_inputs_stay_as_they_are(sparsifier: Sparsifier, rows: int) -> None:
    random = np.random.default_rng(1)
    weight, moments = random.normal(size=(rows, 8)).astype(np.float32), inputs()[1]
    before = weight.copy(), moments.copy()
    nothing = sparsifier.sparsify(weight, 0.0, None, moments)
    sparsifier.sparsify(weight, 0.5, (2, 4), moments)
    np.testing.assert_array_equal(weight, before[0])
    np.testing.assert_array_equal(moments, before[1])
    np.testing.assert_array_equal(nothing, weight)
    assert nothing is not weight and nothing.dtype == np.float32
    for shape in ((0, 8), (4, 0)):
        empty = np.zeros(shape, np.float32)
        assert sparsifier.sparsify(empty, 0.5, None, np.eye(shape[1], dtype=np.float32)).shape == shape
