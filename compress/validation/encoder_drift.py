"""How far an encoder's outputs are from its source's: arithmetic on two arrays of rows, one a text or token.

Embeddings e and f of the same texts: the cosine of each text's two vectors; and whether its nearest other text, by
cosine, is the same one under both, which is what search does with them. Scores (logits) x and y of the same items:
whether the best label is the same; KL(softmax x || softmax y) in nats; the largest difference of two scores.

Tokens of a text depend on each other, so errors of token-wise means are those of a ratio of text sums (Cochran,
Sampling Techniques, 1977, section 6): with n texts of counts c_i and sums s_i, p = sum s / sum c and
``se = sqrt(n / (n - 1) sum (s_i - p c_i)^2) / sum c``. Nearest neighbours of different texts are taken as independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from compress.errors import CompressError
from compress.validation import histogram
from compress.validation.drift import log_softmax
from compress.validation.logits import Rows

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
CHUNK_ELEMENTS = 1 << 21

#: What a row of scores means: one best label; each label by itself, yes above 0; a single number.
Head = Literal["single_label", "multi_label", "regression"]


@dataclass(frozen=True)
class EmbeddingDrift:
    """Cosines and neighbours; errors are standard errors. ``distance_counts`` has ``histogram.COSINE_EDGES``' bins."""

    texts: int
    cosine_mean: float
    cosine_min: float
    cosine_error: float | None
    neighbour_agreement: float
    neighbour_error: float
    distance_counts: tuple[int, ...]


@dataclass(frozen=True)
class LabelDrift:
    """Labels and scores; ``kl_*`` are ``None`` where scores are not a distribution.

    ``label_agreement`` of a model with one output is the share of pairs of texts that it puts in the same order.
    ``kl_counts`` are items in the bins of ``histogram.KL_EDGES``.
    """

    items: int
    label_agreement: float
    label_error: float | None
    logit_max_abs: float
    kl_mean: float | None
    kl_error: float | None
    kl_p99: float | None
    kl_counts: tuple[int, ...] | None


def measure_embeddings(reference: npt.NDArray[np.floating], artifact: npt.NDArray[np.floating]) -> EmbeddingDrift:
    """Compare embeddings float ``[texts, hidden]`` of the same texts, at least three.

    Raises:
        CompressError: Shapes disagree, or a vector is not finite or zero (names the text).
    """
    if reference.shape != artifact.shape or reference.ndim != 2 or len(reference) < 3:
        raise CompressError(
            f"embeddings of the reference are {list(reference.shape)}, of the artifact {list(artifact.shape)}"
        )
    left, right = unit(reference, "reference"), unit(artifact, "artifact")
    cosines = np.clip((left * right).sum(axis=1), -1.0, 1.0)
    same = nearest(left) == nearest(right)
    count, share = len(cosines), float(same.mean())
    return EmbeddingDrift(
        texts=count,
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        cosine_error=float(cosines.std(ddof=1) / math.sqrt(count)),
        neighbour_agreement=share,
        neighbour_error=math.sqrt(share * (1 - share) / count),
        distance_counts=histogram.counted(1 - cosines, histogram.COSINE_EDGES),
    )


def unit(vectors: npt.NDArray[np.floating], which: str) -> FloatArray:
    """Return the vectors ``[texts, hidden]`` at length one, in float64.

    Raises:
        CompressError: One is not finite, or zero.
    """
    wide = vectors.astype(np.float64)
    bad = ~np.isfinite(wide).all(axis=1)
    if bad.any():
        raise CompressError(f"the {which} gave an embedding that is not finite", where=f"text {int(bad.argmax())}")
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    if not norms.all():
        raise CompressError(f"the {which} gave an embedding of zeros", where=f"text {int((norms == 0).argmax())}")
    found: FloatArray = wide / norms
    return found


