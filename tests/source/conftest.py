"""Fixtures of the source tests: small checkpoints written by hand, so that every byte can be spoilt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    return {
        "a.weight": random.standard_normal((7, 5), dtype=np.float32),
        "b.weight": random.standard_normal((33, 3), dtype=np.float32),
        "c.bias": random.standard_normal(9, dtype=np.float32),
    }


@pytest.fixture
def model_directory(tmp_path: Path, weights: dict[str, np.ndarray]) -> Callable[..., Path]:
    """Return a function that writes a model directory: single, or sharded as `shards` says (file -> tensor names)."""

    def make(name: str = "model", shards: dict[str, list[str]] | None = None, **config: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(CONFIG | config))
        if shards is None:
            save_file(weights, directory / "model.safetensors")
            return directory
        for file, names in shards.items():
            save_file({tensor: weights[tensor] for tensor in names}, directory / file)
        index = {"weight_map": {tensor: file for file, names in shards.items() for tensor in names}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory

    return make
