"""Bytes: against literals, against an independent bit-by-bit packer, and against what ONNX Runtime reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.contracts import QuantizedRows, Scheme
from compress.errors import UsageError
from compress.quantize import packing


def slow_pack_row(codes: list[int], bits: int) -> list[int]:
    """Pack one row with Python integers: code i occupies bits [i * bits, (i + 1) * bits) of the row."""
    row = sum(code << (index * bits) for index, code in enumerate(codes))
    return list(row.to_bytes(-(-len(codes) * bits // 8), "little"))


def random_codes(rows: int, count: int, bits: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(rows * count + bits).integers(0, 2**bits, (rows, count)).astype(np.uint8)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 31, 32, 33, 48])
def test_packing_matches_a_bit_by_bit_packer(bits: int, count: int) -> None:
    codes = random_codes(7, count, bits)
    packed = packing.pack_codes(codes, bits)
    assert packed.tolist() == [slow_pack_row([int(code) for code in row], bits) for row in codes]
    assert np.array_equal(packing.unpack_codes(packed, bits, count), codes)


def test_packed_bytes_are_literally_these() -> None:
    assert packing.pack_codes(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert packing.pack_codes(np.array([[0, 1, 2, 3, 3]], np.uint8), 2).tolist() == [[0b11100100, 0b11]]
    assert packing.pack_codes(np.array([[255, 7]], np.uint8), 8).tolist() == [[255, 7]]
    assert packing.unpack_codes(np.array([[0x21, 0x03]], np.uint8), 4, 3).tolist() == [[1, 2, 3]]


def test_zero_points_are_packed_row_by_row_and_spare_bits_are_the_middle_code() -> None:
    scheme = Scheme(4, 16, symmetric=False)
    packed = packing.pack_zero_points(np.array([[1, 2, 3], [4, 5, 6]], np.uint8), scheme)
    assert packed.tolist() == [[0x21, 0x83], [0x54, 0x86]]
    assert packing.unpack_zero_points(packed, scheme, 33).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_swapped_nibbles_are_noticed() -> None:
    """Negative control: the slow packer disagrees with high-bits-first packing."""
    codes = random_codes(3, 8, 4)
    wrong = (codes[:, ::2] << 4) | codes[:, 1::2]
    assert wrong.tolist() != [slow_pack_row([int(code) for code in row], 4) for row in codes]


@pytest.mark.parametrize("bits", [2, 4])
def test_a_code_that_does_not_fit_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        packing.pack_codes(np.array([[2**bits]], np.uint8), bits)


def test_wrong_shapes_and_bits_are_refused() -> None:
    with pytest.raises(UsageError, match="3-bit"):
        packing.pack_codes(np.zeros((1, 8), np.uint8), 3)
    with pytest.raises(ValueError, match="need 2 bytes"):
        packing.unpack_codes(np.zeros((1, 3), np.uint8), 4, 4)
    with pytest.raises(ValueError, match="whole blocks"):
        packing.pack_matmul_weight(np.zeros((1, 33), np.uint8), Scheme(4, 32, symmetric=True))
    with pytest.raises(ValueError, match="do not match"):
        packing.pack_table(np.zeros((1, 32), np.uint8), Scheme(4, 32, symmetric=True), 33)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [32, 33, 64, 100])
@pytest.mark.parametrize("symmetric", [True, False])
def test_predicted_bytes_are_the_bytes(bits: int, columns: int, symmetric: bool) -> None:
    scheme = Scheme(bits, 32, symmetric)
    codes = random_codes(5, scheme.blocks(columns) * 32, bits)
    zeros = random_codes(5, scheme.blocks(columns), bits)
    assert packing.pack_matmul_weight(codes, scheme).nbytes == packing.weight_bytes(5, columns, scheme)
    assert packing.pack_table(codes, scheme, columns).nbytes == packing.table_bytes(5, columns, scheme)
    assert packing.scale_count(5, columns, scheme) == zeros.size
    expected = 0 if symmetric else packing.pack_zero_points(zeros, scheme).nbytes
    assert packing.zero_point_bytes(5, columns, scheme) == expected
    assert np.array_equal(packing.unpack_matmul_weight(packing.pack_matmul_weight(codes, scheme), scheme), codes)
    table = packing.unpack_table(packing.pack_table(codes, scheme, columns), scheme, columns)
    assert np.array_equal(table[:, :columns], codes[:, :columns])
    assert np.all(table[:, columns:] == 2 ** (bits - 1))


# ---------------------------------------------------------------------------------------------- what ONNX Runtime reads


def random_rows(rows: int, columns: int, scheme: Scheme) -> QuantizedRows:
    generator = np.random.default_rng(columns)
    blocks = scheme.blocks(columns)
    return QuantizedRows(
        codes=random_codes(rows, blocks * scheme.block_size, scheme.bits),
        scales=generator.normal(size=(rows, blocks)).astype(np.float32),
        zero_points=None if scheme.symmetric else random_codes(rows, blocks, scheme.bits),
    )


def run(node: onnx.NodeProto, tensors: dict[str, npt.NDArray[Any]], feed: dict[str, npt.NDArray[Any]]) -> Any:
    """Run one node whose output is called y."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feed.items()
    ]
    graph = helper.make_graph(
        [node],
        "one",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("columns", [64, 96, 129])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matmul_nbits_reads_these_bytes(
    bits: int, block_size: int, columns: int, symmetric: bool, dequantize: Any
) -> None:
    scheme = Scheme(bits, block_size, symmetric)
    rows = random_rows(33, columns, scheme)
    tensors: dict[str, npt.NDArray[Any]] = {"b": packing.pack_matmul_weight(rows.codes, scheme), "s": rows.scales}
    if rows.zero_points is not None:
        tensors["z"] = packing.pack_zero_points(rows.zero_points, scheme)
    node = helper.make_node(
        "MatMulNBits", ["a", *tensors], ["y"], domain="com.microsoft", K=columns, N=33, bits=bits, block_size=block_size
    )
    activations = np.random.default_rng(1).normal(size=(3, columns)).astype(np.float32)
    expected = activations.astype(np.float64) @ dequantize(rows, scheme, columns).T
    actual = run(node, tensors, {"a": activations})
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error < 1e-5
    shifted = np.roll(dequantize(rows, scheme, columns), 1, axis=1)  # negative control: one column off
    assert np.abs(actual - activations @ shifted.T).max() / np.abs(expected).max() > 1e-2


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [64, 96, 132])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gather_block_quantized_reads_these_bytes(bits: int, columns: int, symmetric: bool, dequantize: Any) -> None:
    scheme = Scheme(bits, 32, symmetric)
    rows = random_rows(11, columns, scheme)
    data: dict[str, npt.NDArray[Any]] = {"t": packing.pack_table(rows.codes, scheme, columns)}
    tensors: dict[str, npt.NDArray[Any]] = {"s": rows.scales}
    if rows.zero_points is not None:
        tensors["z"] = packing.pack_zero_points(rows.zero_points, scheme)
    node = helper.make_node(
        "GatherBlockQuantized",
        ["t", "i", *tensors],
        ["y"],
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=1,
        block_size=32,
        bits=bits,
    )
    wanted = np.array([10, 0, 3], np.int64)
    actual = run(node, data | tensors, {"i": wanted})
    expected = dequantize(rows, scheme, columns)[wanted]
    assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()


