"""Ranges of a static graph's tensors, against numpy's; and samples that do not fit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from compress.calibrate import encoder_ranges
from compress.calibrate.activation_ranges import observe
from compress.errors import CompressError
from compress.validation.encoded import pack
from compress.validation.protocol import Json, run_worker

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


def peak_of_a_chain(depth: int, place: Path) -> int:
    """Return the worker's peak memory for a chain of tensors of 4 MB."""
    shape, answers = (1024, 1024), list[Json]()
    links = [ir.Value(name=f"v{i}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT)) for i in range(depth)]
    nodes = [ir.node("Cos", [before], outputs=[after]) for before, after in pairwise(links)]
    graph = ir.Graph(links[:1], links[-1:], nodes=nodes, opset_imports={"": 21}, name="g")

    def noted(*arguments: Any, **named: Any) -> Json:
        answers.append(run_worker(*arguments, **named))
        return answers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.calibrate.activation_ranges.run_worker", noted)
        observe(ir.Model(graph, ir_version=10), links, {"v0": np.zeros((1, *shape), np.float32)}, place)
    return int(answers[0]["peak_rss_bytes"])


def test_memory_does_not_grow_with_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (peak_of_a_chain(depth, tmp_path) for depth in (10, 50))
    assert many < few + (16 << 20)
    # Negative control: numbers that are computed last keep 40 tensors more.
    monkeypatch.setattr(ir.Graph, "insert_after", lambda graph, node, new: graph.extend(new))
    assert peak_of_a_chain(50, tmp_path) > few + 40 * (4 << 20) * 0.8


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
