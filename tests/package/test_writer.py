"""The data file: claims its space, takes arrays anywhere, and says so when the disk is full."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import ResourceError
from compress.package.writer import DataFile, require_space

_Usage = namedtuple("_Usage", "total used free")


def full(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_arrays_land_at_their_offsets_and_gaps_are_zero(tmp_path: Path) -> None:
    path = tmp_path / "data"
    with DataFile(path, 40) as data:
        data.write(32, np.arange(4, dtype=np.uint16))
        data.write(4, np.array([[1.5, -2.0]], np.float32))
        data.write(0, np.array(7, np.int8))
    expected = bytearray(40)
    expected[0] = 7
    expected[4:12] = np.array([1.5, -2.0], "<f4").tobytes()
    expected[32:40] = bytes([0, 0, 1, 0, 2, 0, 3, 0])
    assert path.read_bytes() == expected


def test_arrays_that_are_not_contiguous_are_written_in_order(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    with DataFile(tmp_path / "data", 12) as data:
        data.write(0, array.T)
    assert (tmp_path / "data").read_bytes() == array.T.tobytes()


def test_empty_files_and_arrays(tmp_path: Path) -> None:
    with DataFile(tmp_path / "data", 0) as data:
        data.write(0, np.zeros((0, 4), np.float32))
    assert (tmp_path / "data").stat().st_size == 0


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, view, offset: original(file, view[:3], offset))
    array = np.arange(50, dtype=np.uint8)
    with DataFile(tmp_path / "data", 50) as data:
        data.write(0, array)
    assert (tmp_path / "data").read_bytes() == array.tobytes()


def test_threads_may_write_at_once(tmp_path: Path) -> None:
    blocks = [np.full(997, index, np.uint8) for index in range(64)]
    with DataFile(tmp_path / "data", 64 * 997) as data, ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda index: data.write(index * 997, blocks[index]), reversed(range(64))))
    assert (tmp_path / "data").read_bytes() == np.concatenate(blocks).tobytes()


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("mine")
    with pytest.raises(FileExistsError):
        DataFile(tmp_path / "data", 8)
    assert (tmp_path / "data").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_at_the_start_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ResourceError, match="not enough disk space") as caught:
        DataFile(tmp_path / "data", 1 << 30)
    assert caught.value.where == str(tmp_path)
    assert "-o" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_keep_their_name_and_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="input/output"):
        DataFile(tmp_path / "data", 8)
    assert list(tmp_path.iterdir()) == []


def test_no_space_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that promises more than it has."""
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceError, match="no space is left on the disk"), DataFile(tmp_path / "data", 64) as data:
        data.write(0, np.zeros(8, np.uint8))


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    data = DataFile(tmp_path / "data", 8)
    data.close()
    data.close()


def test_space_is_required_of_the_nearest_directory_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> _Usage:
        asked.append(Path(path))
        return _Usage(10**12, 0, 10**9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    require_space(tmp_path / "not" / "there" / "yet", 900_000_000)
    assert asked == [tmp_path]
    with pytest.raises(ResourceError, match=r"1,067 MB needed, 1,000 MB free"):
        require_space(tmp_path / "not", 10**9)
