"""Signed bytes for integer products: codes that no processor's sums clip, and scales near the best there is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

from compress.quantize.integer import PAIR_LIMIT, bring_pairs_back, quantize_channels, unsigned

Ints = npt.NDArray[np.int64]
WIDTHS = (1, 2, 3, 33, 64, 257)


def weights(rows: int, columns: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return rows with heavy tails, and some whose values are all large: where many pairs are."""
    random = np.random.default_rng(seed)
    weight = random.standard_t(4, (rows, columns)) * 0.05
    weight[::3] = random.uniform(0.5, 1, (len(weight[::3]), columns)) * random.choice([-1, 1], (1, columns))
    return weight.astype(np.float32)


def pair_sums(codes: npt.NDArray[np.int8]) -> Ints:
    """Return ``|a| + |b|`` of neighbours of one sign, the last of an odd number being alone."""
    wide = codes.astype(np.int64)
    even, odd = wide[:, : wide.shape[1] // 2 * 2 : 2], wide[:, 1::2]
    return np.where(even * odd > 0, abs(even) + abs(odd), 0)


def maddubs(inputs: Ints, codes: Ints) -> Ints:
    """Return ``inputs [T, K] x codes [N, K]`` as AVX2 alone does: pairs are added in 16 bits, and clipped."""
    if inputs.shape[1] % 2:
        inputs, codes = np.pad(inputs, ((0, 0), (0, 1))), np.pad(codes, ((0, 0), (0, 1)))
    pairs = inputs[:, None, 0::2] * codes[None, :, 0::2] + inputs[:, None, 1::2] * codes[None, :, 1::2]
    return np.clip(pairs, -32768, 32767).sum(axis=2)


def plain(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Return what everybody stores: the greatest weight is 127, and neighbours are nobody's business."""
    scale = np.abs(weight).max(axis=1) / np.float32(127)
    return np.rint(weight / scale[:, None]).astype(np.int8), scale


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("bits", [7, 8])
def test_neighbours_leave_each_other_room(columns: int, bits: int) -> None:
    codes, scales = quantize_channels(weights(24, columns), bits)
    assert codes.shape == (24, columns) and codes.dtype == np.int8 and scales.dtype == np.float32
    assert np.abs(codes.astype(int)).max() <= (127 if bits == 8 else 63)
    assert pair_sums(codes).max(initial=0) <= PAIR_LIMIT
    if columns > 2:
        assert pair_sums(plain(weights(24, columns))[0]).max() > PAIR_LIMIT, "the weights would overflow"


@pytest.mark.parametrize("columns", [2, 33, 64])
def test_sums_in_sixteen_bits_are_exact(columns: int) -> None:
    weight = weights(24, columns)
    codes = quantize_channels(weight, 8)[0].astype(np.int64)
    for inputs in (
        np.full((1, columns), 255),
        np.random.default_rng(1).integers(0, 256, (40, columns)),
        np.random.default_rng(2).choice([0, 255], (40, columns)),
    ):
        assert np.array_equal(maddubs(inputs, codes), inputs @ codes.T)
    # Negative control: plain codes overflow.
    bad = plain(weight)[0].astype(np.int64)
    worst = np.full((1, columns), 255)
    assert not np.array_equal(maddubs(worst, bad), worst @ bad.T)


def test_every_pair_is_brought_back_and_no_other_is_touched() -> None:
    """All pairs of codes there are, against the rule spelled out."""
    numbers = np.arange(-127, 128)
    pairs = np.stack(np.meshgrid(numbers, numbers), axis=-1).reshape(1, -1)
    result = bring_pairs_back(pairs.astype(np.float32)).astype(int).reshape(-1, 2)
    for (a, b), (x, y) in zip(pairs.reshape(-1, 2), result, strict=True):
        excess = abs(a) + abs(b) - PAIR_LIMIT if a * b > 0 else 0
        if excess <= 0:
            assert (a, b) == (x, y)
        else:
            assert abs(x) + abs(y) == PAIR_LIMIT and np.sign(x) == np.sign(a) and np.sign(y) == np.sign(b)
            assert abs((abs(a) - abs(x)) - (abs(b) - abs(y))) <= 1, "each gives half"
            assert abs(255 * x + 255 * y) <= 32767
    assert int((np.abs(pairs.reshape(-1, 2)).sum(1) > PAIR_LIMIT).sum()) > 10_000


def best_error(row: npt.NDArray[np.float64], bits: int, importance: npt.NDArray[np.float64]) -> float:
    """Return the least error of a fine grid of scales."""
    top, found = 127 if bits == 8 else 63, np.inf
    for largest in np.linspace(40 if bits == 8 else 50, 130 if bits == 8 else 80, 181):
        scale = np.abs(row).max() / largest
        codes = np.clip(np.rint(row / scale), -top, top).astype(np.float32)[None]
        codes = bring_pairs_back(codes)[0].astype(np.float64)
        found = min(found, float(importance @ (row - codes * scale) ** 2))
    return found


@pytest.mark.parametrize(("bits", "median", "most"), [(7, 1.10, 1.35), (8, 1.20, 1.70)])
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_are_near_the_best(bits: int, median: float, most: float, weighted: bool) -> None:
    """Squared error against that of the best of 181 scales, each row with its own luck."""
    random = np.random.default_rng(5)
    weight = (random.standard_t(5, (24, 192)) * 0.04).astype(np.float32)
    weight[::4] = random.uniform(-1, 1, (6, 192))
    importance = random.exponential(1, 192) if weighted else np.ones(192)
    codes, scales = quantize_channels(weight, bits, importance.astype(np.float32) if weighted else None)
    error = np.square(weight - codes * scales[:, None].astype(np.float64)) @ importance
    best = np.array([best_error(row.astype(np.float64), bits, importance) for row in weight])
    ratio = error / best
    assert ratio.min() > 0.98 and np.median(ratio) < median and ratio.max() < most, (np.median(ratio), ratio.max())
    if bits == 8:  # Negative control: the largest code there is, without a search.
        scale = np.abs(weight).max(axis=1).astype(np.float64) / 127
        fixed = bring_pairs_back(np.rint(weight / scale[:, None]).astype(np.float32))
        naive = np.square(weight - fixed * scale[:, None]) @ importance / best
        assert naive.max() > 2 * most, naive.max()


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("factor", [1e30, 1e-30])
def test_magnitude_does_not_matter(bits: int, factor: float) -> None:
    """Squares of such weights are beyond float32."""
    weight = weights(24, 64)
    codes, scales = quantize_channels(weight, bits)
    other, large = quantize_channels((weight.astype(np.float64) * factor).astype(np.float32), bits)
    assert np.mean(codes != other) < 0.02, "rounding of the factor moves a tie here and there"
    np.testing.assert_allclose(large, scales.astype(np.float64) * factor, rtol=0.2)
    relative = np.abs(other * large.astype(np.float64)[:, None] / factor - weight).max() / np.abs(weight).max()
    assert relative < 0.03


def test_rows_of_zeros_and_of_next_to_nothing() -> None:
    weight = weights(6, 33)
    weight[1] = 0
    weight[2] *= 1e-40
    weight[4] = 0
    weight[4, 32] = -3
    codes, scales = quantize_channels(weight, 8, np.ones(33, np.float32))
    assert scales[1] == scales[2] == 0 and not codes[1].any() and not codes[2].any()
    assert abs(codes[4, 32] * scales[4] + 3) < 1e-5 and np.count_nonzero(codes[4]) == 1
    rest = [0, 3, 5]
    assert np.array_equal(codes[rest], quantize_channels(weight[rest], 8, np.ones(33, np.float32))[0])
    nothing = quantize_channels(np.zeros((0, 33), np.float32), 8)
    assert nothing[0].shape == (0, 33) and nothing[1].shape == (0,)


def test_importance_without_a_positive_value_and_of_any_size() -> None:
    weight, importance = weights(9, 64), np.random.default_rng(0).exponential(1, 64).astype(np.float32)
    codes, _ = quantize_channels(weight, 8, importance)
    assert np.array_equal(codes, quantize_channels(weight, 8, importance * np.float32(2.0**100))[0])
    assert np.array_equal(codes, quantize_channels(weight, 8, importance * np.float32(2.0**-60))[0])
    assert not np.array_equal(codes, quantize_channels(weight, 8, importance[::-1].copy())[0]), "it matters"
    assert quantize_channels(weight, 8, np.zeros(64, np.float32))[0].any()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(31, 33)
    whole = quantize_channels(weight, 8)
    monkeypatch.setattr("compress.quantize.integer._CHUNK", 100)
    parts = quantize_channels(weight, 8)
    assert np.array_equal(whole[0], parts[0]) and np.array_equal(whole[1], parts[1])


@pytest.mark.parametrize("bits", [7, 8])
def test_unsigned_codes_are_shifted_to_the_middle(bits: int) -> None:
    codes, scales = quantize_channels(weights(5, 33), bits)
    result = unsigned(codes, scales, bits)
    assert result.codes.dtype == np.uint8 and result.zero_points is None and result.scales.shape == (5, 1)
    assert np.array_equal(result.codes.astype(int) - 2 ** (bits - 1), codes)


# ------------------------------------------------------------------------------------------------------- the runtime


def runtime_product(
    inputs: npt.NDArray[np.float32], codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Multiply with onnxruntime's DynamicQuantizeMatMul; codes ``[N, K]``."""
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")],
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["t", codes.shape[1]])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["t", codes.shape[0]])],
        [
            numpy_helper.from_array(np.ascontiguousarray(codes.T), "w"),
            numpy_helper.from_array(scales, "s"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: npt.NDArray[np.float32] = session.run(None, {"x": inputs})[0]
    return found


def exact_product(
    inputs: npt.NDArray[np.float32], codes: npt.NDArray[np.int8], scales: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    low, high = np.float32(min(inputs.min(), 0)), np.float32(max(inputs.max(), 0))
    scale = np.float32((high - low) / np.float32(255))
    zero = int(np.clip(np.rint(-low / scale), 0, 255))
    rounded = np.clip(np.rint(inputs / scale) + zero, 0, 255).astype(np.int64) - zero
    return (rounded @ codes.T.astype(np.int64)) * (scale.astype(np.float64) * scales)


def worst_inputs(codes: npt.NDArray[np.int8]) -> npt.NDArray[np.float32]:
    """Return inputs that make 255 of every channel with a positive code, for each row: all pairs at once."""
    return np.where(codes > 0, 1, 0).astype(np.float32)


@pytest.mark.parametrize("columns", [32, 33, 192])
def test_onnxruntime_multiplies_exactly_on_this_processor(columns: int) -> None:
    codes, scales = quantize_channels(weights(32, columns), 8)
    random = np.random.default_rng(3).normal(size=(8, columns)).astype(np.float32)
    for inputs in (random, worst_inputs(codes)):
        expected = exact_product(inputs, codes, scales)
        np.testing.assert_allclose(
            runtime_product(inputs, codes, scales), expected, rtol=0, atol=1e-6 * np.abs(expected).max()
        )


def adds_in_sixteen_bits() -> bool:
    """Return whether this is an x86 processor without an instruction that adds four products in 32 bits."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return "avx2" in flags and not {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"} & set(flags)


@pytest.mark.skipif(not adds_in_sixteen_bits(), reason="this processor adds products in 32 bits")
def test_plain_codes_overflow_where_there_is_no_vnni() -> None:
    """The control: why neighbours are looked after at all."""
    codes, scales = plain(weights(32, 192))
    inputs = worst_inputs(codes)
    expected = exact_product(inputs, codes, scales)
    assert np.abs(runtime_product(inputs, codes, scales) - expected).max() > 0.01 * np.abs(expected).max()
