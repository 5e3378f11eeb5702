"""What a graph holds, against the plan it was made from, and against graphs as other tools write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from compress import pipeline
from compress.graph.contents import Weight, weights
from compress.planning import Plan, make_plan
from compress.profile import load_profile
from compress.quantize.scheme import scheme_name
from test_npu_decoders import CHANGES
from tiny_models import PLAIN_INT8


def found(artifact: Path) -> dict[str, Weight]:
    return {item.name: item for item in weights(ir.load(artifact / "model.onnx"))}


def planned(model: Path, profile: str, overrides: tuple[str, ...]) -> Plan:
    with pipeline.ModelReference(str(model)).open() as checkpoint:
        return make_plan(pipeline.describe(checkpoint), load_profile(profile, overrides), checkpoint)


@pytest.mark.parametrize(
    ("name", "profile", "overrides"),
    [("llama", "arm-int4", ()), ("gpt2", "x86-int4-mixed", ()), ("llama", "npu-qnn-int8", CHANGES)],
)
def test_as_planned(
    name: str,
    profile: str,
    overrides: tuple[str, ...],
    tiny_artifact: Callable[..., Path],
    tiny_model: Callable[[str], Path],
) -> None:
    graph, plan = found(tiny_artifact(name, profile, *overrides)), planned(tiny_model(name), profile, overrides)
    for fate in plan.fates:
        item = graph[fate.name.removesuffix(".weight")]
        if fate.kind == "vector":
            assert item.kind in ("vector", "constant"), fate.name
            continue
        assert (item.kind, item.shape) == (fate.kind, (fate.rows, fate.columns))
        if fate.scheme is not None and plan.activation_bits is None:
            assert item.storage == scheme_name(fate.scheme), fate.name
            assert item.bytes == fate.nbytes
        elif fate.kind == "matmul":
            assert item.storage == "int8 row static", fate.name
            assert abs(item.bytes - fate.nbytes) <= 16  # a range's scale and zero point
    assert {item.layer for item in graph.values() if item.kind == "matmul"} >= {0, 1, 2}


def test_a_tied_table_counts_once(tiny_artifact: Callable[..., Path]) -> None:
    artifact = tiny_artifact("llama", "arm-int4")
    table = found(artifact)["model.embed_tokens"]
    assert table.operators == ("GatherBlockQuantized", "MatMulNBits") and table.kind == "table"
    total = sum(item.bytes for item in found(artifact).values())
    on_disk = sum((artifact / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    # The rest is nodes and names. Counted twice, codes and scales would exceed it.
    assert on_disk - 35_000 < total < on_disk < total + table.bytes + 35_000


def test_encoders_integer_products(tiny_artifact: Callable[..., Path]) -> None:
    graph = found(tiny_artifact("distilbert:text-classification", PLAIN_INT8))
    linears = [item for item in graph.values() if item.layer is not None and item.kind == "matmul"]
    assert {item.storage for item in linears} == {"int8 row dynamic"}
    assert graph["distilbert.transformer.layer.1.ffn.lin1"].shape == (160, 64)
    assert {item.place for item in linears if item.layer == 2} == {
        "attention.qkv",
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
    }


def foreign(bits: int = 4) -> ir.Model:
    """Build a graph as quantization tools write them: other names, scales of their own, a float product."""
    x = ir.Value(name="x", shape=ir.Shape(["n", 32]), type=ir.TensorType(ir.DataType.FLOAT))

    def stored(name: str, array: np.ndarray) -> ir.Value:
        return ir.Value(name=name, const_value=ir.tensor(array, name=name))

    def node(domain: str, operator: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        made = ir.node(operator, inputs, attributes=attributes or None, domain=domain)
        made.outputs[0].name = f"{operator}_{len(nodes)}"
        nodes.append(made)
        return made.outputs[0]

    nodes: list[ir.Node] = []
    packed = stored("/model/layers.7/mlp/MatMul_weight_Q4", np.zeros((64, 1, 4 * bits), np.uint8))
    scales = stored("/model/layers.7/mlp/MatMul_weight_scales", np.ones((64, 1), np.float32))
    y = node("com.microsoft", "MatMulNBits", x, packed, scales, K=32, N=64, bits=bits, block_size=32)
    codes = stored("onnx::MatMul_12_quantized", np.zeros((64, 48), np.int8))
    zero = stored("onnx::MatMul_12_zero_point", np.zeros(1, np.int8))
    y = node("", "MatMulInteger", node("", "Cast", y, to=2), codes, None, zero)
    y = node("", "Cast", y, to=1)
    weight = stored("classifier.weight", np.zeros((5, 48), np.float16))
    y = node("", "Gemm", y, weight, stored("classifier.bias", np.zeros(5, np.float16)), transB=1)
    shape = stored("a_shape", np.array([1, -1], np.int64))
    y = node("", "Reshape", y, shape)
    initializers = [
        value for one in nodes for value in one.inputs if value is not None and value.const_value is not None
    ]
    graph = ir.Graph([x], [y], nodes=nodes, initializers=initializers, opset_imports={"": 21, "com.microsoft": 1})
    return ir.Model(graph, ir_version=10)


def test_graphs_of_other_tools() -> None:
    rows = [(item.name, item.kind, item.shape, item.storage, item.bytes) for item in weights(foreign())]
    assert rows == [
        ("/model/layers.7/mlp/MatMul", "matmul", (64, 32), "int4 b32 sym", 64 * 16 + 64 * 4),
        ("onnx::MatMul_12", "matmul", (48, 64), "int8 tensor dynamic", 64 * 48 + 1),
        ("classifier", "matmul", (5, 48), "float16", 480),
        ("classifier.bias", "vector", (5,), "float16", 10),
        ("a_shape", "constant", (2,), "int64", 16),
    ]
    assert [item.layer for item in weights(foreign())][:2] == [7, None]
    (eight, *_) = weights(foreign(bits=8))  # the control: bits are the graph's, not assumed
    assert (eight.storage, eight.bits) == ("int8 b32 sym", 9.0)
