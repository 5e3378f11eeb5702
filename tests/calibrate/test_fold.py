"""Scales of input channels are folded away: a block's function stays what it was, whatever the scales."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from visited_blocks import some_windows, visit

from compress import pipeline
from compress.calibrate.blocks import Block, Workers
from compress.calibrate.fold import fold_channels, sharing
from compress.contracts import Decoder, Fold, InputStatistics, Scheme
from compress.planning import Plan, make_plan
from compress.profile import load_profile
from compress.source import open_checkpoint
from tiny_models import FAMILIES

EXACT = 1e-5
Tiny = Callable[[str], Path]


class Chance:
    """Positive scales by chance, those that are shared alike; notes what it was asked."""

    def __init__(self, constant: float | None = None) -> None:
        self.asked: list[tuple[Scheme, InputStatistics, Any]] = []
        self._random, self._constant = np.random.default_rng(3), constant

    def channel_scales(
        self, weight: np.ndarray, scheme: Scheme, inputs: InputStatistics, *, shared: Any = None, scale_format: str
    ) -> np.ndarray:
        self.asked.append((scheme, inputs, shared))
        assert scale_format == "int8" and inputs.moments.shape == (weight.shape[1],) * 2
        if self._constant is not None:
            return np.full(weight.shape[1], self._constant, np.float32)
        scales = np.exp(self._random.normal(0, 0.7, weight.shape[1])).astype(np.float32)
        return scales if shared is None else scales[shared]


def plan_of(model: Path, *overrides: str) -> Plan:
    with open_checkpoint(str(model)) as checkpoint:
        return make_plan(pipeline.describe(checkpoint), load_profile("x86-int4", overrides), checkpoint)


def folded(model: Path, scaler: Any, *overrides: str, change: Callable[[Block], None] | None = None) -> Any:
    """Fold every block; return the largest change of an output, relative to their size, and what is to be stored."""
    plan, workers = plan_of(model, *overrides), Workers(1)
    errors: list[float] = []
    stored: dict[str, np.ndarray] = {}

    def look(block: Block) -> None:
        before = block.outputs()
        found = fold_channels(block, plan, scaler, workers)
        stored.update(found)
        if change is not None:
            change(block)
        after = block.outputs()
        errors.append(float((after - before).abs().max() / before.abs().max()))
        assert isinstance(plan.structure, Decoder)
        for vector in plan.structure.vectors:  # what is to be stored is what the block computes with
            if vector.graph_name in found:
                assert np.array_equal(found[vector.graph_name], block.parameter(vector.source.tensor).numpy())
        for linear in block.linears:
            if f"{linear.name}.bias" in found:
                assert np.array_equal(found[f"{linear.name}.bias"], np.asarray(linear.bias()))
        for name in found:
            assert name in plan.by_name and found[name].shape == plan.by_name[name].stored[0].shape

    visit(model, some_windows(4), look, threads=1)
    workers.close()
    return max(errors), stored


@pytest.mark.parametrize("name", FAMILIES)
def test_any_scales_leave_the_function_alone(name: str, tiny_model: Tiny) -> None:
    scaler = Chance()
    error, stored = folded(tiny_model(name), scaler)
    assert error < EXACT
    # Norms of every block, with biases; a GELU lets no scale through, so GPT-2's last linear has none.
    assert len(scaler.asked) == 3 * (3 if name == "gpt2" else 4)
    norms = [key for key in stored if "norm" in key or ".ln_" in key]
    assert len(norms) == 3 * (4 if name == "gpt2" else 2)
    biased = {key for key in stored if key.endswith("_proj.bias")}
    assert len(biased) == (3 if name in ("gpt2", "llama-untied") else 0)
    shared = [inputs[2] is not None for inputs in scaler.asked]
    assert sum(shared) == (0 if name == "gpt2" else 3)  # grouped queries: the attention's output


@pytest.mark.parametrize("role", ["qkv", "attention_output", "gate_up", "down"])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_weights_that_stay_float_take_no_part(name: str, role: str, tiny_model: Tiny) -> None:
    """Neither as readers nor as producers: they are stored as the source has them."""
    plan = plan_of(tiny_model(name), f"quantize.roles.{role}.bits=32")
    kept: dict[str, np.ndarray] = {}

    def untouched(block: Block) -> None:
        for linear in block.linears:
            if linear.linear.role == role:
                kept[linear.name] = linear.weight()

    error, _ = folded(tiny_model(name), Chance(), f"quantize.roles.{role}.bits=32", change=untouched)
    assert error < EXACT and len(kept) == 3
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        for linear, weight in kept.items():
            source = [checkpoint.read(piece.tensor, piece.start, piece.stop) for piece in plan.by_name[linear].reads]
            assert np.array_equal(weight, np.concatenate(source))


@pytest.mark.parametrize("name", ["llama-untied", "gpt2"])
def test_a_scale_on_one_side_alone_is_seen(name: str, tiny_model: Tiny) -> None:
    """The control: any fold without its other half changes the function by far more than rounding."""

    def only_reader(place: int) -> Callable[[Block], None]:
        def change(block: Block) -> None:
            linear = block.linears[place]
            linear.set_weight(linear.weight() * np.linspace(0.5, 2, linear.linear.in_features, dtype=np.float32))

        return change

    for place in range(4):
        error, _ = folded(tiny_model(name), Chance(1.0), change=only_reader(place))
        assert error > 1000 * EXACT


def test_scales_of_one_store_nothing(tiny_model: Tiny) -> None:
    error, stored = folded(tiny_model("gpt2"), Chance(1.0))
    assert (error, stored) == (0, {})


def test_shared_channels_have_one_row() -> None:
    """Six query heads of two channels, two key-value heads: heads 0 to 2 read rows 0 and 1, the others 2 and 3."""
    found = sharing(Fold("o_proj", producer="qkv_proj", start=16, group=3, head_dim=2), 12)
    assert found is not None and found.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    assert sharing(Fold("down_proj", producer="gate_up_proj"), 12) is None


def test_a_wrong_group_changes_the_function(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control for grouped queries: neighbouring heads instead of the group's."""

    def wrong(fold: Fold, channels: int) -> Any:
        right = sharing(fold, channels)
        return right if right is None else np.roll(right, fold.head_dim)

    monkeypatch.setattr("compress.calibrate.fold.sharing", wrong)
    assert folded(tiny_model("llama"), Chance())[0] > 1000 * EXACT


def test_integer_products_are_not_scaled(tiny_model: Tiny) -> None:
    scaler = Chance()
    folded(tiny_model("llama"), scaler, "quantize.bits=8", "quantize.activations=dynamic")
    assert scaler.asked == []
