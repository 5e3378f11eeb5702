"""An output appears whole or not at all; what a killed run finished is used, and nothing else is."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compress import temporary
from compress.errors import CompressError, UsageError, WorkerKilledError
from compress.lock import LockedError, held
from compress.workspace import alone, check, opened

BASIS = {"model": "one", "seed": 0}


class Interrupted(BaseException):
    """Like a kill, but a test lives on: not an Exception, not an interrupt."""


@pytest.fixture(autouse=True)
def _notes_reach_the_root() -> Iterator[None]:
    logger = logging.getLogger("compress")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before


def killed(output: Path, monkeypatch: pytest.MonkeyPatch, *, after: int = 1, basis: Any = BASIS) -> Path:
    """Leave what a run leaves that is killed after so many finished steps; return its workspace."""
    with monkeypatch.context() as patch:
        patch.setattr("compress.workspace._remove_all", lambda space: None)
        patch.setattr("compress.workspace._remove_empty", lambda made: None)
        with pytest.raises(Interrupted), opened(output, basis) as space:
            for number in range(after):
                (space.directory / f"file-{number}").write_text("content")
                space.kept.file(f"step-{number}").write_text("state")
                space.kept.keep(f"step-{number}", number)
            (space.scratch / "litter").write_text("litter")
            raise Interrupted
    return output.with_name(f".{output.name}.partial")


def test_success_puts_everything_in_its_place(tmp_path: Path) -> None:
    with opened(tmp_path / "a" / "out", BASIS) as space:
        (space.directory / "file").write_text("content")
        (space.directory / "sub").mkdir()
        (space.directory / "sub" / "other").write_text("more")
        assert not (tmp_path / "a" / "out").exists()
        space.finish(0)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert (tmp_path / "a" / "out" / "sub" / "other").read_text() == "more"
    assert (tmp_path / "a" / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, Interrupted, WorkerKilledError])
def test_a_failure_before_any_step_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    (tmp_path / "neighbour").mkdir()
    with pytest.raises(failure), opened(tmp_path / "a" / "b" / "out", BASIS) as space:
        (space.directory / "file").write_text("content")
        raise failure("no")
    assert [path.name for path in tmp_path.iterdir()] == ["neighbour"]


@pytest.mark.parametrize("failure", [ValueError, CompressError])
def test_a_failure_of_the_work_itself_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), opened(tmp_path / "out", BASIS) as space:
        space.kept.keep("step", 1)
        raise failure("no")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, WorkerKilledError])
def test_an_interrupt_keeps_what_is_finished_and_says_where(
    tmp_path: Path, failure: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(failure), opened(tmp_path / "out", BASIS) as space:
        space.kept.keep("step", {"loss": 0.1 + 0.2})
        (space.scratch / "large").write_text("litter")
        raise failure("no")
    (root,) = tmp_path.iterdir()
    assert root.name == ".out.partial" and str(root) in caplog.text and not (root / "scratch").exists()
    with opened(tmp_path / "out", BASIS) as space:
        assert space.resumed and space.kept.value("step") == {"loss": 0.1 + 0.2}
        assert "an earlier run (process" in caplog.text and "--fresh starts over" in caplog.text
        space.finish(0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_after_a_kill_files_and_values_are_there_and_litter_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path / "out", monkeypatch, after=2)
    with opened(tmp_path / "out", BASIS) as space:
        assert [space.kept.value(f"step-{number}") for number in range(3)] == [0, 1, None]
        assert (space.directory / "file-1").read_text() == "content" and not list(space.scratch.iterdir())
        assert space.kept.file("step-1").read_text() == "state"
        space.finish(0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("how", ["basis", "fresh", "no journal", "torn basis"])
def test_another_commands_work_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = killed(tmp_path / "out", monkeypatch)
    basis = BASIS | {"model": "another"} if how == "basis" else BASIS
    if how == "no journal":
        (root / "journal").unlink()
    elif how == "torn basis":
        (root / "journal").write_bytes((root / "journal").read_bytes()[:10])
    with opened(tmp_path / "out", basis, fresh=how == "fresh") as space:
        assert not space.resumed and space.kept.value("step-0") is None
        assert not list(space.directory.iterdir()) and not space.kept.file("step-0").exists()
        assert ("another command or model (model): starting over" in caplog.text) == (how == "basis")
        space.finish(0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_torn_line_does_not_count_and_the_lines_before_it_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    root = killed(tmp_path / "out", monkeypatch, after=2)
    (root / "journal").write_bytes((root / "journal").read_bytes()[:-cut])
    with opened(tmp_path / "out", BASIS) as space:
        assert (space.kept.value("step-0"), space.kept.value("step-1")) == (0, None)
        space.kept.keep("step-1", "again")
        space.finish(0)


def test_a_kill_after_the_last_rename_is_a_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch, opened(output, BASIS) as space:
        patch.setattr("compress.workspace._remove_all", lambda space: None)
        (space.directory / "file").write_text("content")
        space.finish({"code": 3})
    assert output.is_dir() and (tmp_path / ".out.partial").is_dir()
    check(output)
    with opened(output, BASIS) as space:
        assert space.done == {"code": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UsageError, match="exists already"):
        check(output)


def test_a_kill_before_the_last_rename_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(*arguments: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("compress.workspace._remove_all", lambda space: None)
        patch.setattr(os, "rename", kill)
        with pytest.raises(Interrupted), opened(tmp_path / "out", BASIS) as space:
            space.finish(0)
    with opened(tmp_path / "out", BASIS) as space:
        assert space.done is None and space.resumed
        space.finish(0)


def test_somebody_elses_output_is_refused_beside_a_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(tmp_path / "out", monkeypatch)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("theirs")
    check(tmp_path / "out")  # told under the lock
    with pytest.raises(UsageError, match="exists already"), opened(tmp_path / "out", BASIS):
        pass
    assert (tmp_path / "out" / "theirs").read_text() == "theirs"


def test_what_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "full", "link"):
        for attempt in (check, lambda output: opened(output, BASIS).__enter__()):
            with pytest.raises(UsageError, match="exists already") as caught:
                attempt(tmp_path / name)
            assert caught.value.where == str(tmp_path / name)
            assert "-o" in (caught.value.hint or "")
    check(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "link"]


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with opened(tmp_path / "out", BASIS) as space:
        (space.directory / "file").write_text("content")
        space.finish(0)
    assert (tmp_path / "out" / "file").exists()


def test_somebody_else_was_faster(tmp_path: Path) -> None:
    with (
        pytest.raises(CompressError, match="cannot put the result in its place"),
        opened(tmp_path / "out", BASIS) as space,
    ):
        (space.directory / "file").write_text("content")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")
        space.finish(0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(CompressError, match="cannot write there") as caught, opened(tmp_path / "file" / "out", BASIS):
        pass
    assert caught.value.where == str(tmp_path / "file")
    with pytest.raises(CompressError, match="cannot write there"), opened(tmp_path / "a" / ("x" * 300), BASIS):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("how", ["link", "file", "another's directory"])
def test_a_place_that_is_not_ours_is_left_alone(tmp_path: Path, how: str) -> None:
    root, home = tmp_path / ".out.partial", tmp_path / "home"
    home.mkdir()
    (home / "file").write_text("mine")
    if how == "link":
        root.symlink_to(home)
    elif how == "file":
        root.write_text("mine")
    else:
        home.rename(root)
    with pytest.raises(UsageError, match="something is in the place"), opened(tmp_path / "out", BASIS):
        pass
    assert ((root if how != "file" else home) / "file").read_text() == "mine"


@pytest.mark.parametrize("named", ["home", "compress-export-link"])
def test_a_journal_cannot_have_other_directories_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "compress-export-link").symlink_to(tmp_path / "home")
    (tmp_path / "home" / "file").write_text("mine")
    root = killed(tmp_path / "out", monkeypatch)
    with (root / "journal").open("a") as stream:
        stream.write(json.dumps({"name": "scratch", "value": str(tmp_path / named)}) + "\n")
    with opened(tmp_path / "out", BASIS) as space:
        space.finish(0)
    assert (tmp_path / "home" / "file").read_text() == "mine"


def test_a_given_place_for_temporary_files_is_emptied_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    killed(tmp_path / "out", monkeypatch)
    (left,) = (tmp_path / "temporary").iterdir()
    assert (left / "litter").exists()
    with opened(tmp_path / "out", BASIS) as space:
        assert temporary.place() == space.scratch and space.scratch.parent == tmp_path / "temporary"
        assert not left.exists()
        space.finish(0)
    assert not list((tmp_path / "temporary").iterdir())


# ------------------------------------------------------------------------------------------------------------- the lock


def test_two_runs_exclude_each_other_and_the_second_is_told_who(tmp_path: Path) -> None:
    with opened(tmp_path / "out", BASIS) as space:
        with pytest.raises(LockedError, match=f"another run is writing to it: process {os.getpid()} on") as caught:
            opened(tmp_path / "out", BASIS).__enter__()
        assert caught.value.exit_code == 1 and caught.value.where == str(tmp_path / "out")
        (space.directory / "file").write_text("mine still")
        space.finish(0)
    assert (tmp_path / "out" / "file").read_text() == "mine still"


def test_the_kernel_lets_go_of_a_killed_holders_lock(tmp_path: Path) -> None:
    path = tmp_path / "room" / "lock"
    code = "import sys, pathlib; from compress.lock import held; place = pathlib.Path(sys.argv[1])\n"
    code += "with held(place, what='x', where=place): print(1, flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    with pytest.raises(LockedError, match=f"process {process.pid} on"), held(path, what="x", where=path):
        pass
    process.kill()
    process.communicate()
    with held(path, what="x", where=path) as earlier:
        assert earlier is not None and earlier["pid"] == process.pid


def test_a_damaged_lock_file_is_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    for content in (b"\xff", b"[1]", b"", b"[" * 4096):
        path.write_bytes(content)
        with held(path, what="x", where=path) as earlier:
            assert earlier is None
            assert json.loads(path.read_bytes())["pid"] == os.getpid()


def test_an_artifact_is_validated_by_one_at_a_time_and_its_litter_goes(tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    (artifact / ".piece.onnx").write_text("a killed run's")
    (artifact / ".report.json.partial").write_text("a killed run's")
    with alone(artifact):
        (temporary.place() / "large").write_text("litter")
        with pytest.raises(LockedError, match="another run is validating it"), alone(artifact):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"] and not list(artifact.iterdir())
