from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import geometry
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

TINY = {
    "tinyllama": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
    "phi-3": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_positions": 32},
}


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "POOL", 1 << 18)
    monkeypatch.setattr(geometry, "BLOCK", 1 << 12)


def tiny(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"vocab_size": 1024} | ({"bos_token_id": 1023, "eos_token_id": 1023} if name == "gpt2" else {})
    special = {"eos_token_id": 1000, "pad_token_id": 1000} if name == "phi-3" else {}
    monkeypatch.setitem(geometry.CONFIGS, name, geometry.CONFIGS[name] | TINY[name] | size | special)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return found


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("phi-3", 3_821_079_552), ("tinyllama", 1_100_048_384), ("zephyr", 7_241_732_096), ("smollm2", 134_515_008),
     ("gpt2", 124_439_808)],
)  # fmt: skip
def test_the_geometry_is_the_real_models(name: str, parameters: int, tmp_path: Path) -> None:
    config = geometry.CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    expected = {key.removeprefix("transformer."): tuple(value.shape) for key, value in model.named_parameters()}
    written = {spec.name: spec.shape for spec in geometry.specs(config) if spec.kind != "mask"}
    assert written == expected
    assert sum(int(np.prod(shape)) for shape in written.values()) == parameters


@pytest.mark.parametrize("name", TINY)
def test_transformers_loads_every_tensor_and_the_tokenizer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(name, monkeypatch)
    geometry.write(name, tmp_path, layers=2, dtype="f32")
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert loading["missing_keys"] == set()
    assert loading["mismatched_keys"] == set()
    assert {key for key in loading["unexpected_keys"] if not key.endswith("attn.bias")} == set()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Assignment statements are used to (re)bind names to values.\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id == model.config.eos_token_id
    assert all(tokenizer.decode([index]) is not None for index in range(len(tokenizer)))
    with torch.no_grad():
        assert bool(torch.isfinite(model(ids).logits).all())


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("tinyllama", monkeypatch)
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        geometry.write("tinyllama", tmp_path / folder, layers=1, seed=seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a")["model.safetensors"] != digests(tmp_path / "c")["model.safetensors"]


def test_no_two_tensors_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("tinyllama", monkeypatch)
    geometry.write("tinyllama", tmp_path, layers=3)
    values = [value.flatten()[:64].tolist() for value in tensors(tmp_path).values()]
    assert len({tuple(row) for row in values}) == len(values)


def test_values_look_like_trained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("tinyllama", monkeypatch)
    geometry.write("tinyllama", tmp_path, layers=1, dtype="f32")
    found = tensors(tmp_path)
    columns = found["model.layers.0.mlp.up_proj.weight"].std(dim=0)
    assert 0.015 < float(columns.median()) < 0.025
    assert float(columns.max()) > 3 * float(columns.median())
    # ... in the same channel of the residual stream where it is read and where it is written
    rows = found["model.layers.0.mlp.down_proj.weight"].std(dim=1)
    assert int(rows.argmax()) == int(columns.argmax())
    assert 0.9 < float(found["model.norm.weight"].mean()) < 1.1


def test_shards_keep_their_limit_and_the_index_names_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("tinyllama", monkeypatch)
    total = geometry.write("tinyllama", tmp_path / "many", layers=2, limit=140_000)
    geometry.write("tinyllama", tmp_path / "one", layers=2)
    index: dict[str, Any] = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) >= 3
    assert all(path.stat().st_size < 140_000 + 4096 for path in files)
    assert set(index["weight_map"].values()) == {path.name for path in files}
    assert index["metadata"]["total_size"] == total
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert set(index["weight_map"]) == set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_bfloat16_rounds_as_torch_does() -> None:
    values = np.random.default_rng(3).standard_normal(4096).astype(np.float32)
    values[:4] = [1.00390625, 1.01171875, -1.00390625, 0.0]  # ties: half of bfloat16's last place
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy()
    truncated = values.view(np.uint32) >> 16
    assert np.array_equal(np.frombuffer(geometry._cast(values.copy(), "bf16"), np.int16), expected)
    assert not np.array_equal(truncated.astype(np.uint16).view(np.int16), expected)  # the control


def test_a_directory_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="not empty"):
        geometry.write("gpt2", tmp_path, layers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
