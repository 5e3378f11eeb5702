from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_speed
import llama_gguf
import measured_export
import numpy as np
import processor_time
import pytest
import roofline
import speed_contenders
import speed_report
from benchmark_speed import Worker
from measured_export import Build
from speed_contenders import Contender

from compress.source import open_checkpoint

MINE, PEER = "ours x86-int4", "llama.cpp Q4_0"


def answer(prompt: float, *decode: float) -> dict[str, Any]:
    return {"prefill": {"128": [9.0, prompt, prompt / 2]}, "decode": list(decode), "others": 0.1 * prompt}


def document(**changes: Any) -> dict[str, Any]:
    """Two contenders and three rounds in which the machine halves its speed: ours takes half of the peer's time."""
    rounds = [
        {MINE: answer(1.28 * slow, 0.01 * slow), PEER: answer(2.56 * slow, 0.02 * slow)} for slow in (1.0, 2.0, 1.0)
    ]
    common = {"day": None, "all_positions": False, "peak_rss_bytes": 300_000_000}
    log = ["load_tensors:          AMX model buffer size =    72.14 MiB", "sched:  CPU compute buffer size = 1 MiB"]
    facts = {
        MINE: common | {"group": "ours", "kind": "onnx", "bytes": 90_000_000, "token_bytes": 80_000_000},
        PEER: common
        | {"group": "llama", "kind": "llama", "bytes": 70_000_000, "token_bytes": 60_000_000, "day": "2026-01-01"}
        | {"log": log, "flash_attention": True, "system": "AMX_INT8 = 1", "all_positions": True},
    }
    found = {
        "checkpoint": "tiny",
        "input": "llama, 3 layers",
        "date": "2026-01-02",
        "machine": "a machine, load 0.1 at start",
        "instructions": "avx2",
        "threads": 2,
        "prompts": [128],
        "new": 1,
        "session": {},
        "environment": {"MALLOC": "huge"},
        "bandwidths": [9e9, 16e9, 12e9],
        "cache": 70_000_000,
        "versions": {"onnxruntime": "1"},
        "contenders": facts,
        "missing": {"builder int4": "no environment"},
        "rounds": rounds,
    }
    return found | changes


# ------------------------------------------------------------------------------------------------------- arithmetic


def test_rates_are_tokens_over_median_times() -> None:
    found = speed_report.rates({"prefill": {"128": [4.0, 1.0, 2.0]}, "decode": [0.5, 0.1, 0.25]})
    assert found == {"prefill 128": 64.0, "decode": 4.0}


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [{name: speed_report.rates(each[name]) for name in each} for each in document()["rounds"]]
    assert speed_report.ratios(rounds, MINE, PEER) == {"prefill 128": [2.0] * 3, "decode": [2.0] * 3}
    assert speed_report.spread([3.0, 1.0, 2.0], 1) == "2.0 (1.0-3.0)"
    assert speed_report.spread([3.0], 2) == "3.00"


def test_the_section_has_speeds_ratios_and_what_the_memory_allows() -> None:
    text = speed_report.section(document())
    assert f"| `{MINE}` | 90.0 | 100.0 (50.0-100.0) | 100.0 (50.0-100.0) | 300 | the last |" in text
    assert f"| `{PEER}` | 70.0 | 50.0 (25.0-50.0) | 50.0 (25.0-50.0) | 300 | all positions |" in text
    assert f"| `{MINE}` / `{PEER}` | 2.00 (2.00-2.00) | 2.00 (2.00-2.00) |" in text
    assert f"| `{MINE}` | 80.0 | 8.00 | 50 % |" in text  # 100 tokens of 80 MB a second of 16 GB
    assert f"the memory's rate does not bound `{PEER}`\n" in text
    assert "had 26 % of the processors' time during a measurement in the median, 51 % at most" in text
    assert "AMX model buffer size = 72.14 MiB; every" in text and "flash attention: used" in text
    assert f"`{PEER}` on 2026-01-01" in text
    assert "Every contender's process had `MALLOC=huge`" in text
    assert "Missing: `builder int4`: no environment" in text


def test_peers_alone_have_no_ratios() -> None:
    whole = document()
    alone = document(
        contenders={PEER: whole["contenders"][PEER]},
        rounds=[{PEER: each[PEER]} for each in whole["rounds"]],
        cache=None,
    )
    text = speed_report.section(alone)
    assert "ours / peer" not in text and "last level's cache" not in text


# -------------------------------------------------------------------------------------------------------- arguments


