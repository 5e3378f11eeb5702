"""Output directories appear whole or not at all: work happens in a hidden sibling that is renamed at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compress.errors import CompressError, UsageError


def check_output(output: Path) -> None:
    """Refuse an output directory that already holds something.

    Raises:
        UsageError: It exists and is not an empty directory.
    """
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UsageError("the output exists already", where=str(output), hint="choose another -o, or remove it first")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a directory beside ``output``; on success it takes ``output``'s place, on any failure it is removed.

    Raises:
        CompressError: The place cannot be written, or somebody else created the output meanwhile.
    """
    made = _missing_parents(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    except OSError as error:
        _remove_empty(made)
        raise CompressError(
            f"cannot write there: {error.strerror}", where=str(output.parent), hint="choose another place with -o"
        ) from None
    try:
        yield staging
        staging.chmod(0o755)
        for path in staging.rglob("*"):
            sync(path)
        sync(staging)
        try:
            os.rename(staging, output)  # noqa: PTH104 - must replace an empty directory and nothing else
        except OSError as error:
            raise CompressError(f"cannot put the result in its place: {error.strerror}", where=str(output)) from None
        sync(output.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(made)  # after a success the nearest one is not empty, and stays


def _missing_parents(path: Path) -> list[Path]:
    """Return the directories above ``path`` that do not exist yet, the nearest first."""
    return [parent for parent in path.absolute().parents if not parent.exists()]


def _remove_empty(directories: list[Path]) -> None:
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


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
