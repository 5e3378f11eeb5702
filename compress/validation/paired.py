"""Two models on the same examples: the difference of their scores with a 95 % interval that uses the pairing.

Accuracy: of n examples, b are right in the reference alone and c in the artifact alone; the difference is (c - b) / n.
The interval holds every difference d that the score test accepts (Tango, Statistics in Medicine 17:891, 1998)::

    |c - b - n d| <= z sqrt(n (2 q + d (1 - d))),     q = (sqrt(B^2 - 4 A C) - B) / (2 A)
    A = 2 n,   B = -b - c + (2 n - c + b) d,          C = -b d (1 - d)

where q is the maximum-likelihood estimate of b's probability under d. Unlike Wald's interval it keeps its coverage with
few flips, and is not empty with none: Newcombe (1998) and Fagerland, Lydersen and Laake (2014) recommend it.

Rank correlation: Spearman's, with a percentile bootstrap over the examples (Efron and Tibshirani, 1993, chapter 13).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Interval = tuple[float, float]

Z95 = 1.959963984540054
RESAMPLES = 2000
_BISECTIONS = 60


def accuracy_interval(lost: int, gained: int, examples: int) -> Interval:
    """Return Tango's 95 % interval of the accuracy difference, artifact minus reference.

    Args:
        lost: Examples that only the reference has right.
        gained: Examples that only the artifact has right.
        examples: All of them, at least one.
    """
    if not (lost >= 0 and gained >= 0 and lost + gained <= examples and examples > 0):
        raise ValueError(f"{lost} lost and {gained} gained of {examples} examples")
    return -_upper(gained, lost, examples), _upper(lost, gained, examples)


def _upper(lost: int, gained: int, examples: int) -> float:
    """Return the largest difference that the score test accepts; the lower end is its mirror image."""
    low, high = (gained - lost) / examples, 1.0
    if _score(lost, gained, examples, high) <= Z95:
        return high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _score(lost, gained, examples, middle) <= Z95:
            low = middle
        else:
            high = middle
    return low


def _score(lost: int, gained: int, examples: int, difference: float) -> float:
    """Return by how many standard errors ``difference`` lies above what was seen."""
    excess = examples * difference - (gained - lost)
    if excess <= 0:
        return 0.0
    a = 2 * examples
    b = -lost - gained + (2 * examples - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    q = max(0.0, (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a))
    variance = examples * (2 * q + difference * (1 - difference))
    return excess / math.sqrt(variance) if variance > 0 else math.inf


def spearman(left: FloatArray, right: FloatArray) -> float:
    """Return Spearman's rank correlation of two arrays ``[n]``; ties share their mean rank; NaN if one is constant."""
    return _pearson(_ranks(left), _ranks(right))


def spearman_interval(
    scores: FloatArray, reference: FloatArray, artifact: FloatArray, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Return the paired 95 % bootstrap interval of ``spearman(artifact, scores) - spearman(reference, scores)``.

    Both sides are resampled together: what makes an example hard for both cancels out. A resample in which one side is
    constant has no correlation and is left out.

    Args:
        scores: The given scores ``[n]``.
        reference: What the reference says ``[n]``.
        artifact: What the artifact says ``[n]``.
        seed: Of the resampling.
        resamples: How many.
    """
    groups = [np.unique(values, return_inverse=True)[1] for values in (scores, reference, artifact)]
    generator = np.random.default_rng(seed)
    differences = np.empty(resamples)
    for index in range(resamples):
        chosen = generator.integers(0, len(scores), len(scores))
        truth, left, right = (_ranks_of_groups(group[chosen]) for group in groups)
        differences[index] = _pearson(right, truth) - _pearson(left, truth)
    known = differences[np.isfinite(differences)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def _ranks(values: FloatArray) -> FloatArray:
    return _ranks_of_groups(np.unique(values, return_inverse=True)[1])


def _ranks_of_groups(groups: npt.NDArray[np.int64]) -> FloatArray:
    """Return mean ranks from each element's position among the distinct values."""
    counts = np.bincount(groups)
    ranks: FloatArray = (np.cumsum(counts) - (counts - 1) / 2.0)[groups]
    return ranks


def _pearson(left: FloatArray, right: FloatArray) -> float:
    left, right = left - left.mean(), right - right.mean()
    norm = math.sqrt(float(left @ left) * float(right @ right))
    return float(left @ right) / norm if norm > 0 else math.nan
