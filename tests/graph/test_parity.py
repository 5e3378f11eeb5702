"""The float profile computes what PyTorch computes: prefill, cached decoding, a padded batch, a sliced head."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest

from parity import PROMPT, Expected, differences, expected_logits, load, prefill
from plain_decoder import PlainDecoder
from tiny_models import FAMILIES, VOCABULARY

TOLERANCE = 1e-4
SINK = "attention/no_sink"


@pytest.fixture(scope="module")
def expected(tiny_model: Callable[[str], Path]) -> Callable[[str], Expected]:
    @cache
    def get(name: str) -> Expected:
        return expected_logits(load(tiny_model(name)))

    return get


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def test_float_artifact_agrees_with_pytorch(
    name: str, tiny_artifact: Callable[..., Path], expected: Callable[[str], Expected]
) -> None:
    reference = expected(name)
    assert np.abs(reference.prefill).max() > 1, "logits near zero agree with anything"
    found = differences(tiny_artifact(name, "float"), reference)
    assert len(found) == 6
    assert max(found.values()) <= TOLERANCE, found


def test_scores_that_are_held_whole_are_the_same_scores(
    name: str, tiny_artifact: Callable[..., Path], expected: Callable[[str], Expected], tmp_path: Path
) -> None:
    artifact = tiny_artifact(name, "float", "graph.attention=materialized")
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    attention = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"]
    found = differences(artifact, expected(name))
    assert max(found.values()) <= TOLERANCE, found
    if name == "phi3-longrope":  # its prompts cannot be fed in pieces, which long ones would need
        assert all(SINK not in node.input for node in attention)
        return
    assert [node.input[11] for node in attention] == [SINK] * 3
    # The control: a sink that weighs something is one.
    broken = shutil.copytree(artifact, tmp_path / "broken")
    sink = next(item for item in model.graph.initializer if item.name == SINK)
    sink.CopyFrom(onnx.numpy_helper.from_array(np.zeros(4, np.float32), SINK))
    (broken / "model.onnx").write_bytes(model.SerializeToString())
    assert min(differences(broken, expected(name)).values()) > 100 * TOLERANCE


def test_logits_to_keep_is_a_slice_of_all(name: str, tiny_artifact: Callable[..., Path]) -> None:
    decoder = PlainDecoder(tiny_artifact(name, "float"))
    ids = np.random.default_rng(3).integers(3, VOCABULARY, (2, PROMPT))
    whole = prefill(decoder, ids, (PROMPT, PROMPT))
    assert whole.shape == (2, PROMPT, VOCABULARY)
    for keep, first in ((0, 0), (1, -1), (2, -2), (PROMPT, 0), (PROMPT + 5, 0)):
        np.testing.assert_allclose(prefill(decoder, ids, (PROMPT, PROMPT), keep), whole[:, first:], rtol=0, atol=1e-5)
    assert np.abs(whole[:, -1] - whole[:, -2]).max() > 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_swapped_rows_of_one_weight_break_the_tolerance(
    name: str, tiny_artifact: Callable[..., Path], expected: Callable[[str], Expected], tmp_path: Path
) -> None:
    broken = shutil.copytree(tiny_artifact(name, "float"), tmp_path / "broken")
    graph = onnx.load(broken / "model.onnx", load_external_data=False).graph
    weight = next(item for item in graph.initializer if item.name.endswith(".1.mlp.down_proj.weight"))
    place = {entry.key: entry.value for entry in weight.external_data}
    row = 4 * weight.dims[1]
    with (broken / "model.onnx.data").open("r+b") as stream:
        stream.seek(int(place["offset"]))
        first, second = stream.read(row), stream.read(row)
        stream.seek(int(place["offset"]))
        stream.write(second + first)
    found = differences(broken, expected(name))
    # Each phase on its own must notice.
    assert min(found.values()) > 100 * TOLERANCE, found
