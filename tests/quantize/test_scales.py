"""Scale formats: exact round trips, no lost blocks, and ONNX Runtime folds them away when it loads the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

from compress.contracts import Scheme
from compress.errors import CompressError, UsageError
from compress.quantize import packing, scales
from compress.quantize.round_to_nearest import RoundToNearest

finite = st.floats(-1e4, 1e4, width=32).filter(lambda value: value == 0 or abs(value) > 1e-30)


@given(arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=finite))
@pytest.mark.parametrize("scale_format", ["float32", "float16", "int8"])
def test_rounded_scales_survive_storage_exactly(scale_format: Any, values: Any) -> None:
    rounded = scales.round_scales(values, scale_format)
    stored, row_scales = scales.pack_scales(rounded, scale_format)
    assert np.array_equal(scales.unpack_scales(stored, row_scales), rounded)
    assert np.array_equal(rounded == 0, values == 0)
    assert np.all(rounded * values >= 0)
    total = stored.nbytes + (0 if row_scales is None else row_scales.nbytes)
    rows, blocks = values.shape
    assert total == scales.scale_bytes(rows, blocks, scale_format)


def test_rounding_is_as_near_as_the_format_allows() -> None:
    values = np.random.default_rng(0).uniform(0.01, 1, (50, 18)).astype(np.float32)
    half = scales.round_scales(values, "float16")
    assert np.abs(half / values - 1).max() < 2**-11
    eighth = scales.round_scales(values, "int8")
    step = values.max(axis=1, keepdims=True) / 127
    assert (np.abs(eighth - values) / step).max() < 0.501
    assert (np.abs(eighth - values) / step).max() > 0.4  # negative control: int8 does round


def test_unrounded_scales_cannot_be_packed() -> None:
    values = np.array([[0.1, 0.2, 0.3123]], np.float32)
    formats: tuple[scales.ScaleFormat, ...] = ("float16", "int8")
    for scale_format in formats:
        with pytest.raises(ValueError, match="round them first"):
            scales.pack_scales(values, scale_format)


def test_float16_overflow_and_unknown_formats_are_refused() -> None:
    with pytest.raises(CompressError, match="beyond float16"):
        scales.round_scales(np.array([[7e4]], np.float32), "float16")
    with pytest.raises(UsageError, match="did you mean float16"):
        scales.validate_scale_format("float61")


@pytest.mark.parametrize("scale_format", ["float16", "int8"])
def test_onnxruntime_folds_stored_scales_at_load(scale_format: Any, tmp_path: Path) -> None:
    scheme = Scheme(4, 32, symmetric=True)
    weight = np.random.default_rng(2).normal(size=(64, 128)).astype(np.float32)
    result = RoundToNearest().quantize(weight, scheme, scale_format=scale_format)
    stored, row_scales = scales.pack_scales(result.scales, scale_format)
    tensors = {"b": packing.pack_matmul_weight(result.codes, scheme), "stored": stored}
    nodes = [helper.make_node("Cast", ["stored"], ["cast"], to=TensorProto.FLOAT)]
    if row_scales is not None:
        tensors["row"] = row_scales[:, None]
        nodes.append(helper.make_node("Mul", ["cast", "row"], ["s"]))
    inputs = ["a", "b", "cast" if row_scales is None else "s"]
    node = helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", K=128, N=64, bits=4, block_size=32)
    nodes.append(node)
    graph = helper.make_graph(
        nodes,
        "folded",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 128])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that an optimized model is for this machine only
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] == ["MatMulNBits"]
    codes = result.codes.astype(np.float64).reshape(64, 4, 32) - 8
    dense = (codes * result.scales.astype(np.float64)[..., None]).reshape(64, 128)
    activations = np.random.default_rng(3).normal(size=(1, 128)).astype(np.float32)
    expected = activations @ dense.T
    assert np.abs(session.run(None, {"a": activations})[0] - expected).max() < 1e-5 * np.abs(expected).max()
