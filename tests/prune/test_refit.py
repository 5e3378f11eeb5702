"""The closed-form fits against a float64 oracle written from the objective, and what they must not do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from compress.prune.refit import SHARES, moments, refit, refit_moments

Floats = npt.NDArray[np.float32]


def run(work: Callable[[Any], Any], pieces: Iterable[Any]) -> list[Any]:
    return [work(piece) for piece in pieces]


def problem(tokens: int, inputs: int, outputs: int, seed: int = 0) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Return inputs, what is wanted, weights that miss it, a bias that misses it, and counts with some zeros."""
    draw = np.random.default_rng(seed)
    mixing = draw.normal(size=(inputs, inputs)) / inputs**0.5
    x = (draw.normal(size=(tokens, inputs)) @ mixing + 0.3).astype(np.float32)
    true = draw.normal(size=(outputs, inputs)).astype(np.float32)
    wanted = (x @ true.T + 0.5 + 0.05 * draw.normal(size=(tokens, outputs))).astype(np.float32)
    counts = draw.uniform(0.2, 2.0, tokens).astype(np.float32)
    counts[::7] = 0
    weight = (true + 0.3 * draw.normal(size=true.shape)).astype(np.float32)
    return x, wanted, weight, np.zeros(outputs, np.float32), counts


def oracle(
    x: Floats, wanted: Floats, weight: Floats, bias: Floats | None, counts: Floats, share: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Minimise the objective as one augmented least-squares problem, in float64.

    With a bias the inputs are centred first, which leaves the ridge on the weights alone.
    """
    x64, y64, c64 = x.astype(np.float64), wanted.astype(np.float64), counts.astype(np.float64)
    residual = y64 - x64 @ weight.T.astype(np.float64) - (0 if bias is None else bias)
    means = np.average(x64, axis=0, weights=c64) if bias is not None else np.zeros(x.shape[1])
    offset = np.average(residual, axis=0, weights=c64) if bias is not None else np.zeros(wanted.shape[1])
    centred, rest = x64 - means, residual - offset
    ridge = share * np.mean((c64[:, None] * centred**2).sum(axis=0))
    rows = np.vstack([np.sqrt(c64)[:, None] * centred, np.sqrt(ridge) * np.eye(x.shape[1])])
    targets = np.vstack([np.sqrt(c64)[:, None] * rest, np.zeros((x.shape[1], weight.shape[0]))])
    change = np.linalg.lstsq(rows, targets, rcond=None)[0].T
    new_bias = (0 if bias is None else bias) + offset - change @ means
    return weight + change, new_bias


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(700, 33, 5), (2100, 600, 40)])
def test_the_fit_is_the_oracles(tokens: int, inputs: int, outputs: int, biased: bool) -> None:
    x, wanted, weight, bias, counts = problem(tokens, inputs, outputs)
    found = refit(x, wanted.copy(), weight, bias if biased else None, counts, run)
    assert found.share in SHARES and found.after < found.before
    best, best_bias = oracle(x, wanted, weight, bias if biased else None, counts, found.share)
    scale = np.abs(best - weight).max()
    assert np.abs(found.weight - best).max() < 2e-4 * scale
    assert (found.bias is None) == (not biased)
    if found.bias is not None:  # it is the difference of sums over all inputs
        assert np.abs(found.bias - best_bias).max() < 1e-3 * np.abs(best_bias).max()
    # The negative control: another share is another answer, by much more than the tolerance.
    other, _ = oracle(x, wanted, weight, bias if biased else None, counts, 0.5)
    assert found.share == 0.5 or np.abs(other - best).max() > 1e-2 * scale


def test_what_cannot_be_bettered_stays() -> None:
    x, _, weight, _, counts = problem(500, 20, 4)
    found = refit(x, x @ weight.T, weight, None, counts, run)
    assert found.share == 0 and np.array_equal(found.weight, weight)


def test_noise_is_not_fitted() -> None:
    """Fewer tokens than inputs and nothing to learn: the held-out tokens speak against every change."""
    draw = np.random.default_rng(3)
    x = draw.normal(size=(60, 200)).astype(np.float32)
    weight = draw.normal(size=(3, 200)).astype(np.float32)
    wanted = (x @ weight.T + draw.normal(size=(60, 3))).astype(np.float32)
    found = refit(x, wanted.copy(), weight, None, np.ones(60, np.float32), run)
    assert np.linalg.norm(found.weight - weight) < 0.35 * np.linalg.norm(weight)


def test_padding_does_not_count() -> None:
    x, wanted, weight, bias, counts = problem(400, 24, 6)
    spoilt, nonsense = x.copy(), wanted.copy()
    spoilt[counts == 0], nonsense[counts == 0] = 1e4, -1e4
    first, second = (refit(a, b.copy(), weight, bias, counts, run) for a, b in ((x, wanted), (spoilt, nonsense)))
    assert np.array_equal(first.weight, second.weight)
    counted = refit(spoilt, nonsense, weight, bias, np.ones_like(counts), run)
    assert np.abs(counted.weight - first.weight).max() > 1e-2


def test_a_fit_by_moments_is_that_by_tokens() -> None:
    x, _, weight, _, _ = problem(900, 40, 7)
    kept = np.array([index for index in range(40) if index % 3])
    seen = moments(x, np.ones(len(x), np.float32), run)
    assert np.allclose(seen, x.T.astype(np.float64) @ x / len(x), rtol=1e-5, atol=1e-6)
    found = refit_moments(weight, seen, kept, share=1e-2)
    wanted = (x @ weight.T).astype(np.float32)
    best, _ = oracle(x[:, kept], wanted, weight[:, kept], None, np.ones(len(x), np.float32), 1e-2)
    assert np.abs(found - best).max() < 1e-3
    missed = [np.square(wanted - x[:, kept] @ new.T).mean() for new in (found, weight[:, kept])]
    assert missed[0] < 0.9 * missed[1]
