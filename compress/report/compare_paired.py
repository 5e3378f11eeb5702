"""Whether B predicts a text worse than A, judged on their differences position by position.

Requires the losses of both on the same token ids; a position's difference is B's loss minus A's, in nats. Its mean is
the KL divergence that B lost more, or the logarithm of the two perplexities' ratio.

- Neighbouring positions depend on each other, so the sample is runs of :data:`RUN` consecutive positions of a window.
  The standard error of the mean is the clustered one (Liang and Zeger, 1986): residuals are summed over each run,
  squared and summed, times G / (G - 1) for G runs.
- B is worse where the mean exceeds :data:`NEGLIGIBLE` by more than ``t`` standard errors, ``t`` Student's quantile of
  G - 1 degrees of freedom at :data:`ALPHA`: a one-sided test of "at most negligibly worse". Without that allowance, on
  enough text, another kernel's rounding would be a regression.
- What is judged with errors of measurement in a comparison (KL, perplexity, the decoding rate) shares
  :data:`FALSE_ALARMS` evenly (Bonferroni), so that together they rarely fail a B that is as good as A.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from compress.report.compare_model import Judgement, Paired

#: Positions a run. docs/reliability.md has the autocorrelation that it was chosen by.
RUN = 32
#: Nats a token: a tenth of a percent of perplexity.
NEGLIGIBLE = 0.001
FALSE_ALARMS = 0.01
JUDGED = 3
ALPHA = FALSE_ALARMS / JUDGED
#: With fewer runs the error is itself too uncertain to judge by.
LEAST_RUNS = 8


def paired(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], *, run: int = RUN) -> Paired | None:
    """Return by how much B's losses exceed A's, ``None`` with fewer than :data:`LEAST_RUNS` runs.

    Args:
        a: A's losses in nats, float32 ``[windows, positions]``.
        b: B's at the same positions.
        run: Positions a run; a window's rest joins its last one.
    """
    difference = b.astype(np.float64) - a
    windows, length = difference.shape
    starts = np.arange(max(1, length // run)) * run
    runs = windows * len(starts)
    if runs < LEAST_RUNS:
        return None
    mean = float(difference.mean())
    residuals = np.add.reduceat(difference - mean, starts, axis=1)
    error = math.sqrt(runs / (runs - 1) * float((residuals**2).sum())) / difference.size
    return Paired(
        change=mean, standard_error=error, runs=runs, threshold=NEGLIGIBLE + student(1 - ALPHA, runs - 1) * error
    )


def judge(found: Paired) -> Judgement:
    """Return who is better: lower losses are."""
    if found.change == 0 and found.standard_error == 0:
        return "same"
    if found.change > found.threshold:
        return "worse"
    return "better" if -found.change > found.threshold else "within the errors"


def student(share: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution, to three digits from 7 degrees of freedom on.

    The expansion around the normal quantile: Abramowitz and Stegun (1964), 26.7.5.
    """
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom) ** power for power, term in enumerate(terms, start=1))
