"""Pooling inside the graph against sentences pooled one by one in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from compress.graph.rules import pooling
from plain_encoder import PlainEncoder, example, padded
from tiny_models import VOCABULARY

HIDDEN = 6
MODES = ("mean", "cls", "max")


def oracle(states: np.ndarray, mask: np.ndarray, mode: str, *, normalize: bool) -> np.ndarray:
    """Pool every text by itself: of its own tokens, whatever lies in its padding."""
    pooled = []
    for text, kept in zip(states.astype(np.float64), mask.astype(bool), strict=True):
        tokens = text[kept]
        value = {"mean": tokens.mean(0), "cls": text[0], "max": tokens.max(0)}[mode]
        pooled.append(value / np.sqrt((value**2).sum()) if normalize else value)
    return np.array(pooled)


def pool(states: np.ndarray, mask: np.ndarray, mode: str, *, normalize: bool) -> np.ndarray:
    """Run the rule's nodes alone."""
    import onnxruntime as ort

    source = ir.Value(name="states", shape=ir.Shape(["b", "s", HIDDEN]), type=ir.TensorType(ir.DataType.FLOAT))
    masked = ir.Value(name="attention_mask", shape=ir.Shape(["b", "s"]), type=ir.TensorType(ir.DataType.INT64))
    node = ir.node("Identity", [source])
    output = node.outputs[0]
    output.name, output.shape, output.type = "last_hidden_state", source.shape, source.type
    graph = ir.Graph([source, masked], [output], nodes=[node], opset_imports={"": 18}, name="g")
    assert pooling.apply(graph, mode, normalize=normalize) == 1
    assert [value.name for value in graph.outputs] == ["last_hidden_state", "sentence_embedding"]
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=8))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"states": states, "attention_mask": mask})
    np.testing.assert_array_equal(found[0], states)
    return np.asarray(found[1])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_pooling_counts_no_padding(mode: str, normalize: bool) -> None:
    states = np.random.default_rng(1).standard_normal((4, 9, HIDDEN)).astype(np.float32)
    mask = padded((9, 4, 1, -5), 9)
    states[mask == 0] = 50  # would win every maximum and move every mean
    if mode == "cls":
        states[3, 0] = 1.5  # the first place, padding or not, is what sentence-transformers takes
    found = pool(states, mask, mode, normalize=normalize)
    expected = oracle(states, mask, mode, normalize=normalize)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    # Negative controls: with the padding, with another mode, and without (or with) the length.
    assert mode == "cls" or np.abs(pool(states, np.ones_like(mask), mode, normalize=normalize) - expected).max() > 0.01
    other = MODES[(MODES.index(mode) + 1) % 3]
    assert np.abs(pool(states, mask, other, normalize=normalize) - expected).max() > 0.01
    assert np.abs(pool(states, mask, mode, normalize=not normalize) - expected).max() > 0.01


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_text_that_is_all_padding_gives_finite_values(mode: str, normalize: bool) -> None:
    states = np.random.default_rng(1).standard_normal((2, 5, HIDDEN)).astype(np.float32)
    found = pool(states, padded((0, 3), 5), mode, normalize=normalize)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(
        found[1:], oracle(states[1:], padded((3,), 5), mode, normalize=normalize), rtol=0, atol=2e-6
    )
    if mode == "mean":
        assert not found[0].any()


def test_zeros_have_no_direction_and_stay_zeros() -> None:
    assert not pool(np.zeros((1, 3, HIDDEN), np.float32), padded((3,), 3), "mean", normalize=True).any()


def test_no_pooling_adds_nothing() -> None:
    value = ir.Value(name="x", shape=ir.Shape([1, 2, 3]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([value], [value], nodes=[])
    assert pooling.apply(graph, "none", normalize=True) == 0
    assert len(graph.outputs) == 1


@pytest.mark.parametrize("normalize", ["yes", "no"])
@pytest.mark.parametrize("mode", [*MODES, "none"])
def test_an_artifact_pools_its_own_states(mode: str, normalize: str, tiny_artifact: Callable[..., Path]) -> None:
    overrides = (f"graph.pooling={mode}", f"graph.normalize={normalize}")
    encoder = PlainEncoder(tiny_artifact("bert:embedding", "float", *overrides))
    ids, mask, segments = example((13, 9, 1), 13, vocabulary=VOCABULARY)
    found = encoder(ids, mask, segments)
    if mode == "none":
        assert set(found) == {"last_hidden_state"}
        return
    expected = oracle(found["last_hidden_state"], mask, mode, normalize=normalize == "yes")
    np.testing.assert_allclose(found["sentence_embedding"], expected, rtol=0, atol=2e-6)
    empty = encoder(ids, np.zeros_like(mask), segments)
    assert all(np.isfinite(value).all() for value in empty.values())