def test_a_tied_table_is_gathered_from_the_bytes_of_the_head(dequantize: Any) -> None:
    """GatherBlockQuantized reads MatMulNBits' three-dimensional B as it is: no Reshape, no second copy."""
    scheme = Scheme(4, 32, symmetric=True)
    rows = random_rows(11, 96, scheme)
    tensors: dict[str, npt.NDArray[Any]] = {
        "t": packing.pack_matmul_weight(rows.codes, scheme),
        "s": rows.scales[..., None],
    }
    node = helper.make_node(
        "GatherBlockQuantized",
        ["t", "i", "s"],
        ["y"],
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=2,
        block_size=32,
        bits=4,
    )
    wanted = np.array([[10, 0], [3, 3]], np.int64)
    actual = run(node, tensors, {"i": wanted})
    expected = dequantize(rows, scheme, 96)[wanted]
    assert actual.shape == (2, 2, 3, 32)
    assert np.abs(actual.reshape(2, 2, 96) - expected).max() <= 1e-6 * np.abs(expected).max()


# ------------------------------------------------------------------------------------------------------ a scale a row


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [16, 40, 312])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_table_of_whole_rows_is_gathered(bits: int, columns: int, symmetric: bool, dequantize: Any) -> None:
    """Block size 0: the operator is told a block that covers the row, and reads the one scale there is."""
    scheme = Scheme(bits, 0, symmetric)
    random = np.random.default_rng(columns)
    codes = random_codes(11, columns, bits)
    scales = random.normal(size=(11, 1)).astype(np.float32)
    zeros = None if symmetric else random_codes(11, 1, bits)
    packed = packing.pack_table(codes, scheme, columns)
    assert packed.nbytes == packing.table_bytes(11, columns, scheme)
    assert np.array_equal(packing.unpack_table(packed, scheme, columns), codes)
    tensors: dict[str, npt.NDArray[Any]] = {"s": scales}
    if zeros is not None:
        tensors["z"] = packing.pack_zero_points(zeros, scheme)
    covering = max(16, 1 << (columns - 1).bit_length())
    node = helper.make_node(
        "GatherBlockQuantized",
        ["t", "i", *tensors],
        ["y"],
        domain="com.microsoft",
        gather_axis=0,
        quantize_axis=1,
        block_size=covering,
        bits=bits,
    )
    wanted = np.array([[10, 0, 3]], np.int64)
    actual = run(node, {"t": packed} | tensors, {"i": wanted})
    middle = np.full((11, 1), 1 << (bits - 1)) if zeros is None else zeros.astype(int)
    expected = ((codes.astype(int) - middle) * scales)[wanted]
    assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()
    with pytest.raises(ValueError, match="do not match"):
        packing.pack_table(codes[:, 1:], scheme, columns)
