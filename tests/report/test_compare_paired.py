"""Paired comparisons: the arithmetic against a slow oracle and simulations, and what happens without positions."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from test_compare import REPORT, measure

from compress.cli import run
from compress.comparison import read_side
from compress.report import compare_paired
from compress.report.compare import compare
from compress.report.compare_model import Side
from compress.report.compare_paired import NEGLIGIBLE, RUN, judge, paired, student
from compress.report.compare_show import page
from compress.validation.losses import NAME, Losses

WINDOWS, POSITIONS = 4, 511
Floats = npt.NDArray[np.float32]
IDS = "7" * 64


def oracle(a: Floats, b: Floats, run: int) -> tuple[float, float, int]:
    """Return mean, clustered standard error and number of runs, number by number."""
    differences, clusters = [], []
    for mine, yours in zip(a.tolist(), b.tolist(), strict=True):
        row = [other - one for one, other in zip(mine, yours, strict=True)]
        differences += row
        starts = list(range(0, len(row) - run + 1, run)) or [0]
        for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
            clusters.append(row[start:stop])
    mean = math.fsum(differences) / len(differences)
    total = sum(math.fsum(item - mean for item in cluster) ** 2 for cluster in clusters)
    count = len(clusters)
    return mean, math.sqrt(count / (count - 1) * total) / len(differences), count


@pytest.mark.parametrize(("windows", "length", "run"), [(4, 511, 32), (9, 31, 32), (3, 64, 16), (2, 33, 8), (8, 5, 1)])
def test_against_the_oracle(windows: int, length: int, run: int) -> None:
    random = np.random.default_rng(length)
    a, b = random.gamma(0.5, 2, (2, windows, length)).astype(np.float32)
    found = paired(a, b, run=run)
    assert found is not None
    mean, error, runs = oracle(a, b, run)
    assert (found.change, found.standard_error, found.runs) == (
        pytest.approx(mean, rel=1e-12),
        pytest.approx(error, rel=1e-12),
        runs,
    )
    wrong = paired(a, b, run=run + 1)
    assert wrong is None or abs(wrong.standard_error / error - 1) > 1e-6 or length <= run


def noise(random: np.random.Generator, shape: tuple[int, int], dependence: float) -> npt.NDArray[np.float64]:
    """Return noise of variance 1 whose neighbours correlate by ``dependence``."""
    found = random.standard_normal(shape)
    for position in range(1, shape[1]):
        found[:, position] = dependence * found[:, position - 1] + math.sqrt(1 - dependence**2) * found[:, position]
    return found


def test_the_error_is_that_of_repeated_measurements() -> None:
    random = np.random.default_rng(3)
    zeros = np.zeros((WINDOWS, POSITIONS), np.float32)
    means, errors, naive = [], [], []
    for _ in range(400):
        b = noise(random, zeros.shape, 0.6).astype(np.float32)
        found, alone = paired(zeros, b), paired(zeros, b, run=1)
        assert found is not None and alone is not None
        means.append(found.change)
        errors.append(found.standard_error)
        naive.append(alone.standard_error)
    spread = float(np.std(means))
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)
    assert np.mean(naive) < 0.65 * spread, "the control: positions taken for independent"


@pytest.mark.parametrize(
    ("share", "freedom", "value"), [(0.995, 7, 3.499), (0.99, 30, 2.457), (0.999, 10, 4.144), (0.995, 60, 2.660)]
)
def test_quantiles_of_student(share: float, freedom: int, value: float) -> None:
    assert student(share, freedom) == pytest.approx(value, abs=0.004)


def sides(a: tuple[Floats, Floats], b: tuple[Floats, Floats], base: Side) -> tuple[Side, Side]:
    made = [base.model_copy(update={"losses": Losses(nll, kl, IDS), "no_losses": None}) for nll, kl in (a, b)]
    return made[0], made[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Side:
    path = tmp_path_factory.mktemp("base") / "report.json"
    path.write_text(json.dumps(REPORT))
    return read_side(path)


def equals(random: np.random.Generator) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
    """Return two artifacts as good as each other: losses with heavy tails, common difficulty, dependent neighbours."""
    hard = random.gamma(0.5, 4, (WINDOWS, POSITIONS))
    kls = random.gamma(0.3, 0.5, (2, WINDOWS, POSITIONS)) * (1 + hard)
    nlls = hard + 0.3 * random.standard_t(4, (2, WINDOWS, POSITIONS)) * np.sqrt(kls)
    carried = kls + 0.5 * np.roll(kls, 1, axis=2)
    return tuple((nll.astype(np.float32), kl.astype(np.float32)) for nll, kl in zip(nlls, carried, strict=True))  # type: ignore[return-value]


def test_two_that_are_as_good_are_seldom_worse(base: Side) -> None:
    random = np.random.default_rng(11)
    trials, worse, better = 2000, 0, 0
    for _ in range(trials):
        found = compare(*sides(*equals(random), base))
        worse += bool(found.worse)
        better += any(item.judgement == "better" for item in found.measures)
    assert worse / trials <= 0.015 and better / trials <= 0.015
    assert worse > 0, "the control: the threshold is within what chance reaches"


def test_half_a_percent_is_found_and_a_tenth_is_not(base: Side) -> None:
    random = np.random.default_rng(5)
    hard = random.gamma(0.5, 4, (WINDOWS, POSITIONS))
    a = (hard.astype(np.float32), np.full(hard.shape, 0.1, np.float32))
    found = {}
    for loss in (0.0, 0.001, 0.005, -0.005):
        change = loss + 0.03 * noise(random, hard.shape, 0.2)
        found[loss] = compare(*sides(a, ((a[0] + change).astype(np.float32), a[1]), base))
    assert [bool(item.worse) for item in found.values()] == [False, False, True, False]
    worse, better = (measure(found[loss], "perplexity ratio") for loss in (0.005, -0.005))
    assert worse.paired is not None and worse.paired.runs == WINDOWS * (POSITIONS // RUN)
    assert NEGLIGIBLE < worse.paired.threshold < worse.paired.change
    assert (better.judgement, measure(found[0.005], "KL divergence").judgement) == ("better", "same")
    (told,) = found[0.005].worse
    assert f"by position {worse.shown_paired}" in told and "% ± 0." in told and worse.shown_paired in page(found[0.005])


def test_a_certain_but_tiny_loss_is_negligible() -> None:
    zeros = np.zeros((WINDOWS, POSITIONS), np.float32)
    for loss, judged in ((0.0, "same"), (0.0009, "within the errors"), (0.0011, "worse"), (-0.0011, "better")):
        found = paired(zeros, zeros + np.float32(loss))
        assert found is not None and judge(found) == judged


def stored(directory: Path, kl: float, *, ids: str = IDS, windows: int = 4, mean: float = 0.4) -> Path:
    """Write a report and the losses that it tells of; return the report's path."""
    directory.mkdir()
    losses = Losses(np.ones((windows, 511), np.float32), np.full((windows, 511), kl, np.float32), ids)
    report: dict[str, Any] = copy.deepcopy(REPORT)
    record = losses.write(directory)
    assert record is not None
    report["drift"] |= {"windows": windows, "tokens": windows * 511, "positions": record.model_dump()}
    report["drift"]["kl_divergence"]["mean"] = mean
    (directory / "report.json").write_text(json.dumps(report))
    return directory / "report.json"