def test_a_profile_may_bring_settings() -> None:
    assert speed_contenders.split_settings("x86-int4") == ("x86-int4", [])
    text = "x86-int4,quantize.block_size=128,quantize.roles={a={bits=8, block_size=16}},targets=[1,2]"
    expected = ["quantize.block_size=128", "quantize.roles={a={bits=8, block_size=16}}", "targets=[1,2]"]
    assert speed_contenders.split_settings(text) == ("x86-int4", expected)


@pytest.mark.parametrize("text", ["", "a=1", ",a=1", "x86-int4,", "x86-int4,a", "x86-int4,=1"])
def test_other_texts_are_no_profile(text: str) -> None:
    with pytest.raises(ValueError, match="is not PROFILE"):
        speed_contenders.split_settings(text)


def test_settings_become_options_of_the_export(tmp_path: Path) -> None:
    recipe = speed_contenders.ours("x86-int4,quantize.roles={}", tmp_path)
    assert recipe.command[-7:] == (
        "--profile",
        "x86-int4",
        "--set",
        "quantize.roles={}",
        "--no-validate",
        "-o",
        "{out}",
    )
    assert recipe.pins == (speed_contenders.sources_digest(),)


def config_of(folder: Path, **changes: Any) -> str:
    config = {"model_type": "llama", "vocab_size": 10, "max_position_embeddings": 600} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_defaults(tmp_path: Path) -> None:
    options = benchmark_speed.parse([config_of(tmp_path), "--session", "a.b=c=d"])
    assert (options.profile, options.prompt, options.llama) == (["x86-int4"], [128, 512], ["Q4_0"])
    assert (options.vocabulary, options.session, options.only) == (10, {"a.b": "c=d"}, None)


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        ([], {"model_type": "gpt2"}, "gpt2 is none of llama, mistral, phi3"),
        (["--prompt", "600"], {}, "632 tokens are more than the model's 600 positions"),
        (["--prompt", "8", "--prompt", "8"], {}, "--prompt: the same twice"),
        (["--prompt", "0"], {}, "at least 1"),
        (["--profile", "a,b"], {}, "is not PROFILE"),
        (["--session", "a"], {}, "write KEY=VALUE"),
        (["--environment", "a"], {}, "write NAME=VALUE"),
    ],
)
def test_arguments_that_cannot_be(
    words: list[str], changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark_speed.parse([config_of(tmp_path, **changes), *words])
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize(
    ("name", "tied", "layer"), [("llama", True, 9), ("llama-untied", False, 13), ("phi3", False, 6)]
)
def test_a_gguf_holds_every_tensor_once(
    name: str, tied: bool, layer: int, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "model.gguf"
    written = llama_gguf.write(tiny_model(name), out, "Q4_0")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    assert len(tensors) == len(written) == 2 + (not tied) + 3 * layer
    assert (llama_gguf.HEAD in tensors) is not tied
    sizes = llama_gguf.sizes_of(out)
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        for entry in written:
            tensor, values = tensors[entry.name], checkpoint.read(entry.source)
            assert tensor.tensor_type.name == ("Q4_0" if values.ndim == 2 else "F32")
            assert tuple(reversed([int(size) for size in tensor.shape])) == values.shape
            assert sizes[entry.name] == entry.bytes
            stored = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
            # Sixteen steps over a block's range; another tensor's values, or another order, are an error of 1.4.
            assert np.linalg.norm(stored - values) < 0.12 * np.linalg.norm(values)
        table = checkpoint.config["vocab_size"] * checkpoint.config["hidden_size"] * 18 // 32
    assert llama_gguf.token_bytes(sizes) == sum(sizes.values()) - (0 if tied else table)


def test_what_has_no_place_in_a_gguf_is_refused(tiny_model: Callable[[str], Path]) -> None:
    pytest.importorskip("gguf")
    config = {"model_type": "llama", "num_hidden_layers": 1}
    for changed, shapes, message in (
        ({"model_type": "gpt2"}, {}, "gpt2 is none of"),
        ({}, {"model.layers.0.strange.weight": (32, 32)}, "has no name"),
        ({}, {"model.layers.0.self_attn.q_proj.weight": (32, 48)}, "48 long, no multiple"),
    ):
        with pytest.raises(llama_gguf.UnsupportedError, match=message):
            llama_gguf.entries(config | changed, shapes, "Q4_0")


def test_a_gguf_is_kept_until_its_checkpoint_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model"
    source.mkdir()
    made = []

    def run(command: list[str], **options: Any) -> Any:
        made.append(command)
        Path(command[3]).write_bytes(b"GGUF")
        return argparse.Namespace(returncode=0, stderr="")

    monkeypatch.setattr(speed_contenders.subprocess, "run", run)
    monkeypatch.setattr(llama_gguf, "sizes_of", lambda path: {llama_gguf.TABLE: 7, llama_gguf.HEAD: 5})
    for content, count in (("{}", 1), ("{}", 1), ('{"a": 1}', 2)):
        (source / "config.json").write_text(content)
        found = speed_contenders.llama("Q4_0", source, tmp_path, Path("python"))
        assert isinstance(found, Contender) and found.token_bytes == 5
        assert len(made) == count


# --------------------------------------------------------------------------------------------------------- roofline


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_a_token_reads_all_weights_but_a_table(
    name: str, tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path]
) -> None:
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        table = ("model.embed_tokens.weight", "lm_head.weight")
        shapes = {entry: info.shape for entry, info in checkpoint.tensors().items() if entry not in table}
    once = sum(int(np.prod(shape)) for shape in shapes.values()) + 384 * 64  # the head, tied or not
    assert roofline.onnx_token_bytes(tiny_artifact(name, "float") / "model.onnx") == 4 * once
    quantized = tiny_artifact(name, "x86-int4")
    read = roofline.onnx_token_bytes(quantized / "model.onnx")
    assert once // 2 < read < measured_export.model_bytes(quantized) and read < 1.3 * once


def test_bandwidth_is_a_rate() -> None:
    assert 1e8 < roofline.read_bandwidth(2, size=1 << 24, passes=2) < 1e13


@pytest.mark.parametrize(
    ("text", "expected"), [("107520K\n", 107520 << 10), ("32M", 32 << 20), ("", None), ("K", None)]
)
def test_last_level_cache(text: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_CACHE", tmp_path / "size")
    assert roofline.last_level_cache() is None
    (tmp_path / "size").write_text(text)
    assert roofline.last_level_cache() == expected


def test_others_are_those_that_are_not_named() -> None:
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout and child.stdout.readline()
            without, among = processor_time.Others([child.pid]), processor_time.Others([])
            start = time.perf_counter(), processor_time.seconds_of([child.pid])
            time.sleep(0.5)
            apart = among.share() - without.share()
            elapsed, own = time.perf_counter() - start[0], processor_time.seconds_of([child.pid]) - start[1]
        finally:
            child.kill()
    assert own > 0
    assert apart == pytest.approx(own / elapsed / (os.cpu_count() or 1), abs=0.1)


# ---------------------------------------------------------------------------------------------------------- workers


def worker_of(model: Path, tmp_path: Path) -> Worker:
    options = argparse.Namespace(threads=1, prompt=[4], new=2, vocabulary=384, environment={"TOLD": "1"})
    contender = Contender("ours", "mine", "onnx", Path(sys.executable), model, 1, 1)
    return Worker(contender, options, tmp_path / "log")


def test_a_worker_times_rounds_on_request(tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    worker = worker_of(tiny_artifact("llama") / "model.onnx", tmp_path)
    try:
        assert b"TOLD=1" in Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
        assert worker.facts["all_positions"] is False and worker.facts["peak_rss_bytes"] > 10e6
        for _ in range(2):
            found = worker.round()
            assert list(found["prefill"]) == ["4"] and len(found["decode"]) == 2
            assert min(*found["prefill"]["4"], *found["decode"]) > 0
    finally:
        worker.close()
    with pytest.raises((SystemExit, ValueError)):
        worker.round()


def test_a_worker_that_ends_has_the_last_word(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="mine: its process ended with exit code 1\nthere is no .*nowhere.onnx"):
        worker_of(tmp_path / "nowhere.onnx", tmp_path)


# ----------------------------------------------------------------------------------------------------- environments


def test_an_environment_is_made_again_if_it_is_compiled_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[str], dict[str, str] | None]] = []

    def run(command: list[str], check: bool, env: dict[str, str] | None = None) -> None:
        calls.append((command, env))
        (tmp_path / "it").mkdir(exist_ok=True)

    monkeypatch.setattr(subprocess, "run", run)
    build = Build(("--no-binary", "a"), {"CXXFLAGS": "-include /somewhere"}, ("digest 1",))
    for kind, count in ((build, 2), (build, 2), (Build((), {}, ("digest 2",)), 4), (None, 6), (None, 6)):
        measured_export.pinned_python(tmp_path / "it", ["a==1"], kind)
        assert len(calls) == count
    command, environment = calls[1]
    assert command[-3:] == ["--no-binary", "a", "a==1"]
    assert environment is not None and environment["CXXFLAGS"] == "-include /somewhere"
    assert json.loads((tmp_path / "it" / "pins.json").read_text()) == ["a==1"]
