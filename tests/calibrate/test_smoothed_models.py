"""A model whose outliers were tamed computes what it did: every family, at shapes with padding, in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from planted import Built, answers, build, difference, encoder_of, plant, torch_model

from compress.calibrate.encoder import Calibrated
from compress.calibrate.smoothing import REPEAT_FROM, scale_name, shift_name
from tiny_models import Skeletons, save_tiny_model

#: Relative to the largest output, which outlier channels make 30 to 70. Without smoothing it is 1e-6.
TOLERANCE = 1e-5
#: Logits over the vocabulary are sums of canceling outliers.
FILL_MASK_TOLERANCE = 4e-5
NAMES = (
    "bert:embedding",
    "distilbert:embedding",
    "albert:embedding",
    "electra:embedding",
    "bert:fill-mask",
    "albert:question-answering",
    "electra:text-classification",
)
#: Lengths of texts (negative: padding on the left) and the width they are padded to.
BATCHES: tuple[tuple[tuple[int, ...], int], ...] = (((13, 9, 4), 13), ((33, -20), 33), ((1,), 1))
Planted = Callable[[str], Path]


@pytest.fixture(scope="module")
def planted(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Planted:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = plant(tiny_model(name), tmp_path_factory.mktemp("planted") / name.replace(":", "-"))
        return made[name]

    return get


def smoothed(
    model: Path, directory: Path, skeletons: Skeletons, *overrides: str, change: Callable[[Calibrated], Calibrated]
) -> Built:
    return build(model, directory, skeletons, "float", "quantize.smoothing=calibrated", *overrides, change=change)


def same(found: Calibrated) -> Calibrated:
    return found


def apart(model: Path, directory: Path) -> float:
    """Return the largest relative difference from PyTorch over all batches."""
    reference = torch_model(model)
    return max(difference(directory, answers(reference, *batch), *batch) for batch in BATCHES)


@pytest.mark.parametrize("name", NAMES)
def test_the_changed_model_computes_the_same(name: str, planted: Planted, skeletons: Skeletons, tmp_path: Path) -> None:
    model = planted(name)
    built = smoothed(model, tmp_path, skeletons, change=same)
    found, encoder = built.found.smoothing, encoder_of(model)
    runs = encoder.layers // len({linear.layer for linear in encoder.linears if linear.layer is not None})
    values = sum(len(item.norms) + len(item.producers) for item in encoder.junctions)
    # A shared block's norm after attention is one parameter and as many values as the block is run.
    assert built.fired["smooth"] == (values + encoder.layers if runs == 1 else 1 + 3 * encoder.layers)
    # The planted outliers are there, and were changed: scales, shifts, repeated neurons.
    for junction in encoder.junctions:
        scale = found.constants[scale_name(junction.name)]
        shift = found.linears[junction.readers[0]].shift
        assert scale.max() > 5 and np.mean(scale == 1) > 0.5
        assert shift is not None and np.abs(shift).max() > 1
        assert (shift_name(junction.name) in found.constants) == junction.last
    downs = [linear for linear in encoder.linears if linear.role == "down"]
    for linear in downs:
        columns = found.linears[linear.name].columns
        assert columns is not None and len(columns) > linear.in_features
        assert (found.constants[scale_name(linear.name)].min()) < 1 / REPEAT_FROM
    assert apart(model, built.directory) < (FILL_MASK_TOLERANCE if name.endswith("fill-mask") else TOLERANCE)


def without_shift(found: Calibrated) -> Calibrated:
    """Forget what a bias has to make up for."""
    name = next(junction.readers[0] for junction in found.smoothing.structure.junctions)
    return edited(found, linears={name: replace(found.smoothing.linears[name], shift=None)})


def without_offset(found: Calibrated) -> Calibrated:
    """Forget the shift that a residual sum lacks."""
    name = next(junction.added[0] for junction in found.smoothing.structure.junctions)
    return edited(found, linears={name: replace(found.smoothing.linears[name], offset=None)})


def without_one_scale(found: Calibrated) -> Calibrated:
    """Forget one channel's scale where the residual sum reads it."""
    name = scale_name(found.smoothing.structure.junctions[0].name)
    scale = found.smoothing.constants[name].copy()
    scale[int(np.argmax(scale))] = 1
    return edited(found, constants={name: scale})


