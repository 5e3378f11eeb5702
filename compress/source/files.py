"""Reading hostile files: positioned reads, contained paths, bounded JSON, digests. Standard library and NumPy only."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from compress.errors import SourceError

DIGEST_CHUNK = 1 << 20
MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 32 << 20
MAX_JSON_DEPTH = 32


class RandomAccessFile:
    """A file read at given offsets, by ``pread`` where the platform has it, without touching a shared position.

    Not a memory map: mapped pages count in the process's peak resident memory, which is promised to stay small.

    Args:
        path: A regular file.
        label: The name an error message shows.

    Raises:
        SourceError: The file cannot be opened.
    """

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.path = path
        self.label = label or path.name
        try:
            # O_NONBLOCK: a named pipe in place of a model must not hang the command.
            flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
            descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise SourceError(f"cannot open the file: {error.strerror or error}", where=self.label) from error
        self._descriptor = descriptor
        # Contexts are optional for callers, so the descriptor is also closed when the object goes.
        self._finalizer = weakref.finalize(self, os.close, descriptor)
        self._lock = threading.Lock()
        self.size = os.fstat(descriptor).st_size

    def read_into(self, offset: int, target: memoryview, what: str) -> None:
        """Fill ``target`` (contiguous bytes) from ``offset``.

        Args:
            offset: Position in the file, bytes.
            target: Writable memory; all of it is filled.
            what: The tensor concerned, for the error message.

        Raises:
            SourceError: The file ends before, cannot be read, or is closed.
        """
        if not self._finalizer.alive:
            raise SourceError(f"the checkpoint is closed; {what} cannot be read", where=self.label)
        if target.nbytes == 0:
            return
        view = target.cast("B")
        done = 0
        while done < len(view):
            try:
                count = self._read_some(offset + done, view[done:])
            except OSError as error:
                raise SourceError(f"cannot read {what}: {error.strerror or error}", where=self.label) from error
            if count == 0:
                raise SourceError(
                    f"the file ends at byte {offset + done}, {len(view) - done} bytes short of {what}",
                    where=self.label,
                    hint="the file is truncated or changed while it was read: download or copy it again",
                )
            done += count

    def _read_some(self, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [view], offset)
        with self._lock:  # Windows has no positioned read
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            data = os.read(self._descriptor, min(len(view), DIGEST_CHUNK))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file; further reads raise :class:`SourceError`."""
        self._finalizer()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal, read in 1 MiB chunks.

    Raises:
        SourceError: The file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as stream:
            while chunk := stream.read(DIGEST_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise SourceError(f"cannot read the file: {error.strerror or error}", where=path.name) from error
    return digest.hexdigest()


def contained(directory: Path, name: str, *, named_by: str | None = None) -> Path:
    """Return ``directory / name`` after checking that it is a regular file inside ``directory``.

    Symbolic links may not lead out of the directory: a downloaded archive must not make the tool read, or copy into
    an artifact, a file of the user's. The one exception is the Hugging Face cache, whose snapshots are links into the
    ``blobs`` folder beside them.

    Args:
        directory: The model directory.
        name: A relative path with ``/`` separators.
        named_by: The file that names ``name``, for the error message.

    Raises:
        SourceError: ``name`` is absolute, has ``..``, leads outside, or is not a regular file.
    """
    where = f"{named_by} names {name!r}" if named_by else name
    parts = PurePosixPath(name).parts
    windows = PureWindowsPath(name)
    if not parts or ".." in parts or "\0" in name or "\\" in name or name.startswith("/") or windows.drive:
        raise SourceError(
            "a path leads outside the model's directory", where=where, hint="this file was tampered with: do not use it"
        )
    path = directory.joinpath(*parts)
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise SourceError(
            "a file of the model is missing", where=where, hint="download or copy the model again, all of its files"
        ) from error
    if not any(real.is_relative_to(root) for root in _roots(directory)):
        raise SourceError(
            "a symbolic link leads outside the model's directory",
            where=where,
            hint="copy the file into the directory, or give the directory that the link points into",
        )
    if not real.is_file():
        raise SourceError("not a regular file", where=where)
    return path


def _roots(directory: Path) -> list[Path]:
    real = directory.resolve()
    roots = [real]
    repository = real.parent.parent
    if real.parent.name == "snapshots" and repository.name.startswith("models--"):
        # The second one is the store that huggingface_hub shares between repositories.
        roots += [repository / "blobs", repository.parent / "blobs"]
    return roots


def read_json_object(path: Path, limit: int, label: str | None = None) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Args:
        path: The file.
        limit: The most bytes accepted.
        label: The name an error message shows.

    Raises:
        SourceError: The file is too large, not JSON, not an object, or nested too deeply.
    """
    label = label or path.name
    value = _read_json(path, limit, label)
    if not isinstance(value, dict):
        raise SourceError(f"the JSON holds a {type(value).__name__}, not an object", where=label)
    return value


def read_json_list(path: Path, limit: int, label: str | None = None) -> list[Any]:
    """Read a JSON file that must hold a list; otherwise as :func:`read_json_object`."""
    label = label or path.name
    value = _read_json(path, limit, label)
    if not isinstance(value, list):
        raise SourceError(f"the JSON holds a {type(value).__name__}, not a list", where=label)
    return value


def _read_json(path: Path, limit: int, label: str) -> Any:
    try:
        with path.open("rb") as stream:
            text = stream.read(limit + 1)
    except OSError as error:
        raise SourceError(f"cannot read the file: {error.strerror or error}", where=label) from error
    if len(text) > limit:
        raise SourceError(f"the file is larger than {limit >> 20} MiB, no such file is", where=label)
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise SourceError("the JSON is nested too deeply", where=label) from error
    except ValueError as error:
        raise SourceError(
            f"the file is not JSON: {error}", where=label, hint="download or copy the model again"
        ) from error
    if isinstance(value, dict | list) and _depth_exceeds(value, MAX_JSON_DEPTH):
        raise SourceError("the JSON is nested too deeply", where=label)
    return value


def _depth_exceeds(value: Any, limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit):
        children: list[Any] = []
        for item in level:
            nested: Iterable[Any] = item.values() if isinstance(item, dict) else item
            children += [child for child in nested if isinstance(child, dict | list)]
        if not children:
            return False
        level = children
    return True
