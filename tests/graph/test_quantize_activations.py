"""Q/DQ everywhere: the arithmetic against float64, which scales are shared, and what an infinite mask would do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from compress.errors import CompressError
from compress.graph import quantize_activations as qa
from compress.graph.finished import serialize

WORDS, WIDTH = 6, 8


def oracle_pair(values: np.ndarray, low: float, high: float, bits: int = 16) -> np.ndarray:
    """Round every value by itself to the unsigned grid of a range that contains 0."""
    low, high = min(low, 0.0) * qa.HEADROOM[bits], max(high, 0.0) * qa.HEADROOM[bits]
    levels = 2**bits - 1
    scale = float(np.float32((high - low) / levels))
    zero = min(max(round(-low / scale), 0), levels)
    found = [min(max(round(float(value) / scale) + zero, 0), levels) for value in values.ravel()]
    rounded: np.ndarray = (np.array(found, np.float64) - zero) * scale
    return rounded.reshape(values.shape)


def tensor(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    made = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(made.dtype), const_value=made)
    graph.register_initializer(value)
    return value


def value(name: str, *shape: int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


class Attention:
    """x -> x W + b -> two halves -> softmax(h0 h1^T + mask) h1, as onnx_ir and in numpy."""

    def __init__(self, masked: float) -> None:
        generator = np.random.default_rng(0)
        self.x = generator.normal(size=(WORDS, WIDTH)).astype(np.float32)
        self.codes = generator.integers(-127, 128, (WIDTH, 2 * WIDTH)).astype(np.int8)
        self.scales = (generator.random(2 * WIDTH).astype(np.float32) + 0.5) / 127
        self.bias = generator.normal(size=2 * WIDTH).astype(np.float32)
        self.mask = np.zeros((WORDS, WORDS), np.float32)
        self.mask[:, 4:] = masked
        x, y = value("x", WORDS, WIDTH), value("y", WORDS, WIDTH)
        self.graph = ir.Graph([x], [y], nodes=[], opset_imports={"": 21}, name="attention")
        self.model = ir.Model(self.graph, ir_version=10)
        made = {name: tensor(self.graph, name, getattr(self, name)) for name in ("codes", "scales", "bias", "mask")}
        split = tensor(self.graph, "split", np.array([WIDTH, WIDTH]))
        weight, product, sums = (value(name, WIDTH, 2 * WIDTH) for name in ("weight", "product", "sums"))
        product.shape = sums.shape = ir.Shape((WORDS, 2 * WIDTH))
        left, right, turned = value("left", WORDS, WIDTH), value("right", WORDS, WIDTH), value("turned", WIDTH, WORDS)
        scores, seen, shares = (value(name, WORDS, WORDS) for name in ("scores", "seen", "shares"))
        for op_type, inputs, outputs, attributes in (
            ("DequantizeLinear", [made["codes"], made["scales"]], [weight], {"axis": 1}),
            ("MatMul", [x, weight], [product], {}),
            ("Add", [product, made["bias"]], [sums], {}),
            ("Split", [sums, split], [left, right], {"axis": 1}),
            ("Transpose", [right], [turned], {"perm": [1, 0]}),
            ("MatMul", [left, turned], [scores], {}),
            ("Add", [scores, made["mask"]], [seen], {}),
            ("Softmax", [seen], [shares], {"axis": -1}),
            ("MatMul", [shares, right], [y], {}),
        ):
            self.graph.append(ir.node(op_type, inputs, outputs=outputs, attributes=attributes, name=outputs[0].name))

    def compute(self) -> dict[str, np.ndarray]:
        """Return every value in float64."""
        sums = self.x.astype(np.float64) @ (self.codes * self.scales.astype(np.float64)) + self.bias
        left, right = sums[:, :WIDTH], sums[:, WIDTH:]
        scores = left @ right.T
        seen = scores + self.mask
        shares = np.exp(seen - seen.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        product = sums - self.bias
        found = {"x": self.x, "product": product, "sums": sums, "turned": right.T, "right": right}
        return {**found, "scores": scores, "seen": seen, "y": shares @ right}

    def ranges(self) -> dict[str, tuple[float, float]]:
        return {name: (float(array.min()), float(array.max())) for name, array in self.compute().items()}

    def run(self, path: Path) -> np.ndarray:
        serialize(self.model, path)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found: np.ndarray = session.run(["y"], {"x": self.x})[0]
        return found


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


# ----------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("low", "high"), [(-1.5, 3.0), (0.25, 2.0), (-2.0, -1.0), (0.0, 0.0), (-1e-9, 1e-9)])
def test_a_grid_rounds_as_a_slow_float64_does(low: float, high: float, bits: int) -> None:
    values = np.concatenate([np.random.default_rng(1).uniform(low - 0.1, high + 0.1, 200), [0.0, low, high]])
    grid = qa.Grid.covering(low * qa.HEADROOM[bits], high * qa.HEADROOM[bits], bits)
    rounded = (grid.codes(values).astype(np.float64) - grid.zero_point) * float(grid.scale)
    if high - low > 1e-3:
        np.testing.assert_allclose(rounded, oracle_pair(values, low, high, bits), rtol=0, atol=1e-12)
    assert rounded[200] == 0  # 0 is exact
    assert abs(rounded[201] - low) <= grid.scale and abs(rounded[202] - high) <= grid.scale


def test_a_signed_grid_is_symmetric() -> None:
    grid = qa.Grid.symmetric(-3.0, 1.0, 16)
    codes = grid.codes(np.array([-3.0, 3.0, 0.0, 5.0, -5.0]))
    assert codes.dtype == np.int16
    assert codes.tolist() == [-32767, 32767, 0, 32767, -32768]


@pytest.mark.parametrize(("low", "high"), [(np.nan, 1.0), (0.0, np.inf), (2.0, 1.0)])
def test_what_is_no_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(CompressError, match="no range"):
        qa.Grid.covering(low, high, 16)


# --------------------------------------------------------------------------------------------------------------- graphs


def test_the_graph_computes_what_float64_computes(tmp_path: Path) -> None:
    built = Attention(-100.0)
    wanted = built.compute()["y"]
    assert qa.insert(built.graph, built.ranges()) > 8
    found = built.run(tmp_path / "g.onnx")
    # The largest step is that of the masked scores: (100 + range) * 1.25 / 65535.
    assert relative(found, wanted) < 2e-3


def test_eight_bits_are_worse(tmp_path: Path) -> None:
    """Negative control: the tolerance above tells 16 bits from 8."""
    built = Attention(-100.0)
    wanted = built.compute()["y"]
    qa.insert(built.graph, built.ranges(), bits=8)
    assert relative(built.run(tmp_path / "g.onnx"), wanted) > 2e-3


def test_an_infinite_mask_destroys_the_scores(tmp_path: Path) -> None:
    """Negative control of ``npu_mask``: with the exporter's own number every score is the same."""
    built = Attention(float(np.finfo(np.float32).min))
    wanted = built.compute()["y"]
    ranges = {name: tuple(np.clip(ends, -2.7e38, 2.7e38)) for name, ends in built.ranges().items()}
    qa.insert(built.graph, ranges)
    assert relative(built.run(tmp_path / "g.onnx"), wanted) > 0.1


