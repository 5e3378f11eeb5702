"""The skeleton worker: a process of its own, offline, names and shapes only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from compress.errors import WorkerError
from compress.families import available_families
from compress.graph.skeleton import build_skeleton
from tiny_models import Skeletons


@pytest.mark.parametrize("family", available_families())
def test_the_worker_builds_what_the_tests_keep(
    family: str, tiny_model: Callable[[str], Path], skeletons: Skeletons, tmp_path: Path
) -> None:
    """The other tests build skeletons in their own process; this is the real thing, to the byte.

    But for the graph's name: it holds the model's path, and a kept skeleton may be of a copy elsewhere.
    """
    build_skeleton(tiny_model(family), tmp_path / "worker.onnx")
    skeletons.build(tiny_model(family), tmp_path / "kept.onnx")
    models = [onnx.load(tmp_path / name, load_external_data=False) for name in ("worker.onnx", "kept.onnx")]
    for model in models:
        assert model.graph.name.endswith("/model")
        model.graph.name = ""
    assert models[0].SerializeToString() == models[1].SerializeToString()


def test_weights_have_names_and_shapes_but_no_values(
    tiny_model: Callable[[str], Path], skeletons: Skeletons, tmp_path: Path
) -> None:
    skeletons.build(tiny_model("llama"), tmp_path / "skeleton.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["skeleton.onnx"]
    initializers = ir.load(tmp_path / "skeleton.onnx").graph.initializers
    down = initializers["model.layers.2.mlp.down_proj.weight"]
    assert isinstance(down.const_value, ir.ExternalTensor)
    assert list(down.shape or ()) == [64, 160]
    valued = [name for name, value in initializers.items() if not isinstance(value.const_value, ir.ExternalTensor)]
    assert {name for name in valued if name.endswith("_cache")} == {
        name for name in initializers if name.endswith(("cos_cache", "sin_cache"))
    }


def test_a_config_the_worker_cannot_build_says_why(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "no-such-type"}))
    with pytest.raises(WorkerError, match="ValueError: ") as caught:
        build_skeleton(tmp_path / "model", tmp_path / "skeleton.onnx")
    assert len(str(caught.value).splitlines()) <= 3
    assert "--debug" in (caught.value.hint or "")
    assert any("Traceback" in note for note in caught.value.__notes__), "the whole log, for a traceback"
    assert not (tmp_path / "skeleton.onnx").exists()


def test_a_worker_that_hangs_is_stopped(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.graph.skeleton._TIMEOUT_SECONDS", 0.2)
    with pytest.raises(WorkerError, match=r"more than 0\.2 s"):
        build_skeleton(tiny_model("llama"), tmp_path / "skeleton.onnx")
