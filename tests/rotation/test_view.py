"""A rotated model is the same function: as transformers runs it, and as an artifact."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from compress import pipeline, rotation
from compress.contracts import Decoder
from compress.errors import UsageError
from compress.profile import load_profile
from compress.rotation.modules import rotate_inputs
from compress.rotation.structure import rotates
from compress.source import open_checkpoint
from parity import differences, expected_logits, load
from tiny_models import VOCABULARY

ROTATED = "quantize.rotation=residual"
NAMES = ("llama", "llama-untied", "mistral", "phi3")
TOLERANCE = 1e-4


def viewed(directory: Path) -> tuple[rotation.RotatedCheckpoint, Decoder, Any]:
    source = pipeline.ModelReference(str(directory)).open()
    structure = pipeline.describe(source)
    view, changed = rotation.applied(source, structure, load_profile("float", [ROTATED]))
    assert isinstance(view, rotation.RotatedCheckpoint) and isinstance(changed, Decoder)
    return view, changed, source


@pytest.mark.parametrize("name", NAMES)
def test_transformers_runs_the_view_as_the_source(name: str, tiny_model: Callable[[str], Path]) -> None:
    import torch

    from compress.validation.streaming import StreamedModel

    view, structure, source = viewed(tiny_model(name))
    ids = np.random.default_rng(1).integers(3, VOCABULARY, (2, 10))

    def logits(checkpoint: Any, *, turned: bool) -> np.ndarray:
        model = StreamedModel(checkpoint)
        if turned:
            rotate_inputs(model, structure)
        with torch.no_grad():
            parts = [part for _, part in model.logits(model.hidden_states(ids))]
        return np.concatenate(parts, axis=1)

    with source:
        expected = logits(source, turned=False)
        assert np.abs(expected).max() > 1
        assert np.abs(logits(view, turned=True) - expected).max() <= TOLERANCE
        # Negative control: without the rotation at run time the down projection reads another basis.
        assert np.abs(logits(view, turned=False) - expected).max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_rotated_and_norms_are_ones(name: str, tiny_model: Callable[[str], Path]) -> None:
    view, structure, source = viewed(tiny_model(name))
    with source:
        for vector in structure.vectors:
            assert (view.read(vector.source.tensor) == 1).all()
        moved = [linear.weight[0].tensor for linear in structure.linears if linear.role not in ("head", "rotation")]
        for tensor in [*moved, structure.tables[0].source.tensor]:
            assert np.abs(view.read(tensor) - source.read(tensor)).max() > 0.01, tensor


@pytest.mark.parametrize("name", NAMES)
def test_some_rows_are_those_of_the_whole(name: str, tiny_model: Callable[[str], Path]) -> None:
    view, _, source = viewed(tiny_model(name))
    with source:
        for tensor, info in view.tensors().items():
            whole = view.read(tensor)
            assert whole.shape == info.shape and whole.dtype == np.float32
            rows = len(whole)
            for start, stop in ((0, 1), (rows // 3, rows // 2), (rows - 1, None), (rows - 3, rows)):
                np.testing.assert_allclose(view.read(tensor, start, stop), whole[start:stop], atol=2e-6, err_msg=tensor)


@pytest.mark.parametrize("name", NAMES)
def test_float_artifact_agrees_with_pytorch(
    name: str, tiny_artifact: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = expected_logits(load(tiny_model(name)))
    artifact = tiny_artifact(name, "float", ROTATED)
    found = differences(artifact, expected)
    assert max(found.values()) <= TOLERANCE, found
    # Negative control: the matrix that is multiplied at run time is one of the weights.
    broken = shutil.copytree(artifact, tmp_path / "broken")
    model = onnx.load(broken / "model.onnx", load_external_data=False)
    matrix = next(item for item in model.graph.initializer if item.name.startswith("rotation/hadamard_"))
    matrix.raw_data = np.roll(np.frombuffer(matrix.raw_data, np.float32), 1).tobytes()
    (broken / "model.onnx").write_bytes(model.SerializeToString())
    assert min(differences(broken, expected).values()) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "known"), [("llama", True), ("phi3", True), ("gpt2", False), ("bert:embedding", False)]
)
def test_which_models_rotate_is_known_before(name: str, known: bool, tiny_model: Callable[[str], Path]) -> None:
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        assert rotates(pipeline.describe(checkpoint)) is known


def test_layer_norms_have_no_rotation(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="no rotation of its residual stream"):
        viewed(tiny_model("gpt2"))


def test_encoders_have_no_rotation(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="models that write text"):
        viewed(tiny_model("bert:embedding"))


def test_a_graph_of_fixed_length_has_no_rotation() -> None:
    with pytest.raises(UsageError, match="graphs of any length"):
        load_profile("npu-qnn-int8", [ROTATED])
