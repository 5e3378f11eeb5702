"""Round-to-nearest: near an exhaustive search, better than plain rounding, indifferent to chunks and threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compress.contracts import QuantizedRows, Scheme
from compress.errors import CompressError, UsageError
from compress.quantize import round_to_nearest
from compress.quantize.round_to_nearest import RoundToNearest
from compress.quantize.scales import ScaleFormat

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Dequantize = Callable[[QuantizedRows, Scheme, int], Float64]

quantizer = RoundToNearest()


# ---------------------------------------------------------------------------------------------------------- oracles


def blocks_of(weight: Float32, importance: Float32 | None, size: int) -> list[tuple[Float64, Float64]]:
    """Return (values, importance) of every block, row by row; the last of a row may be short."""
    weights = np.ones(weight.shape[1]) if importance is None else importance.astype(np.float64)
    return [
        (row[start : start + size].astype(np.float64), weights[start : start + size])
        for row in weight
        for start in range(0, weight.shape[1], size)
    ]


def error_at(values: Float64, weights: Float64, scales: Float64, zero: int, top: int) -> float:
    """Return the least squared error of one block over many scales, for one zero point."""
    codes = np.clip(np.rint(values / scales[:, None]) + zero, 0, top)
    restored = (codes - zero) * scales[:, None]
    return float((weights * (values - restored) ** 2).sum(axis=1).min())


def exhaustive_error(weight: Float32, scheme: Scheme, importance: Float32 | None = None) -> float:
    """Return the total squared error of the best scale (and zero point) of every block, by scanning them all."""
    top = 2**scheme.bits - 1
    total = 0.0
    for values, weights in blocks_of(weight, importance, scheme.block_size):
        greatest = float(np.abs(values).max())
        if scheme.symmetric:
            scales = np.linspace(0.3, 2.2, 500) * greatest / 2 ** (scheme.bits - 1)
            scales = np.concatenate([scales, -scales])
            total += error_at(values, weights, scales, 2 ** (scheme.bits - 1), top)
            continue
        span = max(values.max(), 0.0) - min(values.min(), 0.0)
        scales = np.linspace(0.5, 1.5, 200) * span / top
        middle = round(-min(values.min(), 0.0) / span * top)
        zeros = range(max(0, middle - 3), min(top, middle + 3) + 1)
        total += min(error_at(values, weights, scales, zero, top) for zero in zeros)
    return total


def absmax_error(weight: Float32, scheme: Scheme, importance: Float32 | None = None) -> float:
    """Return the squared error of plain rounding: the extreme value, or both ends, meet the last code."""
    top, half = 2**scheme.bits - 1, 2 ** (scheme.bits - 1)
    total = 0.0
    for values, weights in blocks_of(weight, importance, scheme.block_size):
        low, high = min(values.min(), 0.0), max(values.max(), 0.0)
        scale = -values[np.abs(values).argmax()] / half if scheme.symmetric else (high - low) / top
        zero = half if scheme.symmetric else round(-low / scale)
        total += error_at(values, weights, np.array([scale]), zero, top)
    return total


def squared_error(weight: Float32, restored: Float64, importance: Float32 | None = None) -> float:
    weights = 1.0 if importance is None else importance.astype(np.float64)
    return float((weights * (weight.astype(np.float64) - restored) ** 2).sum())


def channel_importance(columns: int) -> Float32:
    return np.exp(np.random.default_rng(9).normal(0, 1, columns)).astype(np.float32)


# --------------------------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("bits", "block_size", "symmetric", "slack", "weighted_slack"),
    [
        (4, 16, True, 0.003, 0.02),
        (4, 32, True, 0.003, 0.02),
        (4, 32, False, 0.003, 0.02),
        (4, 64, True, 0.003, 0.02),
        (4, 64, False, 0.003, 0.04),
        (4, 128, True, 0.003, 0.03),
        (2, 32, True, 0.003, 0.04),
        (2, 32, False, 0.003, 0.03),
        (2, 64, True, 0.003, 0.03),
        # 1/300 of the 4-bit error: which of 256 codes happen to fit is luck, and not worth a longer search.
        (8, 32, True, 0.08, 0.14),
        (8, 32, False, 0.12, 0.26),
    ],
)
def test_error_is_near_an_exhaustive_scan_and_below_plain_rounding(
    bits: int,
    block_size: int,
    symmetric: bool,
    slack: float,
    weighted_slack: float,
    weighted: bool,
    trained_like: Float32,
    dequantize: Dequantize,
) -> None:
    scheme = Scheme(bits, block_size, symmetric)
    weight = trained_like[:24]
    importance = channel_importance(weight.shape[1]) if weighted else None
    allowed = exhaustive_error(weight, scheme, importance) * (1 + (weighted_slack if weighted else slack))
    error = squared_error(weight, dequantize(quantizer.quantize(weight, scheme, importance), scheme, 192), importance)
    plain = absmax_error(weight, scheme, importance)
    assert error < allowed
    assert error < 0.97 * plain
    assert plain > allowed  # negative control: the bound tells a search from plain rounding


def test_importance_moves_error_to_channels_that_matter_less(trained_like: Float32, dequantize: Dequantize) -> None:
    scheme = Scheme(4, 32, symmetric=True)
    importance = channel_importance(192)
    plain = dequantize(quantizer.quantize(trained_like, scheme), scheme, 192)
    weighted = dequantize(quantizer.quantize(trained_like, scheme, importance), scheme, 192)
    assert squared_error(trained_like, weighted, importance) < 0.95 * squared_error(trained_like, plain, importance)
    assert squared_error(trained_like, plain) < 0.97 * squared_error(trained_like, weighted)


@pytest.mark.parametrize("scale_format", ["float16", "int8"])
def test_smaller_scales_cost_next_to_nothing(
    scale_format: ScaleFormat, trained_like: Float32, dequantize: Dequantize
) -> None:
    scheme = Scheme(4, 32, symmetric=True)
    full = squared_error(trained_like, dequantize(quantizer.quantize(trained_like, scheme), scheme, 192))
    result = quantizer.quantize(trained_like, scheme, scale_format=scale_format)
    assert squared_error(trained_like, dequantize(result, scheme, 192)) < 1.005 * full


# ------------------------------------------------------------------------------------------------------ determinism


@pytest.mark.parametrize("columns", [32, 33, 100, 192, 576])
@pytest.mark.parametrize(("bits", "block_size", "symmetric"), [(4, 32, True), (4, 16, False), (8, 128, True)])
def test_any_chunking_and_any_threads_give_the_same_bits(
    columns: int, bits: int, block_size: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = Scheme(bits, block_size, symmetric)
    weight = np.random.default_rng(columns).standard_t(4, (61, columns)).astype(np.float32)
    importance = channel_importance(columns)
    monkeypatch.setattr(round_to_nearest, "CHUNK_ELEMENTS", 4096)
    whole = quantizer.quantize(weight, scheme, importance)
    monkeypatch.setattr(round_to_nearest, "CHUNK_ELEMENTS", 128 * 1024)
    cuts = [0, 1, 2, 9, 40, 61]
    with ThreadPoolExecutor(2) as pool:
        parts = list(
            pool.map(
                lambda cut: quantizer.quantize(weight[cut[0] : cut[1]], scheme, importance),
                zip(cuts[:-1], cuts[1:], strict=True),
            )
        )
    assert np.array_equal(np.concatenate([part.codes for part in parts]), whole.codes)
    assert np.array_equal(np.concatenate([part.scales for part in parts]), whole.scales)
    if whole.zero_points is not None:
        zeros = [part.zero_points for part in parts if part.zero_points is not None]
        assert np.array_equal(np.concatenate(zeros), whole.zero_points)


def test_importance_counts_only_up_to_a_factor(trained_like: Float32) -> None:
    scheme = Scheme(4, 32, symmetric=True)
    importance = channel_importance(192)
    one = quantizer.quantize(trained_like, scheme, importance)
    other = quantizer.quantize(trained_like, scheme, importance * np.float32(2**-60))
    assert np.array_equal(one.codes, other.codes) and np.array_equal(one.scales, other.scales)


# ---------------------------------------------------------------------------------------------------- hostile blocks

magnitudes = st.sampled_from([0.0, 1e-45, 1e-38, 1e-30, 1e-6, 1.0, 1e6, 1e30, 1.5e38, 3e38])
schemes = st.builds(Scheme, st.sampled_from([2, 4, 8]), st.sampled_from([16, 32]), st.booleans())


@given(
    arrays(np.float32, (2, 37), elements=st.floats(-1, 1, width=32)),
    magnitudes,
    schemes,
    st.booleans(),
)
def test_any_finite_weight_keeps_within_a_step(
    dequantize: Dequantize, unit: Float32, magnitude: float, scheme: Scheme, weighted: bool
) -> None:
    with np.errstate(under="ignore"):
        weight = unit * np.float32(magnitude)
    if not scheme.symmetric and magnitude > 2e38:
        weight = weight / 2  # max - min has to be a float32
    result = quantizer.quantize(weight, scheme, np.ones(37, np.float32) if weighted else None)
    assert np.isfinite(result.scales).all()
    assert int(result.codes.max()) < 2**scheme.bits
    with np.errstate(under="ignore"):
        restored = dequantize(result, scheme, 37)
    greatest = float(np.abs(weight.astype(np.float64)).max())
    # Clipping may cost more than half a step, but never more than the value itself.
    assert np.abs(restored - weight).max() <= max(greatest, 1e-35)
    assert np.array_equal(result.codes, quantizer.quantize(weight, scheme).codes)


@pytest.mark.parametrize("scheme", [Scheme(4, 32, symmetric=True), Scheme(4, 32, symmetric=False)])
def test_a_zero_block_is_zero_exactly(scheme: Scheme, dequantize: Dequantize) -> None:
    weight = np.zeros((3, 64), np.float32)
    weight[1, 40] = 2
    restored = dequantize(quantizer.quantize(weight, scheme), scheme, 64)
    assert np.array_equal(restored != 0, weight != 0)
    assert restored[1, 40] == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("value", [0.3, -0.3, 1e30, -1e-30])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_constant_block_is_exact(value: float, symmetric: bool, dequantize: Dequantize) -> None:
    scheme = Scheme(4, 32, symmetric)
    weight = np.full((2, 64), value, np.float32)
    assert dequantize(quantizer.quantize(weight, scheme), scheme, 64) == pytest.approx(weight, rel=2e-7)


def test_one_outlier_meets_a_code_and_does_not_drown(dequantize: Dequantize) -> None:
    scheme = Scheme(4, 32, symmetric=True)
    weight = np.random.default_rng(4).normal(size=(4, 32)).astype(np.float32)
    weight[:, 5] = 1000
    restored = dequantize(quantizer.quantize(weight, scheme), scheme, 32)
    assert restored[:, 5] == pytest.approx(1000, rel=1e-6)


def test_padding_holds_the_zero_point() -> None:
    weight = np.random.default_rng(5).normal(size=(3, 33)).astype(np.float32) + np.float32(2)
    for symmetric in (True, False):
        result = quantizer.quantize(weight, Scheme(4, 32, symmetric))
        zeros = np.full((3, 2), 8) if result.zero_points is None else result.zero_points
        assert np.array_equal(result.codes[:, 33:], np.broadcast_to(zeros[:, 1:], (3, 31)))


def test_wrong_input_is_refused(trained_like: Float32) -> None:
    scheme = Scheme(4, 32, symmetric=True)
    with pytest.raises(UsageError, match="block size 512"):
        quantizer.quantize(trained_like, Scheme(4, 512, symmetric=True))
    with pytest.raises(UsageError, match="scale format"):
        quantizer.quantize(trained_like, scheme, scale_format=cast(Any, "float8"))
    with pytest.raises(ValueError, match="float32 matrix"):
        quantizer.quantize(cast(Any, trained_like.astype(np.float64)), scheme)
    for bad in (np.ones(5, np.float32), np.full(192, -1, np.float32), np.full(192, np.nan, np.float32)):
        with pytest.raises(ValueError, match="importance"):
            quantizer.quantize(trained_like, scheme, bad)
    with pytest.raises(CompressError, match="beyond float16"):
        quantizer.quantize(trained_like * np.float32(1e9), scheme, scale_format="float16")


def test_scratch_stays_small(trained_like: Float32) -> None:
    search = round_to_nearest._Search.create(Scheme(4, 32, symmetric=True), 8192, channel_importance(8192))
    buffers = {id(item): item.nbytes for item in vars(search).values() if isinstance(item, np.ndarray)}
    assert sum(buffers.values()) < 30e6


# ------------------------------------------------------------------------------------------------------------- peers


def peer_weights() -> Float32:
    return (np.random.default_rng(6).standard_t(6, size=(256, 512)) * 0.05).astype(np.float32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_worse_than_neural_compressors_round_to_nearest(symmetric: bool, dequantize: Dequantize) -> None:
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("neural_compressor.torch.algorithms.weight_only.rtn")
    weight = peer_weights()
    scheme = Scheme(4, 32, symmetric)
    # A copy: the peer writes its result into its argument.
    theirs = peer.quant_tensor(torch.tensor(weight), bits=4, group_size=32, scheme="sym" if symmetric else "asym")
    ours = squared_error(weight, dequantize(quantizer.quantize(weight, scheme), scheme, 512))
    assert ours < 0.95 * squared_error(weight, theirs.numpy().astype(np.float64))


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_worse_than_onnxruntimes_quantizer(symmetric: bool, dequantize: Dequantize) -> None:
    peer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    weight = peer_weights()
    scheme = Scheme(4, 32, symmetric)
    packed = np.zeros((256, 16, 16), np.uint8)
    scales = np.zeros((256, 16), np.float32)
    zeros = np.zeros((256, 8), np.uint8)
    peer.quantize_matmul_4bits(packed, np.ascontiguousarray(weight.T), scales, zeros, 32, 256, 512, symmetric)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(256, 512)
    zero_points = None if symmetric else np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(256, 16)
    theirs = dequantize(QuantizedRows(codes, scales.reshape(256, 16), zero_points), scheme, 512)
    assert squared_error(weight, theirs) < 0.02 * float((weight.astype(np.float64) ** 2).sum())  # read correctly
    ours = squared_error(weight, dequantize(quantizer.quantize(weight, scheme), scheme, 512))
    assert ours < 0.95 * squared_error(weight, theirs)


@pytest.mark.filterwarnings("ignore")
def test_no_worse_than_onnxruntimes_k_quant(dequantize: Dequantize) -> None:
    peer = pytest.importorskip("onnxruntime.quantization.neural_compressor.weight_only")
    weight = peer_weights()
    scheme = Scheme(4, 32, symmetric=False)
    codes, scales, zeros = peer.quant_tensor_k_quant_cpu(weight.reshape(-1, 32).copy(), 4, 32)
    theirs = ((codes.astype(np.float64) - zeros) * scales).reshape(weight.shape)
    assert squared_error(weight, theirs) < 0.02 * float((weight.astype(np.float64) ** 2).sum())  # read correctly
    ours = squared_error(weight, dequantize(quantizer.quantize(weight, scheme), scheme, 512))
    assert ours <= squared_error(weight, theirs)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [40, 256, 312, 1000])
def test_a_block_may_be_a_whole_row(bits: int, symmetric: bool, columns: int) -> None:
    """Block size 0 is one block of the row's width; it is never better than smaller ones, and near the best scale."""
    weight = np.random.default_rng(columns).normal(0, 0.05, (6, columns)).astype(np.float32)
    scheme = Scheme(bits, 0, symmetric)
    result = quantizer.quantize(weight, scheme)
    assert result.codes.shape == (6, columns) and result.scales.shape == (6, 1)
    zero = 1 << (bits - 1) if result.zero_points is None else result.zero_points.astype(np.float64)
    restored = (result.codes.astype(np.float64) - zero) * result.scales
    whole = Scheme(bits, columns, symmetric)
    best = exhaustive_error(weight, whole)
    found = squared_error(weight, restored)
    assert found <= 1.1 * best
    assert np.array_equal(quantizer.quantize(weight[2:4], scheme).codes, result.codes[2:4])
