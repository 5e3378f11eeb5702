"""Rules on graphs of a few nodes: what looks like their pattern and is not stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from prepared import operators

from compress.graph.rules import gelu, gemm, skip_norm

EXACT = """<ir_version: 8, opset_import: ["" : 18]>
g (float[N, 4] x) => (float[N, 4] y) <float two = {{{two}}}, float one = {{{one}}}, float half = {{{half}}}> {{
    d = Div(x, two)
    e = Erf(d)
    s = Add(e, one)
    h = Mul(half, s)
    y = Mul({other}, h)
}}"""
TANH = """<ir_version: 8, opset_import: ["" : 18]>
g (float[N, 4] x) => (float[N, 4] y)
<float half = {{{half}}}, float three = {{{three}}}, float a = {{{a}}}, float b = {{{b}}}, float one = {{1}}> {{
    h = Mul(x, half)
    p = Pow(x, three)
    w = Mul(p, a)
    s = Add({other}, w)
    m = Mul(s, b)
    t = Tanh(m)
    q = Add(t, one)
    y = Mul(h, q)
}}"""
GEMM = """<ir_version: 8, opset_import: ["" : 18]>
g (float[N, 4] x) => (float[N, 3] y) <float[3, 4] w = {{0,1,2,3,4,5,6,7,8,9,10,11}}, float[3] b = {{1,2,3}}> {{
    y = Gemm <{attributes}> (x, w, b)
}}"""
NORM = """<ir_version: 8, opset_import: ["" : 18]>
g (float[N, 4] x, float[N, 4] z, float[1, 4] r) => ({outputs})
<float[4] w = {{1,2,3,4}}, float[4] b = {{0,1,0,1}}, float[4] k = {{1,1,2,2}}> {{
    s = Add({first}, {second})
    y = LayerNormalization <axis = -1, epsilon = 1e-5> (s, w, b)
    {more}
}}"""


def parse(text: str) -> ir.Model:
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    return ir.serde.deserialize_model(model)


def run(model: ir.Model) -> np.ndarray:
    """Return the first output for a fixed input."""
    model.opset_imports["com.microsoft"] = 1
    proto = ir.serde.serialize_model(model)
    del proto.graph.value_info[:]
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {item.name: random.standard_normal((5, 4)).astype(np.float32) for item in session.get_inputs()}
    if "r" in feeds:
        feeds["r"] = feeds["r"][:1]
    return np.asarray(session.run(None, feeds)[0])


def check(text: str, rule: Callable[[ir.Graph], int], fires: int) -> ir.Model:
    """Apply a rule; whether it fires or not, the graph computes what it did."""
    model, before = parse(text), run(parse(text))
    nodes = [node.op_type for node in model.graph]
    assert rule(model.graph) == fires
    if not fires:
        assert [node.op_type for node in model.graph] == nodes
    np.testing.assert_allclose(run(model), before, rtol=0, atol=2e-6)
    assert [value.name for value in model.graph.outputs][0] == "y"
    return model


@pytest.mark.parametrize(
    ("change", "fires"),
    [
        ({}, 1),
        ({"two": 1.5}, 0),
        ({"one": 0.9}, 0),
        ({"half": 0.4}, 0),
        ({"other": "d"}, 0),
    ],
)
def test_exact_gelu(change: dict[str, float | str], fires: int) -> None:
    given = {"two": math.sqrt(2), "one": 1.0, "half": 0.5, "other": "x", **change}
    model = check(EXACT.format(**given), gelu.apply, fires)
    if fires:
        assert operators(model.graph) == {"Gelu": 1}
        assert not model.graph.initializers, "constants that nobody reads any more are gone"


@pytest.mark.parametrize(
    ("change", "fires"),
    [
        ({}, 1),
        ({"half": 0.4}, 0),
        ({"three": 2.0}, 0),
        ({"a": 0.05}, 0),
        ({"b": 0.7}, 0),
        ({"other": "h"}, 0),
    ],
)
def test_gelu_in_its_tanh_form(change: dict[str, float | str], fires: int) -> None:
    given = {"half": 0.5, "three": 3.0, "a": 0.044715, "b": math.sqrt(2 / math.pi), "other": "x", **change}
    model = check(TANH.format(**given), gelu.apply, fires)
    if fires:
        assert operators(model.graph) == {"FastGelu": 1}


def test_the_tanh_form_may_stand_for_the_exact_one() -> None:
    text = EXACT.format(two=math.sqrt(2), one=1.0, half=0.5, other="x")
    model, before = parse(text), run(parse(text))
    assert gelu.apply(model.graph, tanh=True) == 1
    assert operators(model.graph) == {"FastGelu": 1}
    assert 1e-6 < np.abs(run(model) - before).max() <= 5e-4, "as far apart as the two forms are"


def test_a_gelu_whose_parts_are_read_elsewhere_keeps_them() -> None:
    text = EXACT.format(two=math.sqrt(2), one=1.0, half=0.5, other="x")
    text = text.replace("(float[N, 4] y)", "(float[N, 4] y, float[N, 4] e)")
    model = check(text, gelu.apply, 1)
    assert operators(model.graph) == {"Gelu": 1, "Div": 1, "Erf": 1}


@pytest.mark.parametrize(
    ("attributes", "fires"),
    [
        ("transB = 1", 1),
        ("transB = 1, alpha = 1.0, beta = 1.0", 1),
        ("transB = 1, alpha = 0.5", 0),
        ("transB = 1, beta = 2.0", 0),
    ],
)
def test_gemm(attributes: str, fires: int) -> None:
    model = check(GEMM.format(attributes=attributes), gemm.apply, fires)
    assert operators(model.graph) == ({"Transpose": 1, "MatMul": 1, "Add": 1} if fires else {"Gemm": 1})


def test_a_gemm_of_two_computed_values_is_left_alone() -> None:
    text = (
        GEMM.format(attributes="transB = 1").replace("y = Gemm", "v = Neg(w)\n    y = Gemm").replace("(x, w", "(x, v")
    )
    check(text, gemm.apply, 0)


@pytest.mark.parametrize(
    ("change", "fires"),
    [
        ({}, 1),
        ({"second": "k"}, 0),
        ({"second": "r"}, 0),
        ({"outputs": "float[N, 4] y, float[N, 4] t", "more": "t = Neg(s)"}, 0),
    ],
)
def test_skip_norm(change: dict[str, str], fires: int) -> None:
    given = {"outputs": "float[N, 4] y", "first": "x", "second": "z", "more": "", **change}
    model = check(NORM.format(**given), skip_norm.apply, fires)
    assert operators(model.graph)["SkipLayerNormalization"] == fires
