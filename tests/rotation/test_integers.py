"""x86-int8-hybrid: what the graph computes with integers is near to what the source computes with floats."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from parity import Expected, differences, expected_logits, load
from tiny_models import VOCABULARY

NAMES = ("llama", "llama-untied", "mistral", "phi3")
HYBRID = ("x86-int8-hybrid", "quantize.effort=fast")
LAYERS = 3


def relative(artifact: Path, expected: Expected) -> float:
    """Return the largest difference of logits, as a part of their standard deviation."""
    return max(differences(artifact, expected).values()) / float(expected.prefill.std())


@pytest.mark.parametrize("name", NAMES)
def test_integers_come_near_to_floats(
    name: str, tiny_artifact: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = expected_logits(load(tiny_model(name)))
    artifact = tiny_artifact(name, *HYBRID)
    found = relative(artifact, expected)
    assert 1e-3 < found < 0.5, "rounding to 8 bits shows, and does not show much"
    # Negative control: a range that is a little too narrow, where the graph has one.
    broken = shutil.copytree(artifact, tmp_path / "broken")
    model = onnx.load(broken / "model.onnx", load_external_data=False)
    scale = next(item for item in model.graph.initializer if item.name == "range/4/scale")
    scale.raw_data = np.array(0.5 / 127, np.float32).tobytes()
    (broken / "model.onnx").write_bytes(model.SerializeToString())
    assert relative(broken, expected) > 4 * found


@pytest.mark.parametrize("name", NAMES)
def test_every_product_is_one_of_integers(name: str, tiny_artifact: Callable[..., Path]) -> None:
    graph = onnx.load(tiny_artifact(name, *HYBRID) / "model.onnx", load_external_data=False).graph
    found = Counter(node.op_type for node in graph.node)
    tied = name == "llama"
    # Query, key, value; gate and up; an untied head: behind norms, whose outputs have a known size.
    assert found["MatMulIntegerToFloat"] == found["QuantizeLinear"] == 2 * LAYERS + (not tied)
    assert found["DynamicQuantizeMatMul"] == 2 * LAYERS + tied
    assert found["SimplifiedLayerNormalization"] == found["Div"] == LAYERS
    # The rotation of the down projection's inputs, and of a tied head's.
    assert found["MatMul"] == LAYERS + tied
    assert found["MatMulNBits"] == 0


def test_a_tied_table_is_stored_once_as_the_head_reads_it(tiny_artifact: Callable[..., Path]) -> None:
    artifact = tiny_artifact("llama", *HYBRID)
    graph = onnx.load(artifact / "model.onnx", load_external_data=False).graph
    head = next(node for node in graph.node if node.output[0] == "logits")
    lookup = next(node for node in graph.node if node.op_type == "Gather" and node.input[0] == head.input[1])
    codes = next(item for item in graph.initializer if item.name == head.input[1])
    assert list(codes.dims) == [64, VOCABULARY]
    assert lookup.attribute[0].i == 1


def test_one_token_after_the_other_and_all_at_once_differ_by_rounding_alone(
    tiny_artifact: Callable[..., Path],
) -> None:
    from plain_decoder import PlainDecoder

    ids = np.random.default_rng(4).integers(3, VOCABULARY, (1, 12))
    whole = PlainDecoder(tiny_artifact("llama", *HYBRID)).feed(ids, np.ones_like(ids), np.arange(12)[None])
    decoder, parts = PlainDecoder(tiny_artifact("llama", *HYBRID)), []
    for place in range(12):
        step = ids[:, place : place + 1]
        parts.append(decoder.feed(step, np.ones((1, place + 1), np.int64), np.array([[place]])))
    assert np.abs(np.concatenate(parts, axis=1) - whole).max() < 0.3 * whole.std()
