"""The streamed reference equals transformers' own forward over the whole model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import ResourceError, SourceError, UnsupportedModelError
from compress.source import open_checkpoint
from compress.validation import memory, reference, streaming
from compress.validation.protocol import run_worker

FAMILIES = ("llama", "mistral", "phi3", "gpt2")
Windows = npt.NDArray[np.int64]


def whole_model(directory: Path, windows: Windows) -> npt.NDArray[np.float32]:
    """Logits of transformers, every weight in memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model(torch.from_numpy(windows)).logits.flatten(0, 1).numpy()
    return logits


def streamed(directory: Path, windows: Windows, tmp_path: Path) -> npt.NDArray[np.float32]:
    np.save(tmp_path / "windows.npy", windows)
    item = {"windows": str(tmp_path / "windows.npy"), "output": str(tmp_path / "out.npy")}
    seen: list[float] = []
    reference.write_logits(open_checkpoint(str(directory)), item, seen.append)
    assert seen == sorted(seen) and seen[-1] == pytest.approx(1)
    values: npt.NDArray[np.float32] = np.load(tmp_path / "out.npy")
    return values


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_equal_the_whole_models(
    family: str, tiny_directories: dict[str, Path], windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "LAYER_TOKENS", 50)  # two windows at a time, and one left over
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 4 * 64 * 168)  # the vocabulary in five pieces
    expected = whole_model(tiny_directories[family], windows)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(streamed(tiny_directories[family], windows, tmp_path), expected, rtol=0, atol=1e-5)


def test_the_comparison_notices_one_changed_weight(
    tiny_directories: dict[str, Path], windows: Windows, tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_directories["llama"], tmp_path / "changed", ignore=shutil.ignore_patterns("onnx"))
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][3, 5] += 0.05
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    difference = streamed(directory, windows, tmp_path) - whole_model(tiny_directories["llama"], windows)
    assert np.abs(difference).max() > 1e-4


def test_a_sliding_window_matters_here(tiny_directories: dict[str, Path], windows: Windows, tmp_path: Path) -> None:
    """The texts are longer than the window, so the test above would see a mask without one."""
    directory = shutil.copytree(tiny_directories["mistral"], tmp_path / "full", ignore=shutil.ignore_patterns("onnx"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    difference = streamed(directory, windows, tmp_path) - whole_model(tiny_directories["mistral"], windows)
    assert np.abs(difference).max() > 1e-3


def test_a_checkpoint_without_the_base_models_prefix(
    tiny_directories: dict[str, Path], windows: Windows, tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_directories["gpt2"], tmp_path / "bare", ignore=shutil.ignore_patterns("onnx"))
    weights = load_file(directory / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    assert bare.keys() != weights.keys()
    save_file(bare, directory / "model.safetensors", {"format": "pt"})
    expected = whole_model(tiny_directories["gpt2"], windows)
    np.testing.assert_allclose(streamed(directory, windows, tmp_path), expected, rtol=0, atol=1e-5)


def test_only_one_layer_is_in_memory(tiny_directories: dict[str, Path], windows: Windows) -> None:
    model = streaming.StreamedModel(open_checkpoint(str(tiny_directories["phi3"])))
    alive: list[int] = []

    def look(*_: Any) -> None:
        layers = model.model.model.layers
        alive.append(sum(not layer.mlp.down_proj.weight.is_meta for layer in layers))

    for layer in model.model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: look())
    model.hidden_states(windows, look)
    assert alive == [1, 0, 1, 0]  # inside each layer, and after it
    assert model.model.model.norm.weight.is_meta is False
    assert model.model.get_input_embeddings().weight.is_meta


def test_a_missing_tensor_and_a_wrong_shape_are_named(tiny_directories: dict[str, Path]) -> None:
    class Broken:
        def __init__(self, without: str) -> None:
            self._inner, self._without = open_checkpoint(str(tiny_directories["llama"])), without
            self.config = self._inner.config

        def tensors(self) -> Any:
            return {name: info for name, info in self._inner.tensors().items() if name != self._without}

        def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
            return self._inner.read(name, start, stop)[1:]

    ids = np.zeros((1, 4), np.int64)
    absent: Any = Broken("model.norm.weight")
    with pytest.raises(SourceError, match=r"no tensor for the parameter 'model\.norm\.weight'"):
        streaming.StreamedModel(absent).hidden_states(ids)
    short: Any = Broken("none")
    with pytest.raises(SourceError, match=r"shape \[63\], the config asks for \[64\]"):
        streaming.StreamedModel(short).hidden_states(ids)


def test_ids_outside_the_vocabulary_are_refused(tiny_directories: dict[str, Path]) -> None:
    model = streaming.StreamedModel(open_checkpoint(str(tiny_directories["llama"])))
    with pytest.raises(SourceError, match="outside the vocabulary of 257"):
        model.hidden_states(np.array([[3, 257]]))


def test_an_unknown_model_type_is_refused() -> None:
    class Unknown:
        config = {"model_type": "abacus"}

        def tensors(self) -> Any:
            return {}

    unknown: Any = Unknown()
    with pytest.raises(UnsupportedModelError, match="no model type 'abacus'"):
        streaming.StreamedModel(unknown)


def test_the_worker_measures_pytorch_and_writes_logits(
    tiny_directories: dict[str, Path], windows: Windows, tmp_path: Path
) -> None:
    np.save(tmp_path / "windows.npy", windows)
    jobs = [
        {"kind": "speed", "prompt_tokens": 8, "new_tokens": 3, "repeats": 2, "memory_cap": None},
        {"kind": "logits", "windows": str(tmp_path / "windows.npy"), "output": str(tmp_path / "out.npy")},
    ]
    request = {"checkpoint": {"reference": str(tiny_directories["gpt2"])}, "threads": 1, "jobs": jobs}
    response = run_worker("reference", request, timeout=120)
    result = response["results"][0]
    assert len(result["prefill_seconds"]) == 2 and [len(steps) for steps in result["decode_seconds"]] == [3, 3]
    assert response["load_seconds"] > 0 and response["peak_rss_bytes"] > 50 << 20
    assert set(response["versions"]) == {"python", "torch", "transformers", "numpy"}
    expected = whole_model(tiny_directories["gpt2"], windows)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=0, atol=1e-5)


def test_a_model_over_the_cap_is_refused_before_it_is_read(
    tiny_directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming.StreamedModel, "fill_all", lambda self: pytest.fail("weights were read"))
    item = {"prompt_tokens": 8, "new_tokens": 3, "repeats": 2, "memory_cap": 100_000}
    with pytest.raises(ResourceError, match="needs about .* GB of memory, 0.0001 GB are allowed"):
        reference._speed(open_checkpoint(str(tiny_directories["llama"])), item, lambda fraction: None)


def test_the_whole_model_is_the_same_model(tiny_directories: dict[str, Path], windows: Windows) -> None:
    for family in FAMILIES:
        model = streaming.StreamedModel(open_checkpoint(str(tiny_directories[family])))
        model.fill_all()
        with torch.no_grad():
            logits = model.model(torch.from_numpy(windows)).logits.flatten(0, 1).numpy()
        np.testing.assert_allclose(logits, whole_model(tiny_directories[family], windows), rtol=0, atol=1e-5)


def test_a_model_that_cannot_fit_is_refused_by_the_machines_own_memory() -> None:
    available = memory.available_memory()
    assert available is not None
    with pytest.raises(ResourceError, match="are available"):
        memory.check_memory(2 * available, None)
    memory.check_memory(1000, None)
    with pytest.raises(ResourceError, match="are allowed"):
        memory.check_memory(1000, 999)
