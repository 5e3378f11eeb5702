"""Paired intervals: against published values, a brute-force oracle, and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from compress.validation.paired import Z95, accuracy_interval, spearman, spearman_interval


@pytest.mark.parametrize(
    ("lost", "gained", "examples", "low", "high"),
    [
        # Bentur et al. 2009 and Cavo et al. 2012, as worked in Fagerland, Lydersen and Laake, Statistical Analysis of
        # Contingency Tables (2017), chapter 8; there the difference is first minus second.
        (7, 1, 21, -0.517, -0.026),
        (16, 6, 161, -0.1240, -0.0054),
    ],
)
def test_published_intervals(lost: int, gained: int, examples: int, low: float, high: float) -> None:
    digits = 4 if low == -0.1240 else 3
    found = accuracy_interval(lost, gained, examples)
    assert (round(found[0], digits), round(found[1], digits)) == (low, high)
    mirrored = accuracy_interval(gained, lost, examples)
    assert mirrored == pytest.approx((-found[1], -found[0]))


def accepted(lost: int, gained: int, examples: int, difference: float) -> bool:
    """Whether the score test accepts a difference; q by searching the likelihood, not by its closed form."""
    same = examples - lost - gained
    low, high = max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12
    q = np.linspace(low, high, 200_001)[:-1]  # the probability of a loss
    with np.errstate(divide="ignore", invalid="ignore"):
        likelihood = same * np.log(1 - 2 * q - difference)
        likelihood = likelihood + (lost * np.log(q) if lost else 0) + (gained * np.log(q + difference) if gained else 0)
    best = q[np.nanargmax(likelihood)]
    variance = examples * (2 * best + difference * (1 - difference))
    return abs(gained - lost - examples * difference) <= Z95 * math.sqrt(variance)


@pytest.mark.parametrize(("lost", "gained", "examples"), [(5, 2, 60), (0, 3, 50), (4, 0, 30), (12, 12, 100)])
def test_the_interval_holds_what_the_score_test_accepts(lost: int, gained: int, examples: int) -> None:
    low, high = accuracy_interval(lost, gained, examples)
    step = 2e-4
    assert accepted(lost, gained, examples, high - step) and not accepted(lost, gained, examples, high + step)
    assert accepted(lost, gained, examples, low + step) and not accepted(lost, gained, examples, low - step)


def test_no_flips_still_leave_doubt() -> None:
    low, high = accuracy_interval(0, 0, 400)
    assert -low == pytest.approx(high) == pytest.approx(Z95**2 / (400 + Z95**2))


def test_it_covers_the_truth_as_often_as_it_says_where_a_plain_one_does_not() -> None:
    generator = np.random.default_rng(1)
    examples, lost, gained = 150, 0.012, 0.004  # as few flips as int8 makes
    draws = generator.multinomial(examples, [lost, gained, 1 - lost - gained], size=4000)
    exact = plain = 0
    for b, c, _ in draws.tolist():
        low, high = accuracy_interval(b, c, examples)
        exact += low <= gained - lost <= high
        mean = (c - b) / examples
        error = math.sqrt(max(0.0, (b + c) / examples - mean**2) / examples)
        plain += mean - Z95 * error <= gained - lost <= mean + Z95 * error
    assert exact / 4000 > 0.935 and plain / 4000 < 0.90


def test_numbers_that_make_no_sense_are_refused() -> None:
    for counts in ((3, 3, 5), (-1, 0, 5), (0, 0, 0)):
        with pytest.raises(ValueError, match="lost"):
            accuracy_interval(*counts)


def test_rank_correlation_is_that_of_the_definition() -> None:
    generator = np.random.default_rng(0)
    left, right = generator.integers(0, 6, 40).astype(float), generator.integers(0, 9, 40).astype(float)

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([1 + (values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])

    assert spearman(left, right) == pytest.approx(np.corrcoef(ranks(left), ranks(right))[0, 1])
    assert spearman(left, np.exp(left)) == pytest.approx(1) and spearman(left, -left) == pytest.approx(-1)
    assert math.isnan(spearman(left, np.ones(40)))


def test_the_bootstrap_is_paired_seeded_and_holds_the_difference() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=200)
    reference = scores + generator.normal(size=200)
    worse = reference + 0.3 * generator.normal(size=200)
    low, high = spearman_interval(scores, reference, worse)
    difference = spearman(worse, scores) - spearman(reference, scores)
    assert low < difference < high and (low, high) == spearman_interval(scores, reference, worse)
    assert spearman_interval(scores, reference, reference) == (0.0, 0.0)  # paired: what is the same cancels out
    # The standard error agrees with the jackknife's, which resamples nothing (Efron and Tibshirani, chapter 11).
    keep = ~np.eye(200, dtype=bool)
    left_out = [spearman(worse[k], scores[k]) - spearman(reference[k], scores[k]) for k in keep]
    error = math.sqrt(199 / 200 * float(((np.array(left_out) - np.mean(left_out)) ** 2).sum()))
    assert (high - low) / (2 * Z95) == pytest.approx(error, rel=0.2)
