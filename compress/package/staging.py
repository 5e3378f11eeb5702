"""Files appear whole or not at all: written beside, flushed, renamed. Directories: :mod:`compress.workspace`."""

from __future__ import annotations

import os
from pathlib import Path

from compress.errors import UsageError


def check_output(output: Path) -> None:
    """Refuse an output directory that already holds something.

    Raises:
        UsageError: It exists and is not an empty directory.
    """
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UsageError("the output exists already", where=str(output), hint="choose another -o, or remove it first")


def write_file(path: Path, content: str | bytes) -> None:
    """Replace a file whole: write beside, fsync, rename."""
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.partial")
    try:
        with beside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
