"""Predicted memory: it grows with what it should grow with, and --max-memory is kept or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress import pipeline, resources
from compress.errors import ResourceError
from compress.planning import Plan, make_plan
from compress.profile import Profile, load_profile, override
from compress.source import open_checkpoint
from compress.validation import room


@pytest.fixture
def plan_of(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., tuple[Plan, Profile]]:
    def get(profile: str = "arm-int4", **changes: Any) -> tuple[Plan, Profile]:
        config = json.loads((tiny_model("mistral") / "config.json").read_text()) | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        recipe = load_profile(profile)
        with open_checkpoint(str(tmp_path), config_only=True) as checkpoint:
            return make_plan(pipeline.describe(checkpoint), recipe, checkpoint), recipe

    return get


BIG = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000, "num_attention_heads": 32}


def test_quantized_weights_take_the_same_memory_whatever_the_models_size(
    plan_of: Callable[..., tuple[Plan, Profile]],
) -> None:
    few, many = (resources.predict(*plan_of(**BIG, num_hidden_layers=layers), 2) for layers in (2, 32))
    assert few.weights == many.weights
    assert few.export == many.export
    assert many.export < 1_000_000_000, "a 7B model on a laptop"


def test_threads_and_float_linears_cost(plan_of: Callable[..., tuple[Plan, Profile]]) -> None:
    plan, profile = plan_of(**BIG)
    one, two = (resources.predict(plan, profile, threads).weights for threads in (1, 2))
    assert one < two < 2 * one
    whole = resources.predict(*plan_of("float", **BIG), 1).weights
    # A float32 linear is transposed: read whole, and held once more.
    assert whole > one + 4 * 4096 * 14336


def test_max_memory_is_kept_or_refused(plan_of: Callable[..., tuple[Plan, Profile]]) -> None:
    plan, profile = plan_of()
    options = pipeline.ExportOptions(validate=False, threads=2)
    predicted = resources.check(plan, profile, options)
    assert resources.check(plan, profile, replace(options, max_memory=predicted.export)) == predicted
    with pytest.raises(ResourceError, match="export would take") as caught:
        resources.check(plan, profile, replace(options, max_memory=predicted.export - 1))
    assert "raise --max-memory to" in (caught.value.hint or "")


def test_a_refusal_for_validation_offers_the_way_around(plan_of: Callable[..., tuple[Plan, Profile]]) -> None:
    plan, profile = plan_of(**BIG, num_hidden_layers=32)
    predicted = resources.predict(plan, profile, 1)
    assert predicted.validation_in_pieces is not None
    assert predicted.validation > 3 * predicted.validation_in_pieces and predicted.validation_in_pieces < 1.2e9
    options = pipeline.ExportOptions(threads=1, max_memory=max(predicted.export, predicted.validation_in_pieces - 1))
    with pytest.raises(ResourceError, match="validation would take") as caught:
        resources.check(plan, profile, options)
    assert "--no-validate" in (caught.value.hint or "")
    resources.check(plan, profile, replace(options, validate=False))


def test_pieces_take_what_a_block_takes(plan_of: Callable[..., tuple[Plan, Profile]]) -> None:
    few, many = (room.needs(*plan_of(**BIG, num_hidden_layers=layers)) for layers in (2, 32))
    assert few.artifact_in_pieces == many.artifact_in_pieces and few.reference == many.reference
    assert few.artifact < many.artifact / 6
    # A block of 218 million weights as float32 is what reading them by rows saves.
    assert many.reference_by_rows is not None
    assert many.reference - many.reference_by_rows > 4 * (3 * 4096 * 14336 + 2 * 4096 * 4096)


def test_the_way_that_fits_is_chosen(plan_of: Callable[..., tuple[Plan, Profile]]) -> None:
    needs = room.needs(*plan_of(**BIG, num_hidden_layers=32))
    least = needs.in_pieces
    assert least is not None and least < needs.reference < needs.artifact
    assert room.choose(needs, None) == room.choose(needs, needs.whole) == room.Way()
    cut = room.choose(needs, needs.whole - 1)
    assert not cut.by_rows and cut.in_pieces is not None
    assert cut.in_pieces == "the whole artifact would take 6.82 GB, --max-memory is 6.82 GB"
    assert room.choose(needs, least).by_rows
    with pytest.raises(ResourceError, match="validation would take"):
        room.choose(needs, least - 1)
    small = room.Needs(reference=9, reference_by_rows=5, artifact=4, artifact_in_pieces=3)
    assert room.choose(small, 6) == room.Way(by_rows=True)  # the artifact is measured whole
    with pytest.raises(ResourceError, match="validation would take 9 B"):
        room.choose(room.Needs(9, None, 4, None), 6)


def test_what_only_a_session_of_the_whole_can_run_is_not_cut(plan_of: Callable[..., tuple[Plan, Profile]]) -> None:
    plan, profile = plan_of(**BIG)
    assert room.needs(plan, profile, ("cpu",)).artifact_in_pieces is not None
    assert room.needs(plan, profile, ("cpu", "openvino")).artifact_in_pieces is None
    assert room.needs(replace(plan, static_length=64), profile).artifact_in_pieces is None


def test_a_budget_on_speed_is_refused_where_speed_is_not_measured(
    plan_of: Callable[..., tuple[Plan, Profile]],
) -> None:
    plan, profile = plan_of(**BIG, num_hidden_layers=32)
    assert profile.budget.min_speedup_vs_pytorch is not None
    least = room.needs(plan, profile).in_pieces
    options = pipeline.ExportOptions(threads=1, max_memory=least)
    with pytest.raises(ResourceError, match="speedup_vs_pytorch, which is not measured within --max-memory") as caught:
        resources.check(plan, profile, options)
    without = "budget.min_speedup_vs_pytorch=none"
    assert f"--set {without}" in (caught.value.hint or "")
    resources.check(plan, override(profile, [without]), options)
    resources.check(plan, profile, replace(options, max_memory=None))


def test_ranges_of_activations_take_the_whole_as_float32(plan_of: Callable[..., tuple[Plan, Profile]]) -> None:
    assert resources.predict(*plan_of(**BIG), 1).ranges == 0
    plan, profile = plan_of("npu-qnn-int8", **BIG, num_hidden_layers=8)
    predicted = resources.predict(plan, profile, 1)
    inside = sum(
        linear.out_features * linear.in_features for linear in plan.structure.linears if linear.layer is not None
    )
    assert predicted.ranges > 4 * inside + 2 * plan.data_bytes
    assert predicted.export == predicted.ranges
