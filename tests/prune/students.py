"""Pruned students of tiny models: a layer dropped, weights perturbed; and distillation in this process."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from compress.prune import distill_worker
from compress.prune.distill import Distilled, distill
from compress.validation.encoded import Encoded, pack
from tiny_models import VOCABULARY

#: What a config calls the number of layers.
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer")
WEIGHTS = "model.safetensors"
#: Where a tiny ALBERT's layers share their weights, none can be dropped.
_SHARED = "albert"


def make_student(source: Path, directory: Path, *, noise: float = 0.02, layers: int = 2) -> Path:
    """Copy a saved tiny model without its last layer, its matrices perturbed."""
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    weights = load_file(directory / WEIGHTS)
    if config["model_type"] != _SHARED:
        for key in _LAYERS:
            if key in config:
                config[key] = layers
        weights = {name: item for name, item in weights.items() if f".{layers}." not in name}
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(3)
    tables = ("embed", "wte", "wpe", "lm_head")
    for name, item in weights.items():
        if item.ndim == 2 and not any(part in name for part in tables):
            item += noise * torch.randn(item.shape, generator=generator)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
    return directory


def some_windows(count: int = 24, length: int = 32) -> np.ndarray:
    return np.random.default_rng(count).integers(3, VOCABULARY, (count, length))


def some_texts(count: int = 40, longest: int = 24) -> Encoded:
    """Return texts of random words of many lengths; every third token is compared, and the second."""
    generator = np.random.default_rng(count)
    lengths = generator.integers(4, longest, count)
    ids = [generator.integers(5, VOCABULARY, length).tolist() for length in lengths]
    keep = [[index % 3 == 1 for index in range(length)] for length in lengths]
    return pack(ids, [[0] * length for length in lengths], keep)


def in_process(module: str, request: Mapping[str, Any], *, timeout: float, progress: Callable[[float], None]) -> Any:
    """Stand in for :func:`compress.validation.protocol.run_worker`: the worker spends seconds on its imports."""
    assert module == "prune.distill_worker" and timeout > 0
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as job:
        try:
            response = distill_worker.handle(json.loads(json.dumps(dict(request))), Path(job))
        finally:
            torch.set_num_threads(threads)
        progress(float((Path(job) / "progress").read_text()))
    return json.loads(json.dumps(response))


def run(teacher: Path, student: Path, texts: Any, output: Path, **changes: Any) -> Distilled:
    """Distil with few steps of few sequences."""
    options: dict[str, Any] = {"steps": 30, "seed": 0, "rate": 2e-3, "batch": 8, "progress": lambda done: None}
    return distill({"reference": str(teacher)}, student, texts, output=output, **{**options, **changes})
