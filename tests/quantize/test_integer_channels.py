"""Signed bytes for integer products: a scale a channel, no pair that overflows, GPTQ against a slow oracle."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from compress.contracts import Scheme
from compress.quantize import load_quantizer
from compress.quantize.gptq import DAMPING, compensated
from compress.quantize.integer import PAIR_LIMIT, bring_pairs_back, quantize_channels

Float32 = npt.NDArray[np.float32]


def weights(rows: int, columns: int, *, heavy: bool = False) -> Float32:
    random = np.random.default_rng(rows * columns)
    values = random.standard_t(2, (rows, columns)) if heavy else random.normal(0, 0.05, (rows, columns))
    return values.astype(np.float32)


def pair_sums(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """Return what 255 times two neighbours of one sign make, the worst that 16 bits must hold."""
    even = codes[:, 0 : codes.shape[1] // 2 * 2 : 2].astype(np.int64)
    odd = codes[:, 1::2].astype(np.int64)
    return 255 * (np.maximum(even, 0) + np.maximum(odd, 0)), 255 * (np.minimum(even, 0) + np.minimum(odd, 0))  # type: ignore[return-value]


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("columns", [1, 2, 33, 64, 312])
def test_no_pair_overflows_sixteen_bits(bits: int, columns: int) -> None:
    for heavy in (False, True):
        codes, scales = quantize_channels(weights(40, columns, heavy=heavy), bits)
        assert codes.dtype == np.int8 and codes.shape == (40, columns) and scales.shape == (40,)
        assert np.abs(codes.astype(int)).max() <= 2 ** (bits - 1) - 1
        if columns > 1:
            high, low = pair_sums(codes)
            assert high.max() <= 32767 and low.min() >= -32768


def test_large_neighbours_of_one_sign_would_overflow() -> None:
    """Negative control: plain rounding of the same weights does, and bringing back takes half from each."""
    weight = np.array([[1.0, 1.0, -1.0, 1.0, -0.9, -0.8]], np.float32)
    plain = np.rint(weight * 127)
    high, _ = pair_sums(plain.astype(np.int8))
    assert high.max() > 32767
    back = bring_pairs_back(plain.copy())
    assert back.tolist() == [[64, 64, -127, 127, -70, -58]]
    assert abs(back[0, 0]) + abs(back[0, 1]) == PAIR_LIMIT
    fine = np.array([[100, 28, 127, -127, 0, 127, 5]], np.float32)
    assert bring_pairs_back(fine.copy()).tolist() == fine.tolist()


@pytest.mark.parametrize("bits", [7, 8])
def test_channels_come_near_an_exhaustive_search(bits: int) -> None:
    """Over a fine scan of scales, every channel by itself in float64."""
    weight, importance = weights(24, 65), np.linspace(0.2, 3, 65, dtype=np.float32)
    top = 2 ** (bits - 1) - 1
    for known in (None, importance):
        codes, scales = quantize_channels(weight, bits, known)
        factor = np.ones(65) if known is None else known.astype(np.float64)
        error = ((weight - codes * scales[:, None].astype(np.float64)) ** 2) @ factor
        best = np.full(24, np.inf)
        for largest in np.arange(0.45 * top, 1.2 * top, 0.25):
            scale = np.abs(weight).max(1).astype(np.float64) / largest
            trial = np.clip(np.rint(weight / scale[:, None]), -top, top).astype(np.float32)
            trial = bring_pairs_back(trial)
            best = np.minimum(best, ((weight - trial * scale[:, None]) ** 2) @ factor)
        # Hundreds of scales hit the weights by luck now and then: worth some 18 % of a tiny error.
        assert error.sum() <= 1.25 * best.sum()
        scale = np.abs(weight).max(1).astype(np.float64) / (0.5 * top)
        coarse = np.clip(np.rint(weight / scale[:, None]), -top, top) * scale[:, None]
        assert (((weight - coarse) ** 2) @ factor).sum() > 1.5 * error.sum(), "negative control: half the codes"


def test_rows_of_zeros_and_single_values() -> None:
    weight = np.zeros((3, 8), np.float32)
    weight[1, 5] = 1e-30
    codes, scales = quantize_channels(weight, 8)
    assert scales[0] == scales[2] == 0 and not codes[0].any()
    assert codes[1, 5] * scales[1] == pytest.approx(1e-30, rel=1e-5)


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [7, 8])
def test_quantizers_shift_the_same_codes(name: str, bits: int) -> None:
    scheme = Scheme(bits, 0, symmetric=True, activations="dynamic")
    weight = weights(9, 33)
    result = load_quantizer(name).quantize(weight, scheme)
    codes, scales = quantize_channels(weight, bits)
    assert result.zero_points is None and result.codes.dtype == np.uint8
    np.testing.assert_array_equal(result.codes.astype(int) - 2 ** (bits - 1), codes)
    np.testing.assert_array_equal(result.scales, scales[:, None])


# ---------------------------------------------------------------------------------------------------------------- GPTQ


def moments_of(columns: int) -> Float32:
    """Return the second moments of inputs whose channels go together, as a residual stream's do."""
    random = np.random.default_rng(columns)
    inputs = random.normal(size=(4 * columns, columns // 4)) @ random.normal(size=(columns // 4, columns))
    inputs += 0.1 * random.normal(size=inputs.shape)
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def slow(weight: Float32, scales: Float32, moments: Float32, bits: int) -> npt.NDArray[np.int64]:
    """GPTQ as OBQ states it: after each column, invert what is left of H anew and spread the error along it."""
    top, columns = 2 ** (bits - 1) - 1, weight.shape[1]
    damped = moments.astype(np.float64)
    damped[np.diag_indices(columns)] += DAMPING * np.mean(np.diagonal(damped))
    rest, codes = weight.astype(np.float64), np.zeros(weight.shape, np.int64)
    order = [int(index) for index in np.argsort(-np.diagonal(moments), kind="stable")]
    while order:
        column, others = order[0], order[1:]
        inverse = np.linalg.inv(damped[np.ix_(order, order)])
        for row in range(len(weight)):
            wanted = round(rest[row, column] / float(scales[row]))
            partner = int(codes[row, column ^ 1]) if column ^ 1 < columns else 0
            least = -min(top, PAIR_LIMIT - max(-partner, 0))
            codes[row, column] = min(max(wanted, least), min(top, PAIR_LIMIT - max(partner, 0)))
            error = (rest[row, column] - codes[row, column] * float(scales[row])) / inverse[0, 0]
            rest[row, others] -= error * inverse[0, 1:]
        order = others
    return codes


@pytest.mark.parametrize(("bits", "columns"), [(8, 96), (7, 72), (8, 131)])
def test_gptq_is_what_the_paper_says(bits: int, columns: int) -> None:
    weight, moments = weights(8, columns), moments_of(columns)
    _, scales = quantize_channels(weight, bits, np.ascontiguousarray(np.diagonal(moments)))
    fast, expected = compensated(weight, scales, moments, bits), slow(weight, scales, moments, bits)
    # float32 against float64: a value in the middle of two codes may fall on either side.
    assert np.mean(fast != expected) < 0.005
    assert np.abs(fast.astype(int) - expected).max() <= 1
    plain = np.rint(weight / scales[:, None])
    assert np.mean(plain != expected) > 0.05, "negative control: without compensation"

    def loss(codes: npt.NDArray[np.floating]) -> float:
        error = (weight - codes * scales[:, None]).astype(np.float64)
        return float(np.einsum("nk,kl,nl->", error, moments.astype(np.float64), error))

    assert loss(fast.astype(np.float64)) == pytest.approx(loss(expected.astype(np.float64)), rel=0.02)
    assert loss(fast.astype(np.float64)) < 0.7 * loss(plain)
    high, low = pair_sums(fast)
    assert high.max() <= 32767 and low.min() >= -32768


def test_gptq_rounds_to_nearest_what_it_knows_nothing_of() -> None:
    weight, scheme = weights(5, 64), Scheme(4, 32, symmetric=True)
    found = load_quantizer("gptq").quantize(weight, scheme)
    expected = load_quantizer("rtn").quantize(weight, scheme)
    np.testing.assert_array_equal(found.codes, expected.codes)
    diagonal = np.diag(np.linspace(1, 2, 64)).astype(np.float32)
    dynamic = Scheme(8, 0, symmetric=True, activations="dynamic")
    alone = load_quantizer("gptq").quantize(weight, dynamic, moments=diagonal)
    codes, scales = quantize_channels(weight, 8, np.ascontiguousarray(np.diagonal(diagonal)))
    # Channels that have nothing to do with each other cannot make up for each other.
    np.testing.assert_array_equal(alone.scales[:, 0], scales)
    assert np.mean(alone.codes.astype(int) - 128 != codes) < 0.02


@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    scheme, weight, moments = Scheme(8, 0, symmetric=True, activations="dynamic"), weights(12, 96), moments_of(96)
    whole = load_quantizer(name).quantize(weight, scheme, moments=moments)
    for start, stop in ((0, 5), (5, 12)):
        part = load_quantizer(name).quantize(weight[start:stop], scheme, moments=moments)
        assert np.mean(part.codes != whole.codes[start:stop]) < 0.002
        np.testing.assert_array_equal(part.scales, whole.scales[start:stop])
