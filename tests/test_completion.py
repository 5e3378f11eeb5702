"""What shells are offered, through click and through bash itself; and --version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from compress.cli import cli, run
from compress.cli_version import version_text


def offered(*words: str) -> list[str]:
    *arguments, incomplete = words
    found = ShellComplete(cli, {}, "compress", "_COMPRESS_COMPLETE").get_completions(arguments, incomplete)
    return [item.value if item.type == "plain" else f"<{item.type}>" for item in found]


def test_names() -> None:
    assert offered("insp") == ["inspect"]
    assert offered("export", "x", "--profile", "arm-") == ["arm-int4", "arm-int8"]
    assert "npu-qnn-int8" in offered("prune", "x", "--profile", "")
    assert offered("profiles", "flo") == ["float"]
    assert offered("export", "tinyl") == ["tinyllama", "tinyllama-1.1b"] and "gpt2" in offered("plan", "")
    assert offered("export", "./mine") == ["<file>"]
    assert {"cpu", "cpu-arm64", "qnn"} <= set(offered("validate", "x", "--on", ""))
    assert offered("doctor", "cpu-") == ["cpu-arm64"]
    assert not any(name.startswith("_") for name in offered("doctor", ""))
    assert offered("completion", "") == ["bash", "zsh", "fish"]


def test_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("artifacts/one", "two", "no-artifact", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("artifacts/one", "two", ".hidden"):
        (tmp_path / name / "manifest.json").touch()
    monkeypatch.chdir(tmp_path)
    assert offered("inspect", "") == ["artifacts/one", "two"]
    assert offered("compare", "two", "artifacts/") == ["artifacts/one"]
    assert offered("generate", "no-") == ["<dir>"]
    assert offered("bench", "missing/deep/") == ["<dir>"]


def test_completing_loads_nothing_heavy() -> None:
    program = (
        "import sys, atexit; from compress.cli import run; "
        "atexit.register(lambda: print('heavy:', sorted({'torch', 'transformers', 'numpy', 'pydantic', 'onnxruntime'}"
        " & set(sys.modules)))); run([])"
    )
    words = {"_COMPRESS_COMPLETE": "bash_complete", "COMP_WORDS": "compress export smollm2-13", "COMP_CWORD": "2"}
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | words, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["plain,smollm2-135m", "heavy: []"], done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    command = tmp_path / "compress"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m compress "$@"\n')
    command.chmod(0o755)
    program = f"""
PATH="{tmp_path}:$PATH"
{script}
complete -p compress
COMP_WORDS=(compress export x --profile webgpu) COMP_CWORD=4
_compress_completion compress
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["complete -o nosort -F _compress_completion compress", "webgpu-int4"], (
        done.stderr
    )


@pytest.mark.parametrize(("shell", "mark"), [("zsh", "#compdef compress"), ("fish", "complete --no-files --command")])
def test_scripts_of_other_shells(shell: str, mark: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    assert mark in capsys.readouterr().out
    assert run(["completion", "tcsh"]) == 2


def test_versions() -> None:
    lines = dict(line.split(maxsplit=1) for line in version_text().splitlines()[1:])
    assert {"python", "onnxruntime", "onnx", "torch", "transformers", "mobius-onnx", "optimum"} <= set(lines)
    assert lines["torch"].startswith("2.13.0")
