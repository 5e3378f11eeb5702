"""Tiny encoders with outlier channels, calibrated in this process: the worker spends eight seconds on its imports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import pipeline, pooling
from compress.calibrate import encoder_worker
from compress.calibrate.encoder import Calibrated, calibrate
from compress.calibrate.encoder_texts import calibration_texts
from compress.contracts import Checkpoint, Encoder
from compress.planning import Plan, make_plan
from compress.profile import Profile, load_profile
from compress.progress import Stages
from compress.source import open_checkpoint
from compress.validation import text
from compress.validation.encoded import Encoded
from plain_encoder import PlainEncoder, example
from tiny_models import VOCABULARY, Skeletons

#: Channels of every norm that are stretched, and one that is moved away from zero.
STRETCHED, MOVED = (3, 17), 40
#: Neurons of every feed-forward that are larger than the others, and by how much.
NEURONS = {2: 8.0, 9: 5.0, 30: 3.0}


def plant(source: Path, directory: Path, *, norm: float = 10.0, shift: float = 6.0) -> Path:
    """Copy a saved tiny encoder and give it outlier channels and neurons, as trained encoders have them."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, directory, dirs_exist_ok=True)
    with open_checkpoint(str(source)) as checkpoint:
        structure = pipeline.describe(checkpoint)
    weights = dict(load_file(directory / "model.safetensors"))
    for vector in structure.vectors:
        if vector.size != structure.hidden_size:  # a narrow embedding's norm: its projection's outputs are the outliers
            continue
        values = weights[vector.source.tensor] = weights[vector.source.tensor].copy()
        values[list(STRETCHED)] *= norm
        if vector.graph_name.endswith(".bias"):
            values[MOVED] += shift
    for linear in structure.linears:
        if linear.role == "up":
            values = weights[linear.weight[0].tensor] = weights[linear.weight[0].tensor].copy()
            for neuron, factor in NEURONS.items():
                values[neuron] *= factor
        if linear.role == "projection" and linear.out_features == structure.hidden_size:
            for piece in (linear.weight[0], linear.bias[0]):
                values = weights[piece.tensor] = weights[piece.tensor].copy()
                values[list(STRETCHED)] *= norm
            values[MOVED] += shift
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def in_process(module: str, request: Mapping[str, Any], **_: Any) -> dict[str, Any]:
    """Stand in for :func:`compress.validation.protocol.run_worker`."""
    import torch

    assert module == "calibrate.encoder_worker"
    json.dumps(request)
    threads = torch.get_num_threads()
    try:
        return encoder_worker.handle(dict(request), Path(request["output"]).parent)
    finally:
        torch.set_num_threads(threads)
        with suppress(FileNotFoundError):
            Path(request["output"]).with_name("progress").unlink()


@dataclass(frozen=True)
class Built:
    """A built directory, what calibration found, and what was planned without it."""

    directory: Path
    before: Plan
    found: Calibrated
    fired: Mapping[str, int]


def calibrated(checkpoint: Checkpoint, plan: Plan, profile: Profile, work: Path, **changes: Any) -> Calibrated:
    """Run :func:`calibrate` with a worker in this process."""
    given: dict[str, Any] = {
        "source": {"reference": checkpoint.reference},
        "content": text.embedded("calibration"),
        "work": work,
        "seed": 0,
        "memory_cap": None,
        "progress": lambda fraction: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.calibrate.encoder.run_worker", in_process)
        return calibrate(plan, checkpoint, profile, **{**given, **changes})


def build(
    model: Path,
    directory: Path,
    skeletons: Skeletons,
    profile: str,
    *overrides: str,
    change: Callable[[Calibrated], Calibrated] = lambda found: found,
) -> Built:
    """Build a directory as an export does, the calibration in this process; ``change`` edits what it found."""
    recipe = load_profile(profile, overrides)
    kept: list[Calibrated] = []
    directory.mkdir(parents=True, exist_ok=True)
    with open_checkpoint(str(model)) as checkpoint, pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.graph.skeleton.build_skeleton", skeletons.build)
        structure = pipeline.describe(checkpoint)
        plan = make_plan(structure, recipe, checkpoint)

        def run(work: Path, meter: object) -> Calibrated:
            kept.append(change(calibrated(checkpoint, plan, recipe, work)))
            return kept[0]

        pool = pooling.resolve(structure, recipe, checkpoint)
        built = pipeline.build(checkpoint, plan, recipe, directory, 1, Stages(), pool=pool, calibration=run)
    return Built(directory, plan, kept[0], built.fired)


def encoder_of(model: Path) -> Encoder:
    """Return a saved model's structure."""
    with open_checkpoint(str(model)) as checkpoint:
        structure = pipeline.describe(checkpoint)
    assert isinstance(structure, Encoder)
    return structure


def texts_of(model: Path, content: str | None = None, seed: int = 0) -> Encoded:
    given = text.embedded("calibration") if content is None else text.Text("own", "", content)
    with open_checkpoint(str(model)) as checkpoint:
        structure = pipeline.describe(checkpoint)
        assert isinstance(structure, Encoder)
        return calibration_texts(structure, checkpoint, given, seed)


def torch_model(directory: Path) -> Any:
    """Return transformers' own model of a saved directory."""
    import torch
    import transformers

    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(directory, dtype=torch.float32).eval()


def answers(model: Any, lengths: tuple[int, ...], width: int) -> dict[str, np.ndarray]:
    """Return a PyTorch model's outputs for the batch of :func:`difference`; an embedding is pooled here."""
    import torch

    ids, mask, segments = example(lengths, width, vocabulary=VOCABULARY)
    given: dict[str, Any] = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if model.config.model_type != "distilbert":
        given["token_type_ids"] = torch.tensor(segments)
    with torch.no_grad():
        found = model(**given)
    outputs = {key: value.numpy() for key, value in found.items() if key != "pooler_output"}
    if "last_hidden_state" in outputs:
        states = outputs["last_hidden_state"].astype(np.float64)
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        outputs["sentence_embedding"] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return outputs


def difference(directory: Path, expected: dict[str, np.ndarray], lengths: tuple[int, ...], width: int) -> float:
    """Return an artifact's largest difference at tokens that are no padding, relative to the output's largest."""
    batch = example(lengths, width, vocabulary=VOCABULARY)
    real = batch[1].astype(bool)
    found = PlainEncoder(directory)(*batch)
    assert set(found) == set(expected)
    worst = 0.0
    for key, value in found.items():
        wanted = expected[key]
        assert value.shape == wanted.shape, key
        per_token = value.ndim >= 2 and value.shape[:2] == real.shape
        got, wanted = (value[real], wanted[real]) if per_token else (value, wanted)
        worst = max(worst, float(np.abs(got - wanted).max() / np.abs(wanted).max()))
    return worst
