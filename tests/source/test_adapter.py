"""A merged LoRA adapter equals PEFT's own merge, and what cannot be merged is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from compress.errors import SourceError, UnsupportedModelError
from compress.source import open_checkpoint, require_tokenizer

Tiny = Callable[[str], Path]
TOLERANCE = 1e-6


def train(base: Path, directory: Path, **options: Any) -> dict[str, np.ndarray]:
    """Save an adapter with random factors and return PEFT's merged weights."""
    import peft
    import torch
    import transformers

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tuned = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * (0.3 if "lora_" in name else 0.1))
        tuned.save_pretrained(directory)
        merged = tuned.merge_and_unload()
    return {name: value.numpy() for name, value in merged.state_dict().items()}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "all linear, rank-stabilized": (
        "llama-untied",
        {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"},
    ),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 6},
            "alpha_pattern": {r".*\.1\.self_attn\.(q|k)_proj": 3, "^model.layers.2.mlp.up_proj": 40},
        },
    ),
    "module to save": (
        "llama-untied",
        {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    ),
    "all biases": ("llama-untied", {"r": 2, "target_modules": ["q_proj", "k_proj"], "bias": "all"}),
    "biases of the factors": (
        "llama-untied",
        {"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    ),
    "embedding": ("llama-untied", {"r": 2, "lora_alpha": 3, "target_modules": ["embed_tokens", "q_proj"]}),
    "packed": ("phi3", {"r": 5, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    "some layers": ("mistral", {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "transposed": ("gpt2", {"r": 4, "lora_alpha": 9, "target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "transposed, biases": (
        "gpt2",
        {"r": 4, "target_modules": ["c_proj"], "fan_in_fan_out": True, "bias": "lora_only", "lora_bias": True},
    ),
    "gaussian": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_pefts_merge(tmp_path: Path, tiny_model: Tiny, case: str) -> None:
    family, options = CASES[case]
    base = tiny_model(family)
    expected = train(base, tmp_path / "adapter", **options)
    plain = open_checkpoint(str(base))
    changed = 0
    with open_checkpoint(str(base), adapter=tmp_path / "adapter") as checkpoint:
        assert set(checkpoint.tensors()) == set(plain.tensors())
        for name, info in checkpoint.tensors().items():
            got = checkpoint.read(name)
            assert got.dtype == np.float32 and got.flags.c_contiguous
            np.testing.assert_allclose(got, expected[name], rtol=0, atol=TOLERANCE, err_msg=name)
            # Row by row gives the very same bits.
            parts = [checkpoint.read(name, row, min(row + 37, info.shape[0])) for row in range(0, info.shape[0], 37)]
            np.testing.assert_array_equal(np.concatenate(parts), got, err_msg=name)
            changed += np.abs(plain.read(name) - expected[name]).max() > 100 * TOLERANCE
    assert changed, "the adapter does nothing: the comparison would pass without it"


@pytest.mark.parametrize("spoil", ["lora_alpha", "fan_in_fan_out", "use_rslora", "alpha_pattern"])
def test_a_wrong_key_shows(tmp_path: Path, tiny_model: Tiny, spoil: str) -> None:
    """Negative control: the comparison above sees each of the keys."""
    base = tiny_model("gpt2")
    options = {"r": 4, "lora_alpha": 9, "target_modules": ["c_proj"]}
    expected = train(base, tmp_path / "adapter", **options)
    wrong = {"lora_alpha": 9.01, "fan_in_fan_out": False, "use_rslora": True, "alpha_pattern": {"attn.c_proj": 8}}
    edit(tmp_path / "adapter", **{spoil: wrong[spoil]})
    checkpoint = open_checkpoint(str(base), adapter=tmp_path / "adapter")
    name = "transformer.h.1.attn.c_proj.weight"
    assert np.abs(checkpoint.read(name) - expected[name]).max() > 100 * TOLERANCE


def test_a_base_saved_without_its_head(tmp_path: Path, tiny_model: Tiny) -> None:
    """GPT-2's own checkpoint says `h.0...` where PEFT says `transformer.h.0...`."""
    base = shutil.copytree(tiny_model("gpt2"), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({name.removeprefix("transformer."): value for name, value in tensors.items()}, base / "model.safetensors")
    expected = train(tiny_model("gpt2"), tmp_path / "adapter", r=4, target_modules=["c_attn"])
    checkpoint = open_checkpoint(str(base), adapter=tmp_path / "adapter")
    got = checkpoint.read("h.2.attn.c_attn.weight")
    np.testing.assert_allclose(got, expected["transformer.h.2.attn.c_attn.weight"], rtol=0, atol=TOLERANCE)


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def adapter(tmp_path: Path, tiny_model: Tiny) -> Path:
    train(tiny_model("llama"), tmp_path / "adapter", r=4, target_modules=["q_proj", "v_proj"])
    return tmp_path / "adapter"


def refused(base: Path, adapter: Path, match: str, kind: type[Exception] = SourceError) -> Any:
    with pytest.raises(kind, match=match) as caught:
        open_checkpoint(str(base), adapter=adapter)
    return caught.value


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"use_dora": True},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"alora_invocation_tokens": [1]},
        {"trainable_token_indices": [4]},
    ],
)
def test_methods_that_cannot_be_merged(adapter: Path, tiny_model: Tiny, changes: dict[str, Any]) -> None:
    edit(adapter, **changes)
    assert "merge_and_unload" in refused(tiny_model("llama"), adapter, "adapter", UnsupportedModelError).hint


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"r": "four"}, "r is 'four'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": float("nan")}, "NaN is no number"),
        ({"r": 8}, "have rank 4, its config says 8"),
        ({"rank_pattern": {"v_proj": 2}}, "have rank 4, its config says 2"),
        ({"alpha_pattern": []}, None),
        ({"alpha_pattern": [1]}, "not a mapping"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "too complex"),
        ({"alpha_pattern": {"(": 1}}, "not a regular expression"),
    ],
)
def test_keys_of_the_wrong_kind(adapter: Path, tiny_model: Tiny, changes: dict[str, Any], match: str | None) -> None:
    edit(adapter, **changes)
    if match is None:  # an empty list is as good as none
        assert open_checkpoint(str(tiny_model("llama")), adapter=adapter).has_weights
    else:
        refused(tiny_model("llama"), adapter, match)


