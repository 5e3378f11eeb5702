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
from compress.graph.skeleton import build_skeleton
from tiny_models import Skeletons


@pytest.mark.parametrize("name", ["llama", "gpt2", "electra:text-classification"])
def test_the_worker_builds_what_the_tests_keep(
    name: str, tiny_model: Callable[[str], Path], skeletons: Skeletons, tmp_path: Path
) -> None:
    """The other tests build skeletons in their own process, by the same function; this is the real thing, to the byte.

    But for a decoder graph's name: it holds the model's path, and a kept skeleton may be of a copy elsewhere.
    """
    task = name.partition(":")[2]
    build_skeleton(tiny_model(name), tmp_path / "worker.onnx", task)
    skeletons.build(tiny_model(name), tmp_path / "kept.onnx", task)
    models = [onnx.load(tmp_path / file, load_external_data=False) for file in ("worker.onnx", "kept.onnx")]
    for model in models:
        assert task or model.graph.name.endswith("/model")
        model.graph.name = ""
    assert models[0].SerializeToString() == models[1].SerializeToString()


@pytest.mark.parametrize("name", ["bert:fill-mask", "albert:embedding", "distilbert:question-answering"])
def test_an_encoders_weights_have_transformers_names_and_no_values(
    name: str, tiny_model: Callable[[str], Path], skeletons: Skeletons, tmp_path: Path
) -> None:
    import torch
    import transformers

    skeletons.build(tiny_model(name), tmp_path / "skeleton.onnx", name.partition(":")[2])
    assert [path.name for path in tmp_path.iterdir()] == ["skeleton.onnx"]
    config = json.loads((tiny_model(name) / "config.json").read_text())
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**config))
    shapes = {key: list(value.shape) for key, value in model.named_parameters()}
    seen = set()
    for key, value in ir.load(tmp_path / "skeleton.onnx").graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            assert value.const_value.location == "not-written"
            assert list(value.shape or ()) == shapes[key]
            seen.add(key)
        else:
            assert value.const_value is not None and value.const_value.size < 16, "shapes, axes and constants"
    assert {key for key in set(shapes) - seen if not key.startswith("pooler.")} == set(), "a tied one once"


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


@pytest.mark.parametrize("name", ["llama", "bert:embedding"])
def test_a_config_the_worker_cannot_build_says_why(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_model(name), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "no-such-type"}))
    with pytest.raises(WorkerError, match="ValueError: ") as caught:
        build_skeleton(tmp_path / "model", tmp_path / "skeleton.onnx", name.partition(":")[2])
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
