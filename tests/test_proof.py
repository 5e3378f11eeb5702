"""What a proof measures beside the artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from compress import pipeline, proof
from compress.profile import load_profile
from compress.source import open_checkpoint

FLOATS = {"x86-int4": onnx.TensorProto.FLOAT, "cuda-int4": onnx.TensorProto.FLOAT16}


@pytest.mark.usefixtures("fast_skeletons")
@pytest.mark.parametrize("name", FLOATS)
def test_the_float_baseline_has_the_profiles_floats(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    profile, options = load_profile(name), pipeline.ExportOptions(threads=1)
    with (
        open_checkpoint(str(tiny_model("llama"))) as checkpoint,
        proof._float_baseline(checkpoint, profile, tmp_path / "artifact", options) as (path, reason),
    ):
        assert path is not None, reason
        graph = onnx.load(path, load_external_data=False).graph
    assert not any(node.op_type == "MatMulNBits" for node in graph.node)
    cache = next(value for value in graph.input if value.name == "past_key_values.0.key")
    assert cache.type.tensor_type.elem_type == FLOATS[name]


def test_what_is_not_quantized_has_no_float_baseline(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    options = pipeline.ExportOptions(threads=1)
    with (
        open_checkpoint(str(tiny_model("llama"))) as checkpoint,
        proof._float_baseline(checkpoint, load_profile("cuda-fp16"), tmp_path / "artifact", options) as found,
    ):
        assert found == (None, "the profile does not ask for it")
