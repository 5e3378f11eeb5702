"""Bad input through the command line: a clear error that names the thing and the remedy, and nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from compress.cli import run

_Usage = namedtuple("_Usage", "total used free")
DOWN = "model.layers.1.mlp.down_proj.weight"


def set_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_tensor(model: Path, name: str, index: tuple[int, ...], value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors[name][index] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def set_bytes(model: Path, change: Callable[[bytes], bytes]) -> None:
    path = model / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))


def set_index(model: Path, shard: str) -> None:
    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "one.safetensors")
    places = {name: "one.safetensors" for name in names} | {names[0]: shard}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


class Bench:
    """A copy of a tiny model to damage, a place for output to appear in, and what a refusal must look like."""

    def __init__(self, model: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.place, self._capsys = model, place, capsys
        self._before = self.listing()

    def listing(self) -> list[str]:
        return sorted(str(path.relative_to(self.place)) for path in self.place.rglob("*"))

    def refused(
        self, code: int, *parts: str, model: str | None = None, words: tuple[str, ...] = (), validate: bool = False
    ) -> None:
        """Export and check the exit code, the form of the message, its ``parts``, and that nothing was left."""
        profile = () if "--profile" in words else ("--profile", "arm-int4")
        output = () if "-o" in words else ("-o", str(self.place / "new" / "artifact"))
        quick = () if validate else ("--no-validate",)
        self._capsys.readouterr()
        got = run(["export", model or str(self.model), *profile, *output, *quick, "--threads", "1", *words])
        out, err = self._capsys.readouterr()
        assert got == code, err
        assert out == ""
        assert err.startswith("error: ") and len(err.strip().splitlines()) <= 3, err
        assert "Traceback" not in err and "unexpected" not in err, err
        for part in parts:
            assert part in err, err
        assert self.listing() == self._before


@pytest.fixture
def bench(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fast_skeletons: None,
) -> Bench:
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    return Bench(tmp_path / "model", tmp_path / "place", capsys)


def test_the_model_itself_is_good(bench: Bench) -> None:
    """Control: what the tests below damage does export."""
    output = bench.place / "new" / "artifact"
    assert run(["export", str(bench.model), "--profile", "arm-int4", "-o", str(output), "--no-validate"]) == 0
    assert (output / "manifest.json").is_file()


# --------------------------------------------------------------------------------------------------------------- names


def test_unknown_names(bench: Bench) -> None:
    bench.refused(2, "no model is called 'smolm2'", "did you mean smollm2", model="smolm2")
    bench.refused(1, "no such directory", "/nowhere", "check the path", model="/nowhere/model")
    bench.refused(2, "no profile is named 'arm-int'", "did you mean arm-int", words=("--profile", "arm-int"))
    bench.refused(2, "'10 apples' is not a size", "800MB", words=("--max-memory", "10 apples"))
    bench.refused(2, "'' is not a size", words=("--max-memory", ""))


def test_a_hub_model_that_is_not_here_offline(bench: Bench) -> None:
    bench.refused(1, "nobody/nothing", model="nobody/nothing")


def test_unsupported_architectures(bench: Bench) -> None:
    set_config(bench.model, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    bench.refused(1, "'qwen2'", "supported: albert, bert, distilbert, electra, gpt2, llama, mistral, phi3")
    set_config(bench.model, model_type="llama", architectures=["LlamaForSequenceClassification"])
    bench.refused(1, "LlamaForSequenceClassification", "supported: LlamaForCausalLM")


# ------------------------------------------------------------------------------------------------------------- weights


def test_pickled_weights_are_refused(bench: Bench) -> None:
    (bench.model / "model.safetensors").rename(bench.model / "pytorch_model.bin")
    bench.refused(1, "pickled only (pytorch_model.bin)", "save_pretrained")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantized_checkpoints_are_refused(bench: Bench, method: str) -> None:
    set_config(bench.model, quantization_config={"quant_method": method, "bits": 4, "group_size": 128})
    bench.refused(1, f"already quantized ({method}, 4 bits)", "float16")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda data: data[: len(data) // 2], "not a valid safetensors file"),
        (lambda data: data[:-10], "not a valid safetensors file"),
        (lambda data: data[:5], "shorter than 8 bytes"),
        (lambda data: b"", "shorter than 8 bytes"),
        (lambda data: b"\xff" * 8 + data[8:], "its header claims"),
        (lambda data: data[:8] + b"#" * 40 + data[48:], "not a valid safetensors file"),
        (lambda data: data + b"more", "not a valid safetensors file"),
    ],
)
def test_damaged_safetensors(bench: Bench, change: Callable[[bytes], bytes], what: str) -> None:
    set_bytes(bench.model, change)
    bench.refused(1, what, "model.safetensors", "download or copy it again")


def test_an_index_that_names_what_is_not_there(bench: Bench) -> None:
    set_index(bench.model, "two.safetensors")
    bench.refused(1, "a file of the model is missing", "two.safetensors", "all of its files")


def test_an_index_that_leads_outside(bench: Bench) -> None:
    shutil.copyfile(bench.model / "model.safetensors", bench.model.parent / "outside.safetensors")
    set_index(bench.model, "../outside.safetensors")
    bench.refused(1, "leads outside the model's directory", "../outside.safetensors")


def test_a_link_that_leads_outside(bench: Bench, tmp_path: Path) -> None:
    (bench.model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (bench.model / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    bench.refused(1, "symbolic link leads outside", "model.safetensors")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"hidden_size": 128, "head_dim": 16}, "model.layers.0.self_attn"),
        ({"intermediate_size": 200}, "model.layers.0.mlp"),
        ({"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj"),
        ({"vocab_size": 100}, "lm_head"),
        ({"head_dim": 32}, "model.layers.0.self_attn"),
    ],
)
def test_a_config_of_another_model(bench: Bench, change: dict[str, Any], where: str) -> None:
    set_config(bench.model, **change)
    where = "model.embed_tokens.weight" if where == "lm_head" else where
    bench.refused(1, "config and weights disagree", where, "restore the config.json")


def test_a_config_that_promises_more_layers(bench: Bench) -> None:
    set_config(bench.model, num_hidden_layers=4)
    bench.refused(1, "lacks a tensor", "model.layers.3", "all shards")
    set_config(bench.model, num_hidden_layers=1 << 20)
    bench.refused(1, "num_hidden_layers is 1048576", "restore")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("profile", ["float", "arm-int4"])
def test_weights_that_are_no_numbers(bench: Bench, value: float, profile: str) -> None:
    set_tensor(bench.model, DOWN, (11, 5), value)
    bench.refused(1, f"not a finite number: {value}", f"{DOWN}, row 11", "fetch it again", words=("--profile", profile))


# ------------------------------------------------------------------------------------------------------------ adapters


def adapter(directory: Path, **tensors: np.ndarray) -> Path:
    directory.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    start = "base_model.model.model.layers.0.self_attn."
    save_file({f"{start}{name}": array for name, array in tensors.items()}, directory / "adapter_model.safetensors")
    return directory


def test_an_adapter_that_does_not_fit(bench: Bench, tmp_path: Path) -> None:
    def factors(rows: int, columns: int, module: str = "q_proj") -> dict[str, np.ndarray]:
        return {
            f"{module}.lora_A.weight": np.ones((4, columns), np.float32),
            f"{module}.lora_B.weight": np.ones((rows, 4), np.float32),
        }

    wide = adapter(tmp_path / "wide", **factors(64, 99))
    bench.refused(1, "q_proj", "99", words=("--adapter", str(wide)))
    other = adapter(tmp_path / "other", **factors(64, 64, "no_proj"))
    bench.refused(1, "no_proj", words=("--adapter", str(other)))
    bench.refused(1, "missing", words=("--adapter", str(tmp_path / "missing")))
    fitting = adapter(tmp_path / "fitting", **factors(64, 64))
    output = bench.place / "new" / "artifact"
    words = ["export", str(bench.model), "--profile", "arm-int4", "-o", str(output), "--no-validate"]
    assert run([*words, "--adapter", str(fitting)]) == 0
    assert json.loads((output / "manifest.json").read_text())["source"]["adapter"] == {"directory": "fitting"}


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("\x00\x01", "not JSON"),
        ("[]", "not an object"),
        ('"llama"', "not an object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 200 + "1" + "}" * 200, "nested too deeply"),
        ("{}", "names no model_type"),
        (" " * (5 << 20), "larger than"),
    ],
)
def test_configs_that_are_none(bench: Bench, text: str, what: str) -> None:
    (bench.model / "config.json").write_text(text)
    bench.refused(1, what, "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"), ("vocab_size", None), ("num_hidden_layers", -3), ("num_attention_heads", 0),
        ("intermediate_size", 160.5), ("max_position_embeddings", True), ("num_key_value_heads", [2]),
        ("rope_scaling", [1, 2]), ("hidden_act", "gelu"), ("rope_parameters", {"rope_type": "dynamic"}),
    ],
)  # fmt: skip
def test_config_values_that_cannot_be(bench: Bench, key: str, value: Any) -> None:
    changes = {key: value} | ({"rope_parameters": None} if key == "rope_scaling" else {})
    set_config(bench.model, **changes)
    named = {"rope_parameters": "rope_type"}.get(key, key)
    bench.refused(1, named, "restore" if named not in ("rope_type", "hidden_act") else "supported")


def test_no_tokenizer(bench: Bench) -> None:
    (bench.model / "tokenizer.json").unlink()
    bench.refused(1, "the tokenizer is missing", "copy the tokenizer's files")


def test_a_damaged_generation_config(bench: Bench) -> None:
    (bench.model / "generation_config.json").write_text('{"temperature": "hot"}')
    bench.refused(1, "temperature is 'hot'", "generation_config.json", "restore")


def test_no_model_directory(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    bench.refused(1, "the directory is empty", model=str(tmp_path / "empty"))
    bench.refused(1, "config.json", model=str(tmp_path / "model" / "config.json"))
    (bench.model / "config.json").unlink()
    bench.refused(1, "config.json is missing")


def test_evaluation_text_that_cannot_be_read(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Found out before the model is read, not after the export."""

    def never(*arguments: Any, **named: Any) -> None:
        raise AssertionError("work started")

    monkeypatch.setattr("compress.pipeline.build", never)
    (tmp_path / "empty.txt").write_text("")
    for name, what in (("nowhere.txt", "cannot be read"), ("empty.txt", "the text is empty")):
        path = str(tmp_path / name)
        bench.refused(2, what, path, words=("--eval-text", path), validate=True)