def test_an_adapter_of_another_model(tmp_path: Path, adapter: Path, tiny_model: Tiny) -> None:
    assert "was made for" in refused(tiny_model("gpt2"), adapter, "there is no tensor 'model.layers.0").hint
    # The same names, other shapes: this one's heads are twice as wide.
    refused(tiny_model("llama-untied"), adapter, "does not fit its base at 'model.layers.0.self_attn.q_proj.weight'")


def spoil(adapter: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def test_tensors_that_do_not_belong(adapter: Path, tiny_model: Tiny) -> None:
    base, kept = tiny_model("llama"), (adapter / "adapter_model.safetensors").read_bytes()
    key = "base_model.model.model.layers.0.self_attn.q_proj."
    one = np.ones((4, 4), np.float32)
    cases: list[tuple[str, Callable[[dict[str, np.ndarray]], Any], type[Exception]]] = [
        ("no known meaning", lambda t: t.update({key + "lora_magnitude_vector": one}), UnsupportedModelError),
        ("there is no tensor 'elsewhere.weight'", lambda t: t.update({"elsewhere.weight": one}), SourceError),
        ("for \\[64\\]", lambda t: t.update({"base_model.model.model.norm.weight": one}), SourceError),
        ("only half of the factors", lambda t: t.pop(key + "lora_A.weight"), SourceError),
        ("factors of shapes", lambda t: t.update({key + "lora_A.weight": one[:3]}), SourceError),
        ("holds no tensors", lambda t: t.clear(), SourceError),
        ("stored as I8", lambda t: t.update({key + "lora_A.weight": one.astype(np.int8)}), SourceError),
    ]
    for match, change, kind in cases:
        (adapter / "adapter_model.safetensors").write_bytes(kept)
        assert open_checkpoint(str(base), adapter=adapter).has_weights
        spoil(adapter, change)
        refused(base, adapter, match, kind)


def test_a_tied_table_is_not_half_tuned(tmp_path: Path, tiny_model: Tiny) -> None:
    base = tiny_model("llama")
    train(base, tmp_path / "table", r=2, target_modules=["embed_tokens"])
    refused(base, tmp_path / "table", "also the output head", UnsupportedModelError)
    train(base, tmp_path / "head", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert "untie" in refused(base, tmp_path / "head", "there is no tensor 'lm_head.weight'").hint


def test_missing_pickled_and_damaged(tmp_path: Path, adapter: Path, tiny_model: Tiny) -> None:
    base = tiny_model("llama")
    refused(base, tmp_path / "none", "no such adapter directory")
    refused(base, base, "adapter_config.json is missing")
    weights = adapter / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    refused(base, adapter, "not a valid safetensors file")
    weights.rename(adapter / "adapter_model.bin")
    refused(base, adapter, "the adapter is pickled")
    (adapter / "adapter_model.bin").unlink()
    refused(base, adapter, "adapter_model.safetensors is missing")


def test_manifest_and_side_files(adapter: Path, tiny_model: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_model("llama")
    plain = open_checkpoint(str(base))
    edit(adapter, base_model_name_or_path="someone/else")
    merged = open_checkpoint(str(base), adapter=adapter)
    assert "made for someone/else" in caplog.text
    assert merged.identifier == f"{plain.identifier}+adapter"
    names = [file.name for file in merged.files()]
    assert set(names) == {file.name for file in plain.files()} | {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    assert merged.directory == plain.directory
    # A tokenizer that the adapter brings replaces the base's whole; a template alone only joins it.
    (adapter / "chat_template.jinja").write_text("tuned")
    joined = open_checkpoint(str(base), adapter=adapter)
    assert joined.sidecars()["chat_template.jinja"].read_text() == "tuned"
    assert joined.sidecars()["tokenizer.json"].read_bytes() == (base / "tokenizer.json").read_bytes()
    (adapter / "tokenizer.model").write_text("another")
    with open_checkpoint(str(base), adapter=adapter) as whole:
        require_tokenizer(whole)
        assert set(whole.sidecars()) == {"chat_template.jinja", "tokenizer.model", "generation_config.json"}
        assert (whole.directory / "config.json").read_bytes() == (base / "config.json").read_bytes()
        directory = whole.directory
    assert not directory.exists()


def test_config_only(tmp_path: Path, adapter: Path, tiny_model: Tiny) -> None:
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    (base / "model.safetensors").unlink()
    checkpoint = open_checkpoint(str(base), adapter=adapter, config_only=True)
    assert not checkpoint.has_weights and not checkpoint.tensors()
