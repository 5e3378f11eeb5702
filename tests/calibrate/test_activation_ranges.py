"""Ranges of a static graph's tensors, against numpy's; and samples that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from compress.calibrate import encoder_ranges
from compress.calibrate.activation_ranges import observe
from compress.errors import CompressError
from compress.validate.encoded import pack

SHAPE = (2, 3)


def value(name: str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(SHAPE), type=ir.TensorType(ir.DataType.FLOAT))


@pytest.fixture
def model() -> ir.Model:
    """y = log(exp(x)), z = -y."""
    x, power, y, z = value("x"), value("power"), value("y"), value("z")
    nodes = [
        ir.node("Exp", [x], outputs=[power]),
        ir.node("Log", [power], outputs=[y]),
        ir.node("Neg", [y], outputs=[z]),
    ]
    return ir.Model(ir.Graph([x], [z], nodes=nodes, opset_imports={"": 21}, name="g"), ir_version=10)


def values(model: ir.Model) -> list[ir.Value]:
    return [model.graph.inputs[0], *(node.outputs[0] for node in model.graph)]


def samples(count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, *SHAPE)).astype(np.float32)


def test_ranges_are_those_of_the_values(model: ir.Model, tmp_path: Path) -> None:
    x = samples()
    before = [(node.name, node.op_type) for node in model.graph], dict(model.graph.initializers)
    seen: list[float] = []
    found = observe(model, values(model), {"x": x}, tmp_path, progress=seen.append)
    for name, array in {"x": x, "power": np.exp(x), "y": x, "z": -x}.items():
        assert found[name] == pytest.approx((array.min(), array.max()), rel=1e-5), name
    assert found["x"] == (float(x.min()), float(x.max()))
    assert ([(node.name, node.op_type) for node in model.graph], dict(model.graph.initializers)) == before
    assert [output.name for output in model.graph.outputs] == ["z"]
    assert not model.graph.outputs[0].uses() and list(tmp_path.iterdir()) == []


#: The least sample, what log(exp(x)) does to it, and where that is seen first.
NOT_FINITE = {"infinity": (1000.0, "power"), "no number": (np.nan, "x")}


@pytest.mark.parametrize("kind", NOT_FINITE)
@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 2)])
def test_a_tensor_that_is_not_finite_is_named(
    kind: str, place: tuple[int, int], model: ir.Model, tmp_path: Path
) -> None:
    """Wherever in the tensor it is: onnxruntime's own least and greatest value do not see every NaN."""
    number, where = NOT_FINITE[kind]
    x = samples()
    x[(2, *place)] = number
    with pytest.raises(CompressError, match="not finite") as caught:
        observe(model, values(model), {"x": x}, tmp_path)
    assert caught.value.where == where
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "given", [{}, {"x": np.zeros((4, 3, 2), np.float32)}, {"x": np.zeros((0, *SHAPE), np.float32)}]
)
def test_samples_that_do_not_fit_are_refused(model: ir.Model, given: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="samples"):
        observe(model, values(model), given, tmp_path)


def test_texts_are_padded_cut_and_completed() -> None:
    texts = pack([[5, 6, 7], list(range(10, 20))], [[0, 1, 1], [0] * 10], [[True] * 3, [True] * 10])
    found = encoder_ranges.samples(texts, 8, 9)
    assert all(array.shape == (5, 1, 8) for array in found.values())
    assert found["input_ids"][0, 0].tolist() == [5, 6, 7, 9, 9, 9, 9, 9]
    assert found["token_type_ids"][0, 0].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert found["input_ids"][1, 0].tolist() == list(range(10, 18))
    assert found["attention_mask"][:, 0].sum(axis=1).tolist() == [3, 8, 1, 2, 8]