# ----------------------------------------------------------------------------------------------------------- resources


def test_no_disk_space(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(10**9, 10**9 - 4096, 4096))
    bench.refused(1, "not enough disk space", "0 MB free", "choose another place with -o")


def test_no_disk_space_after_all(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    bench.refused(1, "not enough disk space", "free some space")


def test_memory_is_refused_before_work(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **named: Any) -> None:
        raise AssertionError("work started")

    monkeypatch.setattr("compress.pipeline.build", never)
    bench.refused(1, "more than --max-memory 100 MB", "raise --max-memory to", words=("--max-memory", "100MB"))
    bench.refused(1, "more than --max-memory 0 B", words=("--max-memory", "0"))


def test_an_output_that_exists(bench: Bench) -> None:
    (bench.place / "file").write_text("mine")
    (bench.place / "full").mkdir()
    (bench.place / "full" / "file").write_text("mine")
    bench._before = bench.listing()
    for name in ("file", "full"):
        output = str(bench.place / name)
        bench.refused(2, "the output exists already", output, "choose another -o", words=("-o", output))
    bench.refused(1, "cannot write there", words=("-o", str(bench.place / "file" / "below")))
    assert (bench.place / "file").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------------- schemes


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("quantize.block_size=512", ("block size 512", "set block_size to 256")),
        ("quantize.roles.down.block_size=33", ("block size 33", "role down", "set block_size to 32")),
        ("quantize.bits=3", ("quantize.bits", "got 3")),
        ("quantize.zero_points=float", ("unknown key 'quantize.zero_points'",)),
        ("quantize.zero_point_dtype=float32", ("unknown key 'quantize.zero_point_dtype'",)),
        ("quantize.algorithm=rnt", ("unknown quantization algorithm 'rnt'", "did you mean rtn")),
        ("quantize.roles.embedding.block_size=128", ("tied table", "--set quantize.roles.embedding.block_size=64")),
        ("provider=cudda", ("unknown provider 'cudda'", "did you mean cuda")),
        ('targets=["genai", "toaster"]', ("no packager for target 'toaster'", "known: genai")),
        ("quantize.bits", ("is not KEY=VALUE", "quantize.block_size=64")),
    ],
)
def test_impossible_schemes(bench: Bench, override: str, parts: tuple[str, ...]) -> None:
    bench.refused(2, *parts, words=("--set", override))