def test_reports_with_and_without_their_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = stored(tmp_path / "a", 0.40), stored(tmp_path / "b", 0.41, mean=0.41)
    assert run(["compare", str(a), str(b), "--fail-if-worse"]) == 3
    assert "KL divergence: " in capsys.readouterr().out
    (tmp_path / "b" / NAME).unlink()
    assert run(["compare", str(a), str(b), "--fail-if-worse"]) == 0  # two standard errors of two means are 0.08
    told = capsys.readouterr()
    assert "not by position: B: drift.npz is not beside its report" in told.out
    assert "judged by two standard errors alone, perplexity ratio" in told.err


def test_losses_that_cannot_be_paired(tmp_path: Path) -> None:
    a = read_side(stored(tmp_path / "a", 0.4))
    other = read_side(stored(tmp_path / "b", 0.5, ids="8" * 64))
    assert measure(compare(a, other), "KL divergence").why == "not by position: the text was cut into other tokens"
    short = paired(np.zeros((1, 64), np.float32), np.ones((1, 64), np.float32))
    assert short is None and compare_paired.LEAST_RUNS > 2
    old = read_side(_without(tmp_path / "c"))
    assert measure(compare(a, old), "KL divergence").why == "not by position: B: its report names none"


def _without(directory: Path) -> Path:
    directory.mkdir()
    (directory / "report.json").write_text(json.dumps(REPORT))
    return directory / "report.json"


def test_the_digest_is_of_ids_and_shape() -> None:
    from compress.validation.losses import digest

    ids = np.arange(12).reshape(3, 4)
    assert digest(ids) == digest(ids.copy()) != digest(ids.reshape(4, 3))
    assert len(digest(ids)) == hashlib.sha256().digest_size * 2
