"""Drift against a naive float64 oracle and cases with a known answer."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest

from compress.errors import CompressError
from compress.validation import drift
from compress.validation.histogram import COSINE_EDGES, KL_EDGES, counted

Logits = npt.NDArray[np.float32]


def softmax(row: npt.NDArray[np.float32]) -> list[float]:
    """Probabilities of one row, by the definition."""
    weights = [math.exp(float(value)) for value in row]
    return [weight / sum(weights) for weight in weights]


def oracle(reference: Logits, artifact: Logits, windows: npt.NDArray[np.int64]) -> dict[str, float]:
    """Drift token by token, in plain Python floats."""
    count, length = windows.shape
    kl: list[list[float]] = []
    nll_p: list[list[float]] = []
    nll_q: list[list[float]] = []
    same = 0
    for window in range(count):
        kl.append([])
        nll_p.append([])
        nll_q.append([])
        for position in range(length - 1):
            row = window * length + position
            p, q = softmax(reference[row]), softmax(artifact[row])
            kl[-1].append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            target = int(windows[window, position + 1])
            nll_p[-1].append(-math.log(p[target]))
            nll_q[-1].append(-math.log(q[target]))
            same += p.index(max(p)) == q.index(max(q))
    flat = [value for row in kl for value in row]
    delta = [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip(nll_p, nll_q, strict=True)]
    means = [sum(row) / len(row) for row in delta]
    centre = sum(means) / count
    error = math.sqrt(sum((mean - centre) ** 2 for mean in means) / (count - 1) / count)
    return {
        "kl_mean": sum(flat) / len(flat),
        "reference_perplexity": math.exp(sum(map(sum, nll_p)) / len(flat)),
        "artifact_perplexity": math.exp(sum(map(sum, nll_q)) / len(flat)),
        "perplexity_ratio": math.exp(centre),
        "perplexity_ratio_error": math.exp(centre) * error,
        "top1_agreement": same / len(flat),
        "kl_p99": float(np.quantile(flat, 0.99)),
    }


def sample(
    count: int = 5, length: int = 9, vocab: int = 33, noise: float = 0.5
) -> tuple[Logits, Logits, npt.NDArray[np.int64]]:
    """Random reference logits, noisy artifact logits, random tokens."""
    rng = np.random.default_rng(7)
    reference = rng.normal(0, 2, (count * length, vocab)).astype(np.float32)
    artifact = (reference + rng.normal(0, noise, reference.shape)).astype(np.float32)
    return reference, artifact, rng.integers(0, vocab, (count, length), dtype=np.int64)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 21])
def test_equals_the_oracle_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(drift, "CHUNK_ELEMENTS", chunk)
    reference, artifact, windows = sample()
    measured = drift.measure(reference, artifact, windows)
    for name, expected in oracle(reference, artifact, windows).items():
        assert getattr(measured, name) == pytest.approx(expected, rel=1e-12), name
    assert measured.tokens == 5 * 8


def test_the_oracle_notices_a_swapped_direction() -> None:
    reference, artifact, windows = sample()
    swapped = drift.measure(artifact, reference, windows)
    assert swapped.kl_mean != pytest.approx(oracle(reference, artifact, windows)["kl_mean"], rel=1e-3)


def test_equal_logits_have_no_drift() -> None:
    reference, _, windows = sample()
    measured = drift.measure(reference, reference.copy(), windows)
    assert (measured.kl_mean, measured.perplexity_ratio, measured.top1_agreement) == (0.0, 1.0, 1.0)
    assert (measured.perplexity_ratio_error, measured.confident_flips, measured.max_abs_difference) == (0.0, 0, 0.0)


def test_a_shift_of_a_row_changes_the_logits_but_no_probability() -> None:
    reference, _, windows = sample()
    measured = drift.measure(reference, reference + np.float32(4), windows)
    assert measured.max_abs_difference == pytest.approx(4, rel=1e-6)
    assert measured.kl_mean < 1e-12


def test_two_outcomes_have_the_textbook_divergence() -> None:
    p, q = 0.9, 0.6
    windows = np.array([[0, 0, 1]])
    reference = np.tile(np.log([p, 1 - p]).astype(np.float32), (3, 1))
    artifact = np.tile(np.log([q, 1 - q]).astype(np.float32), (3, 1))
    measured = drift.measure(reference, artifact, windows)
    assert measured.kl_mean == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), rel=1e-6)
    assert measured.reference_perplexity == pytest.approx(math.exp(-(math.log(p) + math.log(1 - p)) / 2), rel=1e-6)
    assert measured.perplexity_ratio_error is None and measured.kl_error is None  # one window has no spread


def test_flips_count_only_where_the_source_was_sure() -> None:
    windows = np.zeros((1, 3), np.int64)
    sure, unsure = [3.0, 0.0, 0.0], [0.1, 0.0, 0.0]
    flipped = [0.0, 3.0, 0.0]
    measured = drift.measure(
        np.array([sure, unsure, sure], np.float32), np.array([flipped, flipped, sure], np.float32), windows
    )
    assert (measured.confident_tokens, measured.confident_flips, measured.top1_agreement) == (1, 1, 0.0)


def test_large_logits_do_not_overflow() -> None:
    reference, artifact, windows = sample()
    measured = drift.measure(reference * 100, artifact * 100, windows)
    assert math.isfinite(measured.kl_mean) and measured.kl_mean > 1
    with pytest.raises(CompressError, match="logits are meaningless"):
        drift.measure(reference * 1000, artifact * 1000, windows)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["reference", "artifact"])
def test_a_logit_that_is_not_finite_names_its_window(value: float, which: str) -> None:
    reference, artifact, windows = sample()
    (reference if which == "reference" else artifact)[2 * 9 + 4, 3] = value
    with pytest.raises(CompressError, match=rf"the {which} gave.*\n.*window 2"):
        drift.measure(reference, artifact, windows)


def test_shapes_must_agree() -> None:
    reference, artifact, windows = sample()
    with pytest.raises(CompressError, match="logits of the reference"):
        drift.measure(reference, artifact[:, :-1], windows)
    with pytest.raises(CompressError, match="at least 2 tokens"):
        drift.measure(reference, artifact, windows.reshape(-1, 1))


def test_the_clustered_error_is_larger_for_dependent_tokens() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(50, 1)) + 0.1 * rng.normal(size=(50, 20))
    naive = float(shared.std(ddof=1) / np.sqrt(shared.size))
    clustered = drift.clustered_error(shared)
    assert clustered is not None
    assert clustered == pytest.approx(1 / np.sqrt(50), rel=0.3)
    assert clustered > 3 * naive


def test_decode_drift_separates_the_cache_from_the_weights() -> None:
    reference, artifact, _ = sample()
    sound = drift.measure_decode(reference, artifact, artifact.copy(), 9)
    assert sound.self_kl_mean == 0.0 and sound.kl_mean == sound.prefill_kl_mean > 0
    broken = drift.measure_decode(reference, artifact, np.roll(artifact, 1, axis=0), 9)
    assert broken.self_kl_mean > 0.1 and broken.prefill_kl_mean == sound.prefill_kl_mean
    assert broken.tokens == 45


@pytest.mark.parametrize("noise", [0.02, 0.5, 30.0])
def test_divergences_are_counted_as_a_naive_loop_does(noise: float) -> None:
    reference, artifact, windows = sample(noise=noise)
    artifact[3] = reference[3]  # no divergence at all
    measured = drift.measure(reference, artifact, windows)
    expected = [0] * (len(KL_EDGES) - 1)
    for row in (w * 9 + t for w in range(5) for t in range(8)):
        p, q = softmax(reference[row]), softmax(artifact[row])
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        inside = [i for i in range(len(expected)) if KL_EDGES[i] <= kl < KL_EDGES[i + 1]]
        expected[inside[0] if inside else 0 if kl < 1 else -1] += 1
    assert list(measured.kl_counts) == expected and sum(expected) == measured.tokens
    assert measured.kl_counts[0] >= 1 and max(expected) < measured.tokens
    moved = drift.measure(reference, artifact + np.float32(0.5) * (np.arange(33) % 2).astype(np.float32), windows)
    assert moved.kl_counts != measured.kl_counts


def test_the_ends_of_the_bins_are_open_and_edges_count_upwards() -> None:
    values = np.array([0.0, 1e-9, KL_EDGES[1], 99.9, 100.0, 1e6])
    counts = counted(values, KL_EDGES)
    assert (counts[0], counts[1], counts[-1], sum(counts)) == (2, 1, 3, 6)
    assert len(KL_EDGES) == 25 and (KL_EDGES[0], KL_EDGES[-1]) == (1e-6, 100)
    assert (COSINE_EDGES[0], COSINE_EDGES[-1]) == (1e-7, 1)
    assert all(1.9 < high / low < 2.3 for low, high in itertools.pairwise(KL_EDGES))
