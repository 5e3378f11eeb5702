"""``genai_config.json``: special tokens and sampling defaults come from the model, and damaged ones are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress import pipeline
from compress.errors import SourceError
from compress.package import genai
from compress.package.target import Package
from compress.planning import make_plan
from compress.profile import load_profile
from compress.source import open_checkpoint

INPUTS = ("input_ids", "attention_mask")


@pytest.fixture
def written(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def get(generation: object, **config: Any) -> dict[str, Any]:
        model = shutil.copytree(tiny_model("llama"), tmp_path / "model", dirs_exist_ok=True)
        path = model / "generation_config.json"
        path.unlink(missing_ok=True)
        if generation is not None:
            path.write_text(generation if isinstance(generation, str) else json.dumps(generation))
        changed = json.loads((model / "config.json").read_text()) | config
        (model / "config.json").write_text(json.dumps(changed))
        with open_checkpoint(str(model)) as checkpoint:
            profile = load_profile("arm-int4")
            plan = make_plan(pipeline.describe(checkpoint), profile, checkpoint)
            genai.write(Package(checkpoint, plan, profile, tmp_path, INPUTS))
        return json.loads((tmp_path / "genai_config.json").read_text())

    return get


def test_sizes_and_names(written: Callable[..., dict[str, Any]]) -> None:
    model = written(None)["model"]
    decoder = model["decoder"]
    assert model["type"] == "llama"
    assert (model["vocab_size"], model["context_length"]) == (384, 256)
    assert [decoder[key] for key in ("hidden_size", "head_size", "num_attention_heads", "num_key_value_heads")] == [
        64, 16, 4, 2,
    ]  # fmt: skip
    assert decoder["num_hidden_layers"] == 3
    assert decoder["inputs"] == {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }


def test_generation_config_comes_before_config(written: Callable[..., dict[str, Any]]) -> None:
    made = written({"eos_token_id": [5, 6], "temperature": 0.6, "top_k": 20, "do_sample": True})
    assert made["model"]["eos_token_id"] == [5, 6]
    assert made["model"]["bos_token_id"] == 1
    assert made["model"]["pad_token_id"] == 0
    assert (made["search"]["temperature"], made["search"]["top_k"], made["search"]["do_sample"]) == (0.6, 20, True)
    assert made["search"]["top_p"] == 1.0


def test_absent_tokens(written: Callable[..., dict[str, Any]]) -> None:
    made = written({"eos_token_id": [5, 6]}, bos_token_id=None, pad_token_id=None)
    assert (made["model"]["bos_token_id"], made["model"]["pad_token_id"]) == (5, 5)
    made = written(None, bos_token_id=None, pad_token_id=None, eos_token_id=None)
    assert not made["model"].keys() & {"bos_token_id", "pad_token_id", "eos_token_id"}


@pytest.mark.parametrize(
    ("generation", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ('{"top_p": NaN}', "NaN is no number"),
        ({"top_k": -1}, "top_k is -1"),
        ({"repetition_penalty": True}, "repetition_penalty is True"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"eos_token_id": []}, r"eos_token_id is \[\]"),
        ({"pad_token_id": 1 << 40}, "pad_token_id is 1099511627776"),
    ],
)
def test_damaged_generation_configs_are_named(
    written: Callable[..., dict[str, Any]], generation: object, reason: str
) -> None:
    with pytest.raises(SourceError, match=reason) as caught:
        written(generation)
    assert caught.value.where == "generation_config.json"


def test_a_damaged_token_of_the_config_is_named(written: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(SourceError, match="bos_token_id is 'x'") as caught:
        written(None, bos_token_id="x")
    assert caught.value.where == "config.json"
