"""An encoder's graph of static shapes: what is folded, what its mask becomes, and that it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from compress.errors import CompressError
from compress.graph import npu_mask, static_shapes
from compress.graph.finished import serialize
from compress.graph.static_encoder import OPSET, make_static
from tiny_models import VOCABULARY

LENGTH = 32
NAMES = ("bert:embedding", "distilbert:question-answering", "albert:token-classification", "electra:fill-mask")


def plain(artifact: Path) -> ir.Model:
    """Return a float artifact's graph with nothing fused into another domain."""
    return ir.load(artifact / "model.onnx")


def inputs(length: int, real: int) -> dict[str, np.ndarray]:
    ids = np.zeros((1, length), np.int64)
    ids[:, :real] = np.random.default_rng(0).integers(5, VOCABULARY, (1, real))
    mask = (np.arange(length) < real).astype(np.int64)[None]
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def run(path: Path, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {i.name: given[i.name] for i in session.get_inputs()}), strict=True))


@pytest.fixture
def static(tiny_artifact: Callable[..., Path]) -> Callable[[str], tuple[Path, Path]]:
    """Return the path of a float artifact's graph, and of its static form beside it."""

    def make(name: str) -> tuple[Path, Path]:
        artifact = tiny_artifact(name, "float", "graph.fusions=[]")
        model = plain(artifact)
        assert make_static(model, LENGTH)["finite_mask"] == 1
        path = artifact / "static.onnx"
        serialize(model, path)
        return artifact / "model.onnx", path

    return make


@pytest.mark.parametrize("name", NAMES)
def test_real_tokens_get_what_they_got(name: str, static: Callable[[str], tuple[Path, Path]]) -> None:
    """Padded to the fixed length, a text gives what it gives alone, for every family and kind of output."""
    free, fixed = static(name)
    for real in (LENGTH, 11, 1):
        alone, padded = run(free, inputs(real, real)), run(fixed, inputs(LENGTH, real))
        for output, wanted in alone.items():
            found = padded[output]
            found = found[:, :real] if found.shape[1] == LENGTH and output != "sentence_embedding" else found
            np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-5, err_msg=f"{output} of {real}")


def test_padding_counts_without_the_mask(static: Callable[[str], tuple[Path, Path]]) -> None:
    """Negative control: the tolerance above would notice an attention that saw padding."""
    _, fixed = static("bert:embedding")
    given = inputs(LENGTH, 11)
    seen = run(fixed, {**given, "attention_mask": np.ones_like(given["attention_mask"])})
    assert np.abs(seen["last_hidden_state"] - run(fixed, given)["last_hidden_state"])[:, :11].max() > 1e-3


def test_shapes_are_numbers_and_computed_nowhere(static: Callable[[str], tuple[Path, Path]]) -> None:
    _, fixed = static("bert:embedding")
    model = ir.load(fixed)
    kinds = {node.op_type for node in model.graph}
    assert kinds.isdisjoint({"Shape", "Range", "Expand", "GatherND", "Where", "And", "GreaterOrEqual"})
    assert model.opset_imports == {"": OPSET}
    assert all(value.shape == (1, LENGTH) for value in model.graph.inputs)
    lowest = [v for v in model.graph.initializers.values() if v.shape == () and v.dtype == ir.DataType.FLOAT]
    assert all(float(v.const_value.numpy()) > -1e4 for v in lowest if v.const_value is not None)


def test_weights_are_never_read(tiny_artifact: Callable[..., Path]) -> None:
    model = plain(tiny_artifact("bert:embedding", "float", "graph.fusions=[]"))
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            old = value.const_value
            value.const_value = ir.ExternalTensor(
                "not-there", old.offset, old.length, old.dtype, shape=old.shape, name=str(old.name)
            )
    make_static(model, LENGTH)
    external = [v for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    assert len(external) >= 12


def test_a_dimension_without_a_number_is_an_error(tiny_artifact: Callable[..., Path]) -> None:
    model = plain(tiny_artifact("bert:embedding", "float", "graph.fusions=[]"))
    with pytest.raises(CompressError, match="sequence_length has no number"):
        static_shapes.fix(model, {"batch_size": 1})


def test_operators_outside_the_standard_are_refused(tiny_artifact: Callable[..., Path]) -> None:
    model = plain(tiny_artifact("bert:embedding", "float"))
    with pytest.raises(CompressError, match="MultiHeadAttention|Attention"):
        make_static(model, LENGTH)


def masked(*, causal: bool) -> ir.Graph:
    """Return ``Where(mask or lower triangle, 0, lowest)`` as a graph."""
    mask = ir.Value(name="attention_mask", shape=ir.Shape([1, 4]), type=ir.TensorType(ir.DataType.INT64))
    graph = ir.Graph([mask], [], nodes=[], opset_imports={"": 21}, name="g")

    def constant(name: str, array: np.ndarray) -> ir.Value:
        made = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(made.dtype), const_value=made)
        graph.register_initializer(value)
        return value

    def append(op_type: str, given: list[ir.Value], kind: ir.DataType, **attributes: int) -> ir.Value:
        output = ir.Value(name=op_type, type=ir.TensorType(kind))
        graph.append(ir.node(op_type, given, outputs=[output], attributes=attributes, name=op_type))
        return output

    real = append("Cast", [mask], ir.DataType.BOOL, to=int(ir.DataType.BOOL))
    column = append("Unsqueeze", [real, constant("axes", np.array([1, 2]))], ir.DataType.BOOL)
    rows = constant("rows", (np.tril(np.ones((4, 4))) if causal else np.ones((4, 4))).astype(bool)[None, None])
    both = append("And", [column, rows], ir.DataType.BOOL)
    lowest = constant("lowest", np.array(np.finfo(np.float32).min))
    where = append("Where", [both, constant("zero", np.array(0, np.float32)), lowest], ir.DataType.FLOAT)
    graph.outputs.append(append("Neg", [where], ir.DataType.FLOAT))
    return graph


def test_a_mask_of_padding_becomes_finite() -> None:
    graph = masked(causal=False)
    assert npu_mask.apply(graph) == 1
    assert [node.op_type for node in graph] == ["Cast", "Unsqueeze", "Sub", "Mul", "Neg"]


def test_a_causal_mask_is_refused() -> None:
    with pytest.raises(CompressError, match="more than padding"):
        npu_mask.apply(masked(causal=True))