def parameters(graph: ir.Graph, name: str) -> tuple[float, int, str]:
    """Return scale, zero point and type of the codes of a value's pair."""
    node = next(node for node in graph if node.op_type == "QuantizeLinear" and node.inputs[0].name == name)  # type: ignore[union-attr]
    scale, zero = (node.inputs[index].const_value.numpy() for index in (1, 2))  # type: ignore[union-attr]
    return float(scale), int(zero), str(zero.dtype)


def test_what_moves_values_passes_the_scale_on() -> None:
    built = Attention(-100.0)
    qa.insert(built.graph, built.ranges())
    sums = parameters(built.graph, "sums")
    assert parameters(built.graph, "left") == sums
    assert parameters(built.graph, "right") == sums
    assert parameters(built.graph, "turned") == sums
    assert parameters(built.graph, "scores") != sums
    assert parameters(built.graph, "shares") == (float(np.float32(1 / 65535)), 0, "uint16")


def test_the_second_factor_of_two_activations_is_signed() -> None:
    built = Attention(-100.0)
    qa.insert(built.graph, built.ranges())
    for node in built.graph:
        if node.op_type != "MatMul":
            continue
        made = node.inputs[1].producer()  # type: ignore[union-attr]
        assert made is not None and made.op_type == "DequantizeLinear"
        assert made.inputs[0].dtype == (ir.DataType.INT8 if "weight" in str(node.inputs[1].name) else ir.DataType.INT16)  # type: ignore[union-attr]


def test_names_outputs_and_constants_stay() -> None:
    built = Attention(-100.0)
    qa.insert(built.graph, built.ranges())
    assert [output.name for output in built.graph.outputs] == ["y"]
    assert built.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert built.graph.outputs[0].producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
    floats = [v.name for v in built.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and v.shape]
    assert [name for name in floats if not str(name).startswith("scale")] == []
    assert "bias" not in built.graph.initializers


def test_every_float_is_asked_for() -> None:
    built = Attention(-100.0)
    assert {str(v.name) for v in qa.float_values(built.graph)} == set(built.ranges())


def test_a_missing_range_is_an_error() -> None:
    built = Attention(-100.0)
    ranges: Any = {name: ends for name, ends in built.ranges().items() if name != "scores"}
    with pytest.raises(CompressError, match="no range") as caught:
        qa.insert(built.graph, ranges)
    assert caught.value.where == "scores"


def test_a_float_weight_is_an_error() -> None:
    built = Attention(-100.0)
    bias = built.graph.initializers["bias"]
    bias.const_value = ir.ExternalTensor("data", 0, 64, ir.DataType.FLOAT, shape=ir.Shape([2 * WIDTH]), name="bias")
    with pytest.raises(CompressError, match="still in floats") as caught:
        qa.insert(built.graph, built.ranges())
    assert caught.value.where == "bias"
