"""How far an artifact's next-token distributions are from its source's: arithmetic on two arrays of logits.

For position t with reference distribution p and artifact distribution q (softmax of the logits):

- KL divergence ``sum_v p_v (log p_v - log q_v)`` in nats (Kullback and Leibler, 1951);
- negative log likelihood of the text's own next token, ``-log p[x_{t+1}]``; perplexity is the exponential of its mean;
- the ratio of perplexities is ``exp(mean d)`` with ``d_t = nll_q(t) - nll_p(t)``. Its standard error is taken on the
  *paired* differences, by the delta method ``ratio * se(mean d)``: unpaired errors are ten times larger.

Tokens of a window depend on each other, so standard errors are clustered by window: the windows' means are the sample.
Every position but a window's last is scored. Work is in float64 a few positions at a time, never the whole array.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from compress.errors import CompressError
from compress.validation import histogram
from compress.validation.logits import Rows
from compress.validation.losses import Losses, digest

FloatArray = npt.NDArray[np.float64]
CHUNK_ELEMENTS = 1 << 21
CONFIDENT = 0.5


@dataclass(frozen=True)
class Drift:
    """What the source lost on a text. Divergences in nats, shares in 0..1, errors ``None`` with fewer than 2 windows.

    Attributes:
        tokens: Scored positions.
        reference_perplexity: The source model's.
        artifact_perplexity: The artifact's.
        perplexity_ratio: Artifact over reference.
        perplexity_ratio_error: Its paired standard error.
        kl_mean: Mean KL(reference || artifact).
        kl_error: The mean's standard error.
        kl_p99: The 99th percentile over positions.
        top1_agreement: Share of positions with the same most likely token.
        confident_tokens: Positions where the source gives its best token at least one half.
        confident_flips: How many of those have another best token in the artifact.
        max_abs_difference: Largest absolute difference of two logits.
        kl_counts: Positions by their KL divergence, in the bins of ``histogram.KL_EDGES``.
        losses: The artifact's, position by position.
    """

    tokens: int
    reference_perplexity: float
    artifact_perplexity: float
    perplexity_ratio: float
    perplexity_ratio_error: float | None
    kl_mean: float
    kl_error: float | None
    kl_p99: float
    top1_agreement: float
    confident_tokens: int
    confident_flips: int
    max_abs_difference: float
    kl_counts: tuple[int, ...]
    losses: Losses = field(repr=False, compare=False)


@dataclass(frozen=True)
class DecodeDrift:
    """Whether decoding through the cache computes what prefill computes.

    Attributes:
        tokens: Positions decoded one by one.
        kl_mean: Mean KL(reference || decoded).
        prefill_kl_mean: Mean KL(reference || prefilled) at the same positions.
        self_kl_mean: Mean KL(prefilled || decoded): the artifact against itself.
        self_kl_max: The largest of those.
    """

    tokens: int
    kl_mean: float
    prefill_kl_mean: float
    self_kl_mean: float
    self_kl_max: float


def log_softmax(logits: npt.NDArray[np.floating]) -> FloatArray:
    """Return the logarithm of the softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def measure(reference: Rows, artifact: Rows, windows: npt.NDArray[np.int64]) -> Drift:
    """Compare two arrays of logits on the same tokens.

    Args:
        reference: float32 ``[windows * length, vocab]``, the source's logits (an array, or a file of them).
        artifact: The artifact's, same shape.
        windows: int64 ``[windows, length]`` token ids, length at least 2.

    Raises:
        CompressError: Shapes disagree, a logit is not finite (names the window), or the loss is past any perplexity.
    """
    count, length = windows.shape
    vocab = _check_shapes(reference, artifact, windows.size)
    if count < 1 or length < 2:
        raise CompressError(f"drift needs windows of at least 2 tokens, not {count} of {length}")
    kl, nll, difference = (np.zeros((count, length - 1)) for _ in range(3))
    nll_sum = 0.0
    same = confident = flips = 0
    largest = 0.0
    for window, start, stop in _chunks(count, length - 1, vocab):
        rows = slice(window * length + start, window * length + stop)
        left, right = _finite(reference[rows], "reference", window), _finite(artifact[rows], "artifact", window)
        largest = max(largest, float(np.abs(left.astype(np.float64) - right).max()))
        log_p, log_q = log_softmax(left), log_softmax(right)
        kl[window, start:stop] = _kl(log_p, log_q)
        index = np.arange(stop - start)
        following = windows[window, start + 1 : stop + 1]
        nll_sum -= float(log_p[index, following].sum())
        nll[window, start:stop] = -log_q[index, following]
        difference[window, start:stop] = log_p[index, following] - log_q[index, following]
        best = log_p.argmax(axis=1)
        agrees = best == log_q.argmax(axis=1)
        sure = log_p[index, best] >= np.log(CONFIDENT)
        same, confident = same + int(agrees.sum()), confident + int(sure.sum())
        flips += int((sure & ~agrees).sum())
    tokens = kl.size
    mean_nll, mean_difference = nll_sum / tokens, float(difference.mean())
    ratio = _exp(mean_difference)
    error = clustered_error(difference)
    return Drift(
        tokens=tokens,
        reference_perplexity=_exp(mean_nll),
        artifact_perplexity=_exp(mean_nll + mean_difference),
        perplexity_ratio=ratio,
        perplexity_ratio_error=None if error is None else ratio * error,
        kl_mean=float(kl.mean()),
        kl_error=clustered_error(kl),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=same / tokens,
        confident_tokens=confident,
        confident_flips=flips,
        max_abs_difference=largest,
        kl_counts=histogram.counted(kl, histogram.KL_EDGES),
        losses=Losses(nll.astype(np.float32), kl.astype(np.float32), digest(windows)),
    )


