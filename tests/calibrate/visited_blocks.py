"""Blocks of tiny models while they are visited, and the same models as transformers runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress import pipeline
from compress.calibrate.blocks import Block, Workers
from compress.calibrate.decoder_worker import Calibration
from compress.contracts import Scheme
from compress.profile import load_profile
from compress.source import open_checkpoint
from compress.validation.streaming import StreamedModel
from tiny_models import VOCABULARY


def some_windows(count: int = 20, length: int = 64) -> np.ndarray:
    """Return random ids: more windows than are computed at a time, the last piece shorter."""
    return np.random.default_rng(count).integers(3, VOCABULARY, (count, length))


def visit(model: Path, windows: np.ndarray, look: Callable[[Block], None], threads: int = 2) -> torch.Tensor:
    """Show every block of a model to ``look``; return the last hidden states, with the weights that it left."""
    workers = Workers(threads)
    with open_checkpoint(str(model)) as checkpoint:
        structure, streamed = pipeline.describe(checkpoint), StreamedModel(checkpoint)

        def seen(index: int, layer: torch.nn.Module, call: Any, hidden: torch.Tensor) -> torch.Tensor:
            block = Block(streamed, structure, index, layer, call, hidden, workers)
            look(block)
            return block.outputs()

        with torch.no_grad():
            hidden = streamed.visit_blocks(windows, seen)
    workers.close()
    return hidden


def plain_model(directory: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def module_of(model: Any, tensor: str) -> torch.nn.Module:
    """Return the module that a checkpoint's tensor belongs to; the base model's prefix may be missing."""
    modules, name = dict(model.named_modules()), tensor.rsplit(".", 1)[0]
    return modules.get(name) or modules[f"{model.base_model_prefix}.{name}"]


def calibration(model: Path, windows: np.ndarray, place: Path, *overrides: str, workers: int = 1) -> Calibration:
    """Return what the worker's jobs are given."""
    np.save(place / "windows.npy", windows)
    profile = load_profile("x86-int4", ("quantize.effort=balanced", *overrides))
    request = {
        "checkpoint": {"reference": str(model), "adapter": None, "revision": None, "task": None},
        "profile": profile.model_dump(mode="json", exclude_none=True),
        "schemes": {},
        "windows": str(place / "windows.npy"),
        "workers": workers,
    }
    return Calibration(json.loads(json.dumps(request)))


def listed(scheme: Scheme) -> tuple[int, int, bool]:
    return scheme.bits, scheme.block_size, scheme.symmetric