def nearest(vectors: FloatArray) -> IntArray:
    """Return for each unit vector ``[texts, hidden]`` the index of the nearest other one; the first of equals."""
    found = np.empty(len(vectors), np.int64)
    step = max(1, CHUNK_ELEMENTS // len(vectors))
    for start in range(0, len(vectors), step):
        block = vectors[start : start + step] @ vectors.T
        block[np.arange(len(block)), np.arange(start, start + len(block))] = -np.inf
        found[start : start + step] = block.argmax(axis=1)
    return found


def measure_labels(reference: Rows, artifact: Rows, counts: IntArray, head: Head = "single_label") -> LabelDrift:
    """Compare scores ``[items, labels]`` of the same items.

    Args:
        reference: The source's, float32, an array or a file.
        artifact: The artifact's.
        counts: Items of each text, int64 ``[texts]``.
        head: What a row means.

    Raises:
        CompressError: Shapes disagree, or a score is not finite (names the row).
    """
    items = _check_shapes(reference, artifact, int(counts.sum()))
    same, kl = np.zeros(items), np.zeros(items)
    largest = 0.0
    for rows, left, right in _chunks(reference, artifact):
        largest = max(largest, float(np.abs(left - right).max()))
        if head == "multi_label":
            same[rows] = ((left > 0) == (right > 0)).mean(axis=1)
        elif head == "single_label":
            same[rows] = left.argmax(axis=1) == right.argmax(axis=1)
            kl[rows] = divergence(left, right)
    if head == "regression":
        whole = slice(0, items)
        agreement = _same_order(reference[whole][:, 0].astype(np.float64), artifact[whole][:, 0].astype(np.float64))
        return LabelDrift(items, agreement, None, largest, None, None, None, None)
    single = head == "single_label"
    return LabelDrift(
        items=items,
        label_agreement=float(same.mean()),
        label_error=ratio_error(same, counts),
        logit_max_abs=largest,
        kl_mean=float(kl.mean()) if single else None,
        kl_error=ratio_error(kl, counts) if single else None,
        kl_p99=float(np.quantile(kl, 0.99)) if single else None,
        kl_counts=histogram.counted(kl, histogram.KL_EDGES) if single else None,
    )


def measure_spans(reference: Rows, artifact: Rows, counts: IntArray) -> LabelDrift:
    """Compare ``(start, end)`` scores ``[tokens, 2]``: the positions of a text are the labels to choose from.

    An item is a text; it agrees if its best start and its best end are both the same. The divergence is the mean of
    start's and end's.

    Raises:
        CompressError: Shapes disagree, or a score is not finite.
    """
    _check_shapes(reference, artifact, int(counts.sum()))
    same, kl = np.zeros(len(counts)), np.zeros(len(counts))
    largest, start = 0.0, 0
    for index, count in enumerate(counts):
        rows = slice(start, start + int(count))
        left, right = (_finite(side[rows], which, start).T for side, which in _sides(reference, artifact))
        largest = max(largest, float(np.abs(left - right).max()))
        same[index] = (left.argmax(axis=1) == right.argmax(axis=1)).all()
        kl[index] = divergence(left, right).mean()
        start += int(count)
    ones = np.ones(len(counts), np.int64)
    return LabelDrift(
        items=len(counts),
        label_agreement=float(same.mean()),
        label_error=ratio_error(same, ones),
        logit_max_abs=largest,
        kl_mean=float(kl.mean()),
        kl_error=ratio_error(kl, ones),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_counts=histogram.counted(kl, histogram.KL_EDGES),
    )


def divergence(left: FloatArray, right: FloatArray) -> FloatArray:
    """Return KL(softmax left || softmax right) of each row in nats; rounding below zero is cut off."""
    log_p, log_q = log_softmax(left), log_softmax(right)
    found: FloatArray = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return np.maximum(found, 0.0)


def ratio_error(values: FloatArray, counts: IntArray) -> float | None:
    """Return the standard error of the mean of ``values`` ``[items]``, which come in texts of ``counts`` items.

    ``None`` with fewer than two texts that have any.
    """
    counts = counts[counts > 0]
    texts = len(counts)
    if texts < 2:
        return None
    sums = np.add.reduceat(values, np.cumsum(counts) - counts)
    residuals = sums - values.mean() * counts
    return float(math.sqrt(texts / (texts - 1) * float(residuals @ residuals)) / counts.sum())


def _same_order(left: FloatArray, right: FloatArray) -> float:
    """Return the share of pairs that both put in the same order; a tie is an order of its own."""
    agree = np.sign(left[:, None] - left) == np.sign(right[:, None] - right)
    count = len(left)
    return float((agree.sum() - count) / (count * (count - 1))) if count > 1 else 1.0


def _sides(reference: Rows, artifact: Rows) -> tuple[tuple[Rows, str], tuple[Rows, str]]:
    return (reference, "reference"), (artifact, "artifact")


def _chunks(reference: Rows, artifact: Rows) -> Iterator[tuple[slice, FloatArray, FloatArray]]:
    items, columns = reference.shape
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, items, step):
        rows = slice(start, min(items, start + step))
        left, right = (_finite(side[rows], which, start) for side, which in _sides(reference, artifact))
        yield rows, left, right


def _finite(scores: npt.NDArray[np.float32], which: str, start: int) -> FloatArray:
    bad = ~np.isfinite(scores).all(axis=1)
    if bad.any():
        raise CompressError(f"the {which} gave scores that are not finite", where=f"row {start + int(bad.argmax())}")
    return scores.astype(np.float64)


def _check_shapes(reference: Rows, artifact: Rows, rows: int) -> int:
    if reference.shape != artifact.shape or len(reference.shape) != 2 or reference.shape[0] != rows or rows < 1:
        raise CompressError(
            f"scores of the reference are {list(reference.shape)}, of the artifact {list(artifact.shape)}, "
            f"and {rows} rows were asked for"
        )
    return rows