def measure_decode(
    reference: Rows,
    prefilled: Rows,
    decoded: Rows,
    steps: int,
) -> DecodeDrift:
    """Compare step-by-step decoding with the source and with the artifact's own prefill, at the same positions.

    Args:
        reference: float32 ``[windows * steps, vocab]``, the source's logits at the decoded positions.
        prefilled: The artifact's at once.
        decoded: The artifact's through its cache.
        steps: Decoded positions a window, for the error message's window number.

    Raises:
        CompressError: Shapes disagree, or a logit is not finite (names the window).
    """
    count = reference.shape[0]
    vocab = _check_shapes(reference, prefilled, count)
    _check_shapes(reference, decoded, count)
    sums, largest = np.zeros(3), 0.0
    for window, start, stop in _chunks(count // steps, steps, vocab):
        rows = slice(window * steps + start, window * steps + stop)
        log_r = log_softmax(_finite(reference[rows], "reference", window))
        log_p = log_softmax(_finite(prefilled[rows], "artifact", window))
        log_d = log_softmax(_finite(decoded[rows], "artifact's decoding", window))
        own = _kl(log_p, log_d)
        sums += [_kl(log_r, log_d).sum(), _kl(log_r, log_p).sum(), own.sum()]
        largest = max(largest, float(own.max()))
    means = sums / count
    return DecodeDrift(count, float(means[0]), float(means[1]), float(means[2]), largest)


def clustered_error(values: FloatArray) -> float | None:
    """Return the standard error of the mean of ``values`` ``[clusters, each]``, or ``None`` for a single cluster."""
    clusters = len(values)
    if clusters < 2:
        return None
    return float(values.mean(axis=1).std(ddof=1) / np.sqrt(clusters))


def _exp(nats: float) -> float:
    """Return ``exp(nats)``; a loss whose perplexity no float holds has no number to report."""
    if nats > 700:
        raise CompressError(f"the mean loss is off by {nats:.0f} nats a token: the logits are meaningless")
    return math.exp(nats)


def _kl(log_p: FloatArray, log_q: FloatArray) -> FloatArray:
    """Return KL(p || q) of each row; rounding below zero is cut off."""
    divergence: FloatArray = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return np.maximum(divergence, 0.0)


def _chunks(windows: int, length: int, vocab: int) -> Iterator[tuple[int, int, int]]:
    """Yield (window, start, stop) so that no chunk has more than ``CHUNK_ELEMENTS`` logits."""
    step = max(1, CHUNK_ELEMENTS // vocab)
    for window in range(windows):
        for start in range(0, length, step):
            yield window, start, min(length, start + step)


def _finite(logits: npt.NDArray[np.float32], which: str, window: int) -> npt.NDArray[np.float32]:
    if not np.isfinite(logits).all():
        raise CompressError(f"the {which} gave logits that are not finite", where=f"window {window}")
    return logits


def _check_shapes(reference: Rows, artifact: Rows, rows: int) -> int:
    if reference.shape != artifact.shape or len(reference.shape) != 2 or reference.shape[0] != rows:
        raise CompressError(
            f"logits of the reference are {list(reference.shape)}, of the artifact {list(artifact.shape)}, "
            f"and {rows} tokens were asked for"
        )
    return int(reference.shape[1])
