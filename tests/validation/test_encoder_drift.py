"""Encoder drift: the arithmetic against naive loops, and what must not pass for agreement."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from compress.errors import CompressError
from compress.validation import encoder_drift
from compress.validation.encoder_drift import (
    measure_embeddings,
    measure_labels,
    measure_spans,
    nearest,
    ratio_error,
    unit,
)
from compress.validation.histogram import COSINE_EDGES, KL_EDGES


def rows(count: int, columns: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(count, columns)).astype(np.float32)


def kl(left: Any, right: Any) -> float:
    """KL of two score vectors by the definition."""
    p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum() for x in (left, right))
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


def test_cosines_and_neighbours_are_those_of_a_naive_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_drift, "CHUNK_ELEMENTS", 100)  # several chunks
    left = rows(23, 6)
    right = left + 0.4 * rows(23, 6, 1)

    def cosine(a: Any, b: Any) -> float:
        return float(a.astype(float) @ b.astype(float) / np.linalg.norm(a) / np.linalg.norm(b))

    def naive(side: Any) -> list[int]:
        return [max((j for j in range(23) if j != i), key=lambda j: cosine(side[i], side[j])) for i in range(23)]

    found = measure_embeddings(left, right)
    cosines = np.array([cosine(a, b) for a, b in zip(left, right, strict=True)])
    assert found.cosine_mean == pytest.approx(cosines.mean(), abs=1e-7)
    assert found.cosine_min == pytest.approx(cosines.min(), abs=1e-7)
    assert found.cosine_error == pytest.approx(cosines.std(ddof=1) / math.sqrt(23), rel=1e-5)
    same = np.mean([a == b for a, b in zip(naive(left), naive(right), strict=True)])
    assert found.neighbour_agreement == pytest.approx(same) and 0 < same < 1
    assert found.neighbour_error == pytest.approx(math.sqrt(same * (1 - same) / 23))
    bins = zip(COSINE_EDGES[:-1], COSINE_EDGES[1:], strict=True)
    inside = [int(((1 - cosines >= low) & (1 - cosines < high)).sum()) for low, high in bins]
    assert list(found.distance_counts) == inside and sum(inside) == 23 > max(inside)
    assert measure_embeddings(left, left).distance_counts[0] == 23
    assert nearest(unit(left, "x")).tolist() == naive(left)


def test_length_does_not_count_but_order_does() -> None:
    left = rows(10, 8)
    scaled = measure_embeddings(left, left * np.linspace(0.5, 3, 10, dtype=np.float32)[:, None])
    assert scaled.cosine_min == pytest.approx(1) and scaled.neighbour_agreement == 1
    swapped = measure_embeddings(left, left[[1, 0, *range(2, 10)]])
    assert swapped.cosine_min < 0.9 and swapped.neighbour_agreement < 1


@pytest.mark.parametrize("head", ["single_label", "multi_label"])
def test_labels_are_counted_as_a_naive_loop_does(head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_drift, "CHUNK_ELEMENTS", 12)
    left = rows(30, 4)
    right = left + 0.5 * rows(30, 4, 1)
    counts = np.array([7, 0, 11, 12])
    found = measure_labels(left, right, counts, head)
    if head == "single_label":
        same = [bool(np.argmax(a) == np.argmax(b)) for a, b in zip(left, right, strict=True)]
        values = np.array([kl(a, b) for a, b in zip(left, right, strict=True)])
        assert found.kl_mean == pytest.approx(values.mean()) and found.kl_p99 == pytest.approx(
            np.quantile(values, 0.99)
        )
        assert found.kl_error == pytest.approx(ratio_error(values, counts))
        bins = zip(KL_EDGES[:-1], KL_EDGES[1:], strict=True)
        assert found.kl_counts == tuple(int(((values >= low) & (values < high)).sum()) for low, high in bins)
        assert sum(found.kl_counts) == found.items
    else:
        same = ((left > 0) == (right > 0)).mean(axis=1).tolist()
        assert found.kl_mean is None and found.kl_counts is None
    assert found.label_agreement == pytest.approx(np.mean(same)) and 0 < found.label_agreement < 1
    assert found.items == 30 and found.logit_max_abs == pytest.approx(np.abs(left - right).max())


def test_a_single_output_is_judged_by_the_order_of_texts() -> None:
    left = np.array([[1.0], [2.0], [3.0], [4.0]], np.float32)
    ones = np.ones(4, np.int64)
    assert measure_labels(left, 2 * left + 7, ones, "regression").label_agreement == 1
    one_swap = measure_labels(left, left[[1, 0, 2, 3]], ones, "regression")
    assert one_swap.label_agreement == pytest.approx(5 / 6) and one_swap.kl_mean is None
    assert measure_labels(left, np.ones_like(left), ones, "regression").label_agreement == 0  # says nothing any more


def test_spans_choose_among_the_positions_of_their_text() -> None:
    left, right = rows(9, 2), rows(9, 2, 1)
    counts = np.array([4, 5])
    found = measure_spans(left, right, counts)
    same, values = [], []
    for part in (slice(0, 4), slice(4, 9)):
        a, b = left[part], right[part]
        same.append(bool((a.argmax(0) == b.argmax(0)).all()))
        values.append((kl(a[:, 0], b[:, 0]) + kl(a[:, 1], b[:, 1])) / 2)
    assert found.items == 2 and found.label_agreement == np.mean(same)
    assert found.kl_mean == pytest.approx(np.mean(values)) and sum(found.kl_counts or ()) == 2
    assert measure_spans(left, left, counts).label_agreement == 1
    end = left.copy()
    end[0, 1] = 99  # only the end moved
    assert measure_spans(left, end, counts).label_agreement == 0.5


def test_errors_grow_with_the_dependence_within_texts() -> None:
    generator = np.random.default_rng(0)
    counts = np.full(400, 5)
    apart = (generator.random(2000) < 0.9).astype(float)
    together = np.repeat((generator.random(400) < 0.9).astype(float), 5)
    assert ratio_error(apart, counts) == pytest.approx(math.sqrt(0.09 / 2000), rel=0.1)
    assert ratio_error(together, counts) == pytest.approx(math.sqrt(0.09 / 400), rel=0.1)
    assert ratio_error(np.ones(3), np.array([3])) is None
    values, uneven = generator.random(10), np.array([1, 6, 3])
    residual = np.array([values[:1].sum(), values[1:7].sum(), values[7:].sum()]) - values.mean() * uneven
    assert ratio_error(values, uneven) == pytest.approx(math.sqrt(1.5 * (residual**2).sum()) / 10)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_named(bad: float) -> None:
    good, broken = rows(6, 3), rows(6, 3)
    broken[4, 1] = bad
    ones = np.ones(6, np.int64)
    with pytest.raises(CompressError, match="the artifact gave an embedding that is not finite(.|\n)*text 4"):
        measure_embeddings(good, broken)
    with pytest.raises(CompressError, match="the reference gave scores that are not finite(.|\n)*row 4"):
        measure_labels(broken, good, ones)
    with pytest.raises(CompressError, match="not finite"):
        measure_spans(good[:, :2], broken[:, :2], np.array([6]))


def test_what_does_not_fit_together_is_refused() -> None:
    zeros = rows(4, 3)
    zeros[2] = 0
    with pytest.raises(CompressError, match="an embedding of zeros(.|\n)*text 2"):
        measure_embeddings(rows(4, 3), zeros)
    with pytest.raises(CompressError, match="embeddings of the reference are"):
        measure_embeddings(rows(4, 3), rows(4, 2))
    with pytest.raises(CompressError, match="and 5 rows were asked for"):
        measure_labels(rows(4, 3), rows(4, 3), np.array([5]))
