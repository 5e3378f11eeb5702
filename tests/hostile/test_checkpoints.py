"""Hostile checkpoints through the command line: each is one clear error, soon, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from compress.cli import run
from hostile import Terminal, terminal

__all__ = ["terminal"]


@pytest.fixture
def model(tiny_model: Callable[[str], Path], terminal: Terminal) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), terminal.root / "model"))


def set_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_header(model: Path, change: Callable[[dict[str, Any]], None], length: int | None = None) -> None:
    path = model / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    change(header)
    written = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written) if length is None else length) + written + data[8 + size :])


def first(header: dict[str, Any]) -> dict[str, Any]:
    return dict(next(value for key, value in header.items() if key != "__metadata__"))


def set_first(header: dict[str, Any], **changes: Any) -> None:
    name = next(key for key in header if key != "__metadata__")
    header[name] = {**header[name], **changes}


def set_index(model: Path, weight_map: dict[str, str]) -> None:
    (model / "model.safetensors").rename(model / "one.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def set_tokenizer(model: Path, **changes: Any) -> None:
    path = model / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def split_by(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replaced_by_pipe(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)


def sparse(path: Path, size: int) -> None:
    path.unlink(missing_ok=True)
    with path.open("wb") as stream:
        stream.truncate(size)


def set_tensor(model: Path, **changes: Any) -> None:
    set_header(model, lambda header: set_first(header, **changes))


INVALID = "not a valid safetensors"
#: What is done to a good checkpoint, and what the error has to say.
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a header of 2**63 bytes": (lambda m: set_header(m, lambda h: None, 1 << 63), "its header claims"),
    "a shape of 2**40 rows": (lambda m: set_tensor(m, shape=[1 << 40, 64]), INVALID),
    "a shape that overflows": (lambda m: set_tensor(m, shape=[1 << 62, 1 << 62]), INVALID),
    "a negative shape": (lambda m: set_tensor(m, shape=[-1, 64]), INVALID),
    "an unknown type": (lambda m: set_tensor(m, dtype="F7"), INVALID),
    "tensors over each other": (
        lambda m: set_header(m, lambda h: h.update(twin=first(h))), INVALID),
    "a shard by an absolute path": (lambda m: set_index(m, {"a": "/etc/passwd"}), "leads outside"),
    "a shard above": (lambda m: set_index(m, {"a": "../model/one.safetensors"}), "leads outside"),
    "thousands of shards": (lambda m: set_index(m, {f"t{i}": f"s{i}" for i in range(5000)}), "more than 4096 shards"),
    "an index that is deep": (
        lambda m: (set_index(m, {}), (m / "model.safetensors.index.json").write_text('{"weight_map":' * 5000)),
        "nested too deeply"),
    "a key twice": (
        lambda m: (m / "config.json").write_text('{"hidden_size": 64, "hidden_size": 65}'), "given twice"),
    "a number of a million digits": (
        lambda m: (m / "config.json").write_text('{"hidden_size": ' + "9" * 1_000_000 + "}"), "digits"),
    "NaN": (lambda m: set_config(m, rope_theta=float("nan")), "NaN is no number"),
    "half of a surrogate pair": (lambda m: set_config(m, architectures=["\ud800"]), "surrogate"),
    "an escape sequence": (lambda m: set_config(m, hidden_act="\x1b]0;owned\x07\x1b[2J"), "is not supported"),
    "a billion layers": (lambda m: set_config(m, num_hidden_layers=10**9), "num_hidden_layers"),
    "no heads": (lambda m: set_config(m, num_attention_heads=0), "num_attention_heads"),
    "a vocabulary of 2**40": (lambda m: set_config(m, vocab_size=1 << 40), "vocab_size"),
    "positions for a table of terabytes": (
        lambda m: set_config(m, max_position_embeddings=1 << 24, head_dim=1 << 20), "max_position_embeddings"),
    "a truth value as text": (lambda m: set_config(m, tie_word_embeddings="false"), "tie_word_embeddings"),
    "an epsilon below zero": (lambda m: set_config(m, rms_norm_eps=-1e-5), "rms_norm_eps"),
    "factors that are no list of numbers": (
        lambda m: set_config(m, rope_parameters={"rope_type": "llama3", "factor": [8]}), "factor"),
    "code of its own": (
        lambda m: set_config(m, model_type="evil", auto_map={"AutoConfig": "evil.Evil"}), "never run"),
    "a pipe in place of the weights": (lambda m: replaced_by_pipe(m, "model.safetensors"), "not a regular file"),
    "a pipe in place of the config": (lambda m: replaced_by_pipe(m, "config.json"), "not a regular file"),
    "a pipe in place of a template": (lambda m: replaced_by_pipe(m, "chat_template.jinja"), "not a regular file"),
    "a directory in place of a vocabulary": (lambda m: (m / "vocab.json").mkdir(), "not a regular file"),
    "a device in place of the tokenizer": (
        lambda m: ((m / "tokenizer.json").unlink(), (m / "tokenizer.json").symlink_to("/dev/zero")), "leads outside"),
    "a user's file in place of the vocabulary": (
        lambda m: (m / "vocab.txt").symlink_to("/etc/passwd"), "leads outside"),
    "a link to itself": (lambda m: (m / "vocab.txt").symlink_to("vocab.txt"), "missing"),
    "a tokenizer of ten gigabytes": (lambda m: sparse(m / "tokenizer.json", 10 << 30), "larger than"),
    "weights of ten gigabytes of nothing": (lambda m: sparse(m / "model.safetensors", 10 << 30), "safetensors file"),
    "a tokenizer that is no JSON": (lambda m: (m / "tokenizer.json").write_text("[" * 10_000), "tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_is_refused(name: str, model: Path, terminal: Terminal, fast_skeletons: None) -> None:
    damage, part = CHECKPOINTS[name]
    damage(model)
    terminal.refuses("export", str(model), "--profile", "arm-int4", "--no-validate", "--threads", "1", parts=(part,))


def test_an_encoder_is_refused(tiny_model: Callable[[str], Path], terminal: Terminal) -> None:
    model = Path(shutil.copytree(tiny_model("bert:embedding"), terminal.root / "model"))
    module = {"idx": 0, "name": "0", "path": "../../x", "type": "sentence_transformers.models.Transformer"}
    (model / "modules.json").write_text(json.dumps([module]))
    terminal.refuses("export", str(model), "--profile", "x86-int8", "--no-validate", parts=("modules.json",))


def test_the_model_itself_is_good(model: Path, terminal: Terminal, fast_skeletons: None) -> None:
    """Control: what is damaged above exports."""
    words = ["export", str(model), "--profile", "arm-int4", "--no-validate", "--threads", "1", "-o", "out"]
    assert run(words) == 0


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        (r"(a+)+$", "tokenizer"),  # the library's own limit, told by a panic
        (r"(x+x+)+y", "tokenizer"),
        (r"(((\w{900}){900}){900}){900}", "tokenizer"),
    ],
)
def test_a_tokenizer_that_never_ends(
    pattern: str, part: str, model: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.tokens.BASE_SECONDS", 1.0)
    set_tokenizer(model, pre_tokenizer=split_by(pattern))
    (terminal.root / "text.txt").write_text("words and " + "a" * 40 + "! " + "x" * 60 + " z" * 400)
    words = ("--set", "calibration.source=text", "--calibration-text", str(terminal.root / "text.txt"))
    profile = ("--profile", "arm-int4", "--set", "quantize.algorithm=gptq", "--no-validate", "--threads", "1")
    terminal.refuses("export", str(model), *profile, *words, parts=(part,))


# --------------------------------------------------------------------------------------------------- adapters and GGUF


def test_adapters_are_refused(model: Path, terminal: Terminal) -> None:
    adapter = terminal.root / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{name}A.weight": np.ones((2, 64), np.float32), f"{name}B.weight": np.ones((64, 2), np.float32)}
    save_file(factors, adapter / "adapter_model.safetensors")
    for config, part in (
        ({"r": 10**9}, "r is 1000000000"),
        ({"r": -1}, "r is -1"),
        ({"r": 2, "rank_pattern": {".*.*.*q_proj": 2}}, "too complex"),
        ({"r": 2, "rank_pattern": {"(q+)+_proj": 2}}, "too complex"),
        ({"r": 3}, "have rank 2, its config says 3"),
        ({"r": 2, "lora_alpha": 1e300}, "lora_alpha"),
    ):
        full = {"peft_type": "LORA", "lora_alpha": 4, **config}
        (adapter / "adapter_config.json").write_text(json.dumps(full))
        terminal.refuses("plan", str(model), "--profile", "float", "--adapter", str(adapter), parts=(part,))
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.safetensors").symlink_to(model / "model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    terminal.refuses("plan", str(model), "--profile", "float", "--adapter", str(adapter), parts=("leads outside",))


def gguf(*, alignment: int = 32, counts: tuple[int, int] = (1, 2), offset: int = 0, twice: bool = False) -> bytes:
    """Write a file of one tensor or two, by hand."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def tensor(name: str) -> bytes:
        return text(name) + struct.pack("<IQQIQ", 2, 4, 2, 0, offset)

    keys = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    keys += text("general.alignment") + struct.pack("<II", 4, alignment)
    tensors = tensor("token_embd.weight") + (tensor("output_norm.weight") if twice else b"")
    header = b"GGUF" + struct.pack("<IQQ", 3, *counts) + keys + tensors
    return header + bytes(-len(header) % 32 + 256)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (gguf(alignment=0), "alignment 0"),
        (gguf(alignment=3), "alignment 3"),
        (gguf(alignment=1 << 31), "alignment 2147483648"),
        (gguf(counts=(1 << 60, 2)), "the header claims"),
        (gguf(counts=(1000, 2)), "damaged"),
        (gguf(counts=(1, 1 << 19)), "damaged"),
        (gguf(offset=1 << 63), "past the file's end"),
        (gguf(counts=(2, 2), twice=True), "lie over each other"),
        (gguf()[:40], "damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62), "damaged"),
        (b"GGUF" + struct.pack("<IQQQsIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "nested arrays"),
        (b"GGUF" + struct.pack("<IQQQsIIQ", 3, 0, 1, 1, b"k", 9, 0, 1 << 50), "claims"),
    ],
)
def test_a_gguf_file_is_refused(data: bytes, part: str, terminal: Terminal) -> None:
    path = terminal.root / "model.gguf"
    path.write_bytes(data)
    terminal.refuses("plan", str(path), "--profile", "float", parts=(part,))


def test_a_pipe_called_gguf(terminal: Terminal) -> None:
    os.mkfifo(terminal.root / "model.gguf")
    terminal.refuses("plan", str(terminal.root / "model.gguf"), "--profile", "float", parts=("no such GGUF",))


@pytest.mark.parametrize(
    "reference",
    ["package:os", "package:json/../os.py", "package:json//etc/passwd", "package:../json", "package:json/" + "a" * 300],
)
def test_package_references(reference: str, terminal: Terminal) -> None:
    terminal.refuses("plan", reference, "--profile", "float")


# ------------------------------------------------------------------------------------------------- the user's own files


def write_pipe(path: Path) -> None:
    os.mkfifo(path)


FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": write_pipe,
    "a directory": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "ten gigabytes of nothing": lambda path: sparse(path, 10 << 30),
    "NUL bytes": lambda path: path.write_bytes(b"a\0b" * 1000),
    "no UTF-8": lambda path: path.write_bytes(b"\xff\xfe" * 1000),
}


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("option", ["--eval-text", "--eval-labels", "--calibration-text"])
def test_texts_that_are_none(what: str, option: str, model: Path, terminal: Terminal) -> None:
    path = terminal.root / "file"
    FILES[what](path)
    more = ("--set", "quantize.algorithm=gptq", "--set", "calibration.source=text") if "calib" in option else ()
    terminal.refuses("export", str(model), "--profile", "arm-int4", "--threads", "1", option, str(path), *more)


@pytest.mark.parametrize(
    "content",
    [
        b"a = " + b"[" * 50_000,
        b"a = " + b"9" * 5000,
        b"\xff",
        b"a." * 20_000 + b"a = 1",
        b"name = " * 40_000,
        b"a = nan",
    ],
)
def test_profiles_that_are_none(content: bytes, model: Path, terminal: Terminal) -> None:
    path = terminal.root / "own.toml"
    path.write_bytes(content)
    terminal.refuses("plan", str(model), "--profile", str(path), codes=(2,))


def test_a_shape_that_the_weights_have_is_no_excuse(model: Path, terminal: Terminal) -> None:
    """A tensor without rows, whose header is well formed, does not fit any config."""
    tensors = load_file(model / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = np.zeros((0, 64), np.float32)
    save_file(tensors, model / "model.safetensors")
    terminal.refuses("plan", str(model), "--profile", "float", parts=("disagree",))
