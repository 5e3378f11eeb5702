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
from compress.profile import Profile, load_profile
from compress.source import open_checkpoint


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
    assert predicted.validation > predicted.export
    options = pipeline.ExportOptions(threads=1, max_memory=predicted.export)
    with pytest.raises(ResourceError, match="validation would take") as caught:
        resources.check(plan, profile, options)
    assert "--no-validate" in (caught.value.hint or "")
    resources.check(plan, profile, replace(options, validate=False))
