"""The command line's contract: exit codes, streams, one JSON document, short errors, and a quick --help."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from compress import __version__
from compress.cli import cli, run
from compress.report.environment import environment
from compress.report.model import Report
from tiny_models import PLAIN_INT8

GOLDEN = Path(__file__).parent / "golden" / "command_line.txt"
Capture = pytest.CaptureFixture[str]


def succeed(capsys: Capture, *arguments: str, code: int = 0) -> str:
    """Run a command that works and return its standard output."""
    capsys.readouterr()
    assert run(list(arguments)) == code
    out, err = capsys.readouterr()
    assert "error" not in err
    return out


def fail(capsys: Capture, *arguments: str, code: int) -> str:
    """Run a command that fails, check the form of its message and return it."""
    capsys.readouterr()
    assert run(list(arguments)) == code
    out, err = capsys.readouterr()
    err = err.removeprefix("\n")  # click ends the line that a terminal shows ^C on
    assert out == ""
    assert err.startswith("error: ") and 1 <= len(err.strip().splitlines()) <= 3, err
    assert "Traceback" not in err
    return err


def one_document(text: str) -> Any:
    return json.loads(text)


# ---------------------------------------------------------------------------------------------------------------- help


def signatures() -> list[str]:
    lines = []
    for name, command in cli.commands.items():
        lines.append(f"{name}: {(command.help or '').splitlines()[0]}")
        for parameter in command.params:
            kind = "argument" if isinstance(parameter, click.Argument) else "option"
            spelled = " / ".join([*parameter.opts, *parameter.secondary_opts])
            marks = [mark for mark in ("required", "multiple") if getattr(parameter, mark, False)]
            marks += ["flag"] if getattr(parameter, "is_flag", False) else []
            lines.append(f"    {kind} {spelled}" + (f" ({', '.join(marks)})" if marks else ""))
    return lines


def test_names_of_commands_and_options_are_stable() -> None:
    """A contract with scripts. After a deliberate change: python tests/test_cli.py > tests/golden/command_line.txt."""
    assert signatures() == GOLDEN.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("command", ["", *cli.commands])
def test_every_help_page_fits_and_ends_well(command: str, capsys: Capture) -> None:
    page = succeed(capsys, *command.split(), "--help")
    assert page.startswith("Usage: compress")
    assert max(map(len, page.splitlines())) <= 110
    for name in cli.commands if not command else ():
        assert re.search(rf"^  {name} ", page, re.MULTILINE)


def test_version(capsys: Capture) -> None:
    first, *others = succeed(capsys, "--version").splitlines()
    assert first == f"compress, version {__version__}"
    assert any(line.split()[0] == "onnxruntime" for line in others)


def test_help_loads_nothing_heavy_and_is_quick() -> None:
    program = (
        "import sys; from compress.cli import run; code = run(['--help']); "
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxruntime', 'numpy', 'pydantic'} & set(sys.modules); "
        "print('heavy:', sorted(heavy)); sys.exit(code)"
    )
    seconds = []
    for _ in range(3):
        started = os.times()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        ended = os.times()
        assert done.stdout.splitlines()[-1] == "heavy: []"
        # Processor time, not wall time: another test on the same core must not make this one fail.
        seconds.append(ended.children_user + ended.children_system - started.children_user - started.children_system)
    assert min(seconds) < 0.4


# --------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.usefixtures("fast_skeletons")
def test_export_and_inspect(capsys: Capture, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    output = tmp_path / "artifact"
    text = succeed(
        capsys, "export", str(tiny_model("llama")), "--profile", "arm-int4", "-o", str(output), "--no-validate"
    )
    assert text.strip() == f"built: {output}"
    document = one_document(succeed(capsys, "inspect", str(output), "--json"))
    assert document["status"] == "built"
    assert document["operators"]["MatMulNBits"] == 13
    assert document["opset"] == 23
    assert [item["shape"] for item in document["inputs"] if item["name"] == "input_ids"] == [
        ["batch_size", "sequence_length"]
    ]
    page = succeed(capsys, "inspect", str(output))
    assert "model.onnx.data" in page and "MatMulNBits" in page


@pytest.mark.usefixtures("fast_skeletons")
@pytest.mark.parametrize(
    ("verdict", "fallback", "code", "status"),
    [("pass", [], 0, "accepted"), ("fail", [], 3, "rejected"), ("fail", ["MatMul_1"], 4, "rejected")],
)
def test_the_verdict_decides_the_exit_code(
    verdict: str, fallback: list[str], code: int, status: str, capsys: Capture, tiny_model: Callable[[str], Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    judged: dict[str, Any] = {"status": verdict, "reasons": ["it is"] if verdict == "fail" else []}
    provider = {
        "provider": "cpu", "device": None, "evidence": "measured", "state": "fell_back" if fallback else "ran",
        "verdict": judged,
    }  # fmt: skip
    made = {"verdict": judged, "size": {"artifact_bytes": 1}, "environment": environment(), "providers": [provider]}
    report = Report.model_validate(made).model_dump(mode="json")
    monkeypatch.setattr("compress.proof.prove", lambda *arguments, **named: report)
    output = tmp_path / "artifact"
    text = succeed(
        capsys, "export", str(tiny_model("llama")), "--profile", "arm-int4", "-o", str(output), "--json", code=code
    )
    document = one_document(text)
    assert document["report"] == report
    assert document["output"] == str(output)
    # Outside its budget, the artifact stays and says so.
    assert json.loads((output / "manifest.json").read_text()) == document["manifest"]
    assert document["manifest"]["status"] == status
    listed = {item["name"]: item["sha256"] for item in document["manifest"]["files"]}
    for name in ("report.html", "README.md"):
        content = (output / name).read_bytes()
        assert verdict.upper().encode() in content and listed[name] == hashlib.sha256(content).hexdigest()


def test_texts_and_labels_reach_the_export(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]) -> None:
    seen: list[Any] = []

    def record(model: Any, profile: Any, output: Path, options: Any, stages: Any) -> None:
        seen.append((model.task, options))
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.pipeline.export", record)
    words = ["export", str(tiny_model("bert:embedding")), "--profile", "x86-int8", "--task", "embedding"]
    assert run([*words, "--calibration-text", "a.txt", "--eval-text", "b.txt", "--eval-labels", "c.jsonl"]) == 130
    ((task, options),) = seen
    assert task == "embedding"
    assert (options.calibration_text, options.eval_text, options.eval_labels) == tuple(
        map(Path, ("a.txt", "b.txt", "c.jsonl"))
    )


def test_a_provider_that_does_not_work(
    capsys: Capture, tiny_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = str(tiny_artifact("llama", "arm-int4"))
    assert "unknown provider 'cup'" in fail(capsys, "bench", artifact, "--on", "cup", code=2)
    monkeypatch.setattr("compress.providers.cpu.CpuProvider.missing", lambda self: "it is broken")
    message = fail(capsys, "bench", artifact, code=4)
    assert "cpu provider does not work here" in message and "it is broken" in message


@pytest.mark.usefixtures("fast_skeletons")
def test_interruption_leaves_nothing(
    capsys: Capture, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.weights.write_weights", interrupt)
    output = tmp_path / "new" / "artifact"
    message = fail(
        capsys, "export", str(tiny_model("llama")), "--profile", "float", "-o", str(output), "--no-validate", code=130
    )
    assert message == "error: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_process_leaves_nothing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "compress", "export", str(tiny_model("llama")), "--profile", "float"]
    place = tmp_path / "new"
    process = subprocess.Popen([*command, "-o", str(place / "artifact"), "--no-validate"], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any(place.glob(".artifact.partial")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip()) == (130, b"error: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_inside_an_exec_still_ends_with_our_exit_code(tmp_path: Path) -> None:
    # An import that makes a dataclass executes a string: CPython would then end `python -m` by signal, not by code.
    (tmp_path / "interrupted.py").write_text(
        "import sys\n"
        "from compress import cli\n"
        "cli.cli.main = lambda **_: exec('raise KeyboardInterrupt')\n"
        "cli.main([]) if sys.argv[1:] else cli.cli.main()\n"
    )

    def end(*arguments: str) -> int:
        command = [sys.executable, "-m", "interrupted", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60).returncode

    assert end("handled") == 130
    assert end() == -signal.SIGINT  # the control: an interrupt that nobody handles


@pytest.mark.parametrize(
    ("arguments", "what", "remedy"),
    [
        (["exprt"], "there is no command 'exprt'", "did you mean export"),
        (["export"], "Missing argument 'MODEL'", "compress export --help"),
        (["export", "x"], "Missing option '--profile'", "compress export --help"),
        (["export", "x", "--profile", "float", "--sed", "1"], "No such option '--sed'", "compress export --help"),
        (["export", "x", "--profile", "float", "--seed", "one"], "'one' is not a valid integer", "--help"),
        (["plan", "x", "--profile", "float", "--threads", "0"], "0 is not in the range", "compress plan --help"),
        (["bench", "x", "--new-tokens", "1"], "1 is not in the range", "compress bench --help"),
        (["--bogus"], "No such option '--bogus'", "compress --help"),
    ],
)
def test_wrong_usage(arguments: list[str], what: str, remedy: str, capsys: Capture) -> None:
    message = fail(capsys, *arguments, code=2)
    assert what in message
    assert remedy in message


def test_no_arguments_show_the_help(capsys: Capture) -> None:
    assert run([]) == 2
    assert "Commands:" in capsys.readouterr().err


def test_a_traceback_only_when_asked(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in fail(capsys, "profiles", "arm-int", code=2)
    assert run(["--debug", "profiles", "arm-int"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "did you mean arm-int" in err

    def surprise() -> dict[str, Path]:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr("compress.profile.available_profiles", surprise)
    assert "unexpected ZeroDivisionError: by design" in fail(capsys, "profiles", code=1)
    assert run(["--debug", "profiles"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    for command in ("models", "profiles"):
        writer = subprocess.Popen(
            [sys.executable, "-m", "compress", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert writer.stdout is not None and writer.stderr is not None
        writer.stdout.close()
        err = writer.stderr.read()
        writer.stderr.close()
        assert (writer.wait(), err) == (0, b"")


# ------------------------------------------------------------------------------------------------------- one document


def test_plan_document(capsys: Capture, tiny_model: Callable[[str], Path]) -> None:
    model = str(tiny_model("mistral"))
    document = one_document(succeed(capsys, "plan", model, "--profile", "arm-int4", "--threads", "2", "--json"))
    assert document["model_type"] == "mistral" and document["profile"] == "arm-int4"
    assert document["bits_per_weight"] < 8
    tensors = {item["name"]: item for item in document["tensors"]}
    assert tensors["lm_head"]["storage"] == "int4 b32 sym"
    assert tensors["model.norm.weight"]["storage"] == "float32"
    assert sum(item["bytes"] for item in document["tensors"]) <= document["predicted_bytes"]
    page = succeed(capsys, "plan", model, "--profile", "arm-int4", "--threads", "2")
    assert f"{document['parameters']:,}" in page and "peak memory" in page
    assert re.search(r"^down +int4 b32 sym +3 +30,720", page, re.MULTILINE)
    # Keys and values of 3 blocks, 2 heads of 16, 4 bytes each.
    assert document["cache_bytes_per_token"] == 2 * 3 * 2 * 16 * 4
    assert re.search(r"^key/value cache +786 KB for 1,024 tokens", page, re.MULTILINE)


def test_plan_of_an_encoder(capsys: Capture, tiny_model: Callable[[str], Path]) -> None:
    model = str(tiny_model("bert:text-classification"))
    document = one_document(succeed(capsys, "plan", model, "--profile", "x86-int8", "--threads", "2", "--json"))
    assert document["task"] == "text-classification"
    tensors = {item["name"]: item["storage"] for item in document["tensors"]}
    assert tensors["bert.encoder.layer.0.attention.self.qkv"] == "int8 row dynamic"
    assert tensors["bert.embeddings.word_embeddings"] == "int8 row sym"
    assert document["predicted_peak_memory"]["calibration"] > 0
    page = succeed(capsys, "plan", model, "--profile", "x86-int8", "--threads", "2")
    assert "(bert, text-classification) under x86-int8" in page
    assert document["cache_bytes_per_token"] is None and "key/value" not in page
    assert re.search(r"^down +int8 row dynamic +3 +30,720", page, re.MULTILINE)
    other = one_document(succeed(capsys, "plan", model, "--task", "embedding", "--profile", "int8-qdq", "--json"))
    assert other["task"] == "embedding"
    assert "int8 row static" in {item["storage"] for item in other["tensors"]}


def test_profiles(capsys: Capture) -> None:
    names = [item["name"] for item in one_document(succeed(capsys, "profiles", "--json"))]
    assert {"arm-int4", "x86-int4", "float"} <= set(names) and names == sorted(names)
    assert [line.split()[0] for line in succeed(capsys, "profiles").splitlines()] == names
    assert one_document(succeed(capsys, "profiles", "float", "--json"))["quantize"]["bits"] == 32
    assert succeed(capsys, "profiles", "float").startswith('name = "float"')


def test_models(capsys: Capture) -> None:
    found = one_document(succeed(capsys, "models", "--json"))
    assert {item["name"] for item in found} >= {"gpt2", "tinyllama", "smollm2"}
    assert len(one_document(succeed(capsys, "models", "gpt2", "--json"))) == 1
    assert "gpt2" in succeed(capsys, "models")
    assert "did you mean gpt2" in fail(capsys, "models", "gtp2", code=2)


def test_every_encoder_of_the_catalog_can_be_exported(capsys: Capture) -> None:
    found = one_document(succeed(capsys, "models", "--json"))
    encoders = {item["name"]: item["support"] for item in found if item["task"] != "text-generation"}
    assert {"minilm", "tinybert", "distilbert", "albert", "electra-small"} <= encoders.keys()
    assert set(encoders.values()) == {"supported"}


def test_encoders_commands(capsys: Capture, tiny_artifact: Callable[..., Path]) -> None:
    artifact = str(tiny_artifact("distilbert:text-classification", PLAIN_INT8))
    document = one_document(succeed(capsys, "inspect", artifact, "--json"))
    assert document["task"] == "text-classification"
    assert document["fusions"]["attention"] == 3
    assert [item["name"] for item in document["inputs"]] == ["input_ids", "attention_mask"]
    page = succeed(capsys, "inspect", artifact)
    assert "task      text-classification" in page
    assert "outputs   logits [batch_size, 3]" in page
    message = fail(capsys, "generate", artifact, "Why?", code=2)
    assert "encoder (text-classification)" in message
    assert "onnxruntime" in message and "input_ids, attention_mask; outputs logits" in message
    words = ("bench", artifact, "--repeats", "1", "--threads", "1")
    (entry,) = one_document(succeed(capsys, *words, "--json"))["speed"]
    assert {(point["batch"], point["length"]) for point in entry["points"]} >= {(1, 16), (8, 16)}
    assert re.search(r"^  8 x 16 +p50 [0-9.]+ ms", succeed(capsys, *words), re.MULTILINE)


def test_bench_document(capsys: Capture, tiny_artifact: Callable[..., Path]) -> None:
    text = succeed(
        capsys, "bench", str(tiny_artifact("llama", "arm-int4")), "--prompt-tokens", "8", "--new-tokens", "4",
        "--repeats", "1", "--threads", "1", "--json",
    )  # fmt: skip
    (entry,) = one_document(text)["speed"]
    assert entry["provider"] == "cpu" and entry["evidence"] == "measured"
    assert entry["decode_tokens_per_second"]["median"] > 0


def test_generate(capsys: Capture, tiny_artifact: Callable[..., Path]) -> None:
    artifact = str(tiny_artifact("llama", "arm-int4"))
    first = succeed(capsys, "generate", artifact, "The module", "--new-tokens", "6", "--raw", "--threads", "1")
    again = succeed(capsys, "generate", artifact, "The module", "--new-tokens", "6", "--raw", "--threads", "1")
    other = succeed(capsys, "generate", artifact, "def f(x):", "--new-tokens", "6", "--raw", "--threads", "1")
    assert first == again and first.strip() and first != other
    assert "the prompt is empty" in fail(capsys, "generate", artifact, "", "--raw", code=1)
    assert "the model's context 256" in fail(capsys, "generate", artifact, "word " * 400, "--raw", code=1)


if __name__ == "__main__":
    print("\n".join(signatures()))
