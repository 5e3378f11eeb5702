"""Disks that fill up and fail, memory that runs out, clocks that jump: told in a few lines, and nothing is left."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faults
import pytest

from compress import pipeline
from compress.cli import run
from compress.errors import ResourceError
from compress.profile import load_profile
from compress.progress import Stages
from compress.validation import protocol

QUICK = (
    "validation.baselines=[]", "validation.repeats=1", "validation.tokens=64", "validation.window=32",
    "validation.prompt_tokens=8", "validation.new_tokens=2", "validation.sample_tokens=0",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="compiles a small library")
@pytest.mark.parametrize(("kind", "part"), [("FAULT_LIMIT", 0.45), ("FAULT_READ_AFTER", 0.6)])
def test_a_disk_that_fills_up_or_fails(
    tiny_model: Callable[[str], Path], tmp_path: Path, kind: str, part: float
) -> None:
    """``tools/faults.py`` tries more points."""
    total = {"FAULT_LIMIT": 368_000, "FAULT_READ_AFTER": 35_600_000}[kind]
    words = [str(tiny_model("llama")), "--profile", "arm-int4", "--no-validate"]
    library = faults.compile_library(tmp_path)
    ended, _, _ = faults.run(library, words, tmp_path, {kind: str(int(part * total))}, model=tiny_model("llama"))
    assert ended.faults(faults.SPACE if kind == "FAULT_LIMIT" else faults.READING) == []


def test_a_run_with_a_fault_is_told_from_one_that_ends_as_it_should() -> None:
    good = faults.Outcome(1, "error: no space is left on the disk\n  in: a\n  try: b\n", ())
    assert good.faults(faults.SPACE) == []
    assert faults.Outcome(1, good.said, (".out.partial",)).faults(faults.SPACE) == ["left: .out.partial"]
    assert faults.Outcome(0, "", ()).faults(faults.SPACE)[0] == "exit code 0"
    assert "a traceback" in faults.Outcome(1, "Traceback (most recent call last)\n", ()).faults(faults.SPACE)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_while_weights_are_written(
    code: int,
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fast_skeletons: None,
) -> None:
    pwrite = os.pwrite

    def refuse(descriptor: int, *arguments: Any) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "model.onnx.data":
            raise OSError(code, "No room")
        return pwrite(descriptor, *arguments)

    monkeypatch.setattr(os, "pwrite", refuse)
    output = tmp_path / "room" / "out"
    words = ["export", str(tiny_model("llama")), "--profile", "arm-int4", "-o", str(output), "--no-validate"]
    assert run(words) == 1
    said = capsys.readouterr().err
    assert "error: no space is left on the disk\n" in said and "free some space" in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_a_workers_full_disk_and_lack_of_memory_are_told_as_such(tmp_path: Path) -> None:
    def full(request: Any, job: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "/place/file")

    def hungry(request: Any, job: Path) -> Any:
        raise MemoryError("Unable to allocate 9.00 TiB")

    for handler, said in ((full, "no space is left on the disk"), (hungry, "memory ran out: Unable to allocate 9.00")):
        (tmp_path / "request.json").write_text('{"protocol": 1}')
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(protocol, "follow_parent", lambda parent: None)
            assert protocol.serve(handler, [str(tmp_path), "0"]) == 0
        with pytest.raises(ResourceError, match=said) as caught:
            protocol._read_response("worker", {}, tmp_path, 0, "")
        assert caught.value.hint


def test_memory_that_runs_out_here_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hungry(*arguments: Any, **named: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("compress.catalog.entries", hungry)
    assert run(["models"]) == 1
    assert capsys.readouterr().err.startswith("error: memory ran out\n  try: --max-memory")


def test_a_clock_that_jumps_changes_nothing(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_skeletons: None
) -> None:
    jumps = itertools.cycle((0.0, 1e9, -1e9, 5e8))
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + next(jumps))
    options = pipeline.ExportOptions(threads=1)
    reference = pipeline.ModelReference(str(tiny_model("llama")))
    done = pipeline.export(reference, load_profile("arm-int4", QUICK), tmp_path / "out", options, Stages())
    assert done.report is not None
    assert all(0 <= stage["seconds"] < 600 for stage in done.report["stages"])
