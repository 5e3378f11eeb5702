"""Tiny models for validation: random ones of each family, and one that has learnt something."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoder_models
import numpy as np
import numpy.typing as npt
import pytest

VOCAB = 257
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = ("llama", "mistral", "phi3", "gpt2")


def tiny(family: str) -> Any:
    """A random model of a family; sliding windows are shorter than the tests' texts, biases are not zero."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    extra: dict[str, Any] = {
        "llama": {"tie_word_embeddings": True},
        "mistral": {"sliding_window": 16},
        "phi3": {"sliding_window": 17, "tie_word_embeddings": False},
        "gpt2": {},
    }[family]
    sizes: dict[str, Any] = dict(SIZES)
    if family == "gpt2":
        sizes = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
        sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **sizes, **extra)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name and "wte" not in name:
                parameter.mul_(4)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Hugging Face directory (config and safetensors) a family."""
    root = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        tiny(family).save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="session")
def float_graphs(tiny_directories: dict[str, Path]) -> dict[str, Path]:
    """The same models as unquantized ONNX graphs, built by mobius."""
    return {family: float_graph(directory) for family, directory in tiny_directories.items()}


def float_graph(directory: Path) -> Path:
    """Build ``directory/onnx/model.onnx`` and return its path."""
    import onnx_ir as ir

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mobius

        logging.getLogger("mobius").setLevel(logging.ERROR)
        package = mobius.build(str(directory), load_weights=True, execution_provider="cpu", dtype="f32")
    path = directory / "onnx" / "model.onnx"
    path.parent.mkdir()
    ir.save(package["model"], path, external_data="model.onnx.data")
    return path


@pytest.fixture(scope="session")
def make_float_graph() -> Callable[[Path], Path]:
    """Return :func:`float_graph`, which tests cannot import: every folder has a ``conftest``."""
    return float_graph


@pytest.fixture(scope="session")
def windows() -> npt.NDArray[np.int64]:
    """Random token ids, int64 ``[7, 24]``: longer than the sliding windows."""
    return np.random.default_rng(0).integers(0, VOCAB, (7, 24), dtype=np.int64)


@pytest.fixture(scope="session")
def tiny_encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``source/TASK`` and ``artifact/TASK`` for every encoder task; read only."""
    root = tmp_path_factory.mktemp("encoders")
    encoder_models.build(root)
    return root


@pytest.fixture
def reference_in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the encoders' reference worker answer in this process: starting PyTorch anew takes seconds each time."""
    from compress.validation import encoder_measure, encoder_reference

    def answer(module: str, request: Any, **_: Any) -> Any:
        assert module == "encoder_reference"
        return encoder_reference.handle(request, tmp_path)

    monkeypatch.setattr(encoder_measure, "run_worker", answer)