def without_one_copy(found: Calibrated) -> Calibrated:
    """Give a repeated neuron's first copy no part of its weight."""
    name = next(linear.name for linear in found.smoothing.structure.linears if linear.role == "down")
    change = found.smoothing.linears[name]
    assert change.columns is not None and change.column_scale is not None
    repeated = int(np.flatnonzero(np.bincount(change.columns) > 1)[0])
    share = change.column_scale.copy()
    share[int(np.flatnonzero(change.columns == repeated)[0])] = 0
    return edited(found, linears={name: replace(change, column_scale=share)})


def edited(found: Calibrated, **parts: dict[str, Any]) -> Calibrated:
    whole = {key: {**getattr(found.smoothing, key), **value} for key, value in parts.items()}
    return replace(found, smoothing=replace(found.smoothing, **whole))


@pytest.mark.parametrize("wrong", [without_shift, without_offset, without_one_scale, without_one_copy])
@pytest.mark.parametrize("name", ["bert:embedding", "albert:embedding"])
def test_one_forgotten_part_shows(
    name: str, wrong: Callable[[Calibrated], Calibrated], planted: Planted, skeletons: Skeletons, tmp_path: Path
) -> None:
    model = planted(name)
    built = smoothed(model, tmp_path, skeletons, change=wrong)
    assert apart(model, built.directory) > 300 * TOLERANCE


@pytest.mark.parametrize("fusions", ["[]", '["attention", "gelu", "skip_norm"]'])
def test_with_other_fusions_too(fusions: str, planted: Planted, skeletons: Skeletons, tmp_path: Path) -> None:
    model = planted("albert:embedding")
    built = smoothed(model, tmp_path, skeletons, f"graph.fusions={fusions}", change=same)
    assert (built.fired["skip_norm"] > 0) == ("skip_norm" in fusions)
    assert apart(model, built.directory) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "changes", "junctions"),
    [
        ("albert:embedding", {"num_hidden_groups": 2}, 0),  # three layers read two blocks: feed-forwards alone
        ("albert:embedding", {"num_hidden_layers": 1}, 2),  # a shared block that is run once
    ],
)
def test_unusual_stacks(
    name: str, changes: dict[str, Any], junctions: int, skeletons: Skeletons, tmp_path: Path
) -> None:
    model = plant(save_tiny_model(name, tmp_path / "plain", **changes), tmp_path / "planted")
    assert len(encoder_of(model).junctions) == junctions
    built = smoothed(model, tmp_path / "built", skeletons, change=same)
    assert built.fired["smooth"] > 0 and len(built.found.smoothing.constants) > 0
    assert apart(model, built.directory) < TOLERANCE


def test_a_calibrated_model_without_outliers_is_left_alone(
    tiny_model: Callable[[str], Path], skeletons: Skeletons, tmp_path: Path
) -> None:
    """Random weights have few: nothing is scaled by much, and nothing is lost."""
    model = tiny_model("bert:embedding")
    built = smoothed(model, tmp_path, skeletons, change=same)
    scales = [value for name, value in built.found.smoothing.constants.items() if "intermediate" in name]
    assert max(scale.max() for scale in scales) < 3
    assert apart(model, built.directory) < TOLERANCE


def test_the_stored_vectors_are_the_chosen_ones(planted: Planted, skeletons: Skeletons, tmp_path: Path) -> None:
    built = smoothed(planted("albert:embedding"), tmp_path, skeletons, change=same)
    model = onnx.load(built.directory / "model.onnx")
    onnx.checker.check_model(str(built.directory / "model.onnx"))
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    assert built.found.smoothing.constants
    for name, value in built.found.smoothing.constants.items():
        assert np.array_equal(stored[name], value), name
    assert not [path.name for path in built.directory.iterdir() if path.name.startswith(".")]
