"""An output directory appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from compress.errors import CompressError, UsageError
from compress.package.staging import check_output, staged, write_file


class Interrupted(BaseException):
    """Like Ctrl-C: not an Exception."""


def test_success_puts_everything_in_its_place(tmp_path: Path) -> None:
    with staged(tmp_path / "a" / "out") as directory:
        (directory / "file").write_text("content")
        (directory / "sub").mkdir()
        (directory / "sub" / "other").write_text("more")
        assert not (tmp_path / "a" / "out").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert (tmp_path / "a" / "out" / "sub" / "other").read_text() == "more"
    assert (tmp_path / "a" / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, Interrupted])
def test_any_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    (tmp_path / "neighbour").mkdir()
    with pytest.raises(failure), staged(tmp_path / "a" / "b" / "out") as directory:
        (directory / "file").write_text("content")
        raise failure
    assert [path.name for path in tmp_path.iterdir()] == ["neighbour"]


def test_a_failure_keeps_directories_that_were_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="no"), staged(tmp_path / "a" / "b" / "out"):
        raise ValueError("no")
    assert (tmp_path / "a").is_dir() and not list((tmp_path / "a").iterdir())


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out")
    with staged(tmp_path / "out") as directory:
        (directory / "file").write_text("content")
    assert (tmp_path / "out" / "file").exists()


def test_what_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "full", "link"):
        with pytest.raises(UsageError, match="exists already") as caught:
            check_output(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)
        assert "-o" in (caught.value.hint or "")
    check_output(tmp_path / "new")


def test_somebody_else_was_faster(tmp_path: Path) -> None:
    with (
        pytest.raises(CompressError, match="cannot put the result in its place"),
        staged(tmp_path / "out") as directory,
    ):
        (directory / "file").write_text("content")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_a_failed_rename_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CompressError, match="Permission denied"), staged(tmp_path / "a" / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(CompressError, match="cannot write there") as caught, staged(tmp_path / "file" / "out"):
        pass
    assert caught.value.where == str(tmp_path / "file")
    with pytest.raises(CompressError, match="cannot write there"), staged(tmp_path / "a" / ("x" * 300)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_write_file_replaces_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_file(path, "old")
    write_file(path, "new \N{SNOWMAN}")
    assert path.read_text(encoding="utf-8") == "new \N{SNOWMAN}"

    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_file(path, "newer")
    assert path.read_text(encoding="utf-8") == "new \N{SNOWMAN}"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
