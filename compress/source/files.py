"""Reading hostile files: positioned reads, contained paths, bounded JSON, digests. Standard library and NumPy only."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import stat
import threading
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from compress.errors import SourceError

DIGEST_CHUNK = 1 << 20
MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 32 << 20
MAX_JSON_DEPTH = 32
#: transformers writes 10**30 for a tokenizer without a limit.
MAX_DIGITS = 64


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
        descriptor = _open(path, self.label)
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


def _open(path: Path, label: str) -> int:
    """Return a descriptor of a regular file: a named pipe in its place would hang the command, a device has no end."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise SourceError(f"cannot open the file: {reason or error}", where=label) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SourceError("not a regular file", where=label, hint="give a file, no directory, pipe or device")
    return descriptor


def open_regular(path: Path, label: str | None = None) -> io.FileIO:
    """Open a file for reading, unbuffered, after checking that it is a regular one.

    Raises:
        SourceError: It cannot be opened, or is a directory, a pipe or a device.
    """
    return io.FileIO(_open(path, label or path.name), "rb")


def check_regular(path: Path, limit: int, label: str | None = None) -> int:
    """Return the size of a regular file that another library is going to open, bytes.

    Raises:
        SourceError: It cannot be opened, is not a regular file, or has more than ``limit`` bytes.
    """
    with open_regular(path, label) as stream:
        size = os.fstat(stream.fileno()).st_size
    if size > limit:
        raise _too_large(limit, label or path.name)
    return size


def read_bytes(path: Path, limit: int, label: str | None = None) -> bytes:
    """Return all of a regular file.

    Raises:
        SourceError: It cannot be read, is not a regular file, or has more than ``limit`` bytes.
    """
    label = label or path.name
    with open_regular(path, label) as stream:
        if os.fstat(stream.fileno()).st_size > limit:
            raise _too_large(limit, label)
        try:
            content = b"".join(iter(lambda: stream.read(limit + 1), b""))
        except OSError as error:
            raise SourceError(f"cannot read the file: {error.strerror or error}", where=label) from error
    if len(content) > limit:  # it grew meanwhile
        raise _too_large(limit, label)
    return content


def _too_large(limit: int, label: str) -> SourceError:
    return SourceError(f"the file is larger than {limit >> 20} MiB, no such file is", where=label)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal, read in 1 MiB chunks.

    Raises:
        SourceError: The file cannot be read, or is not a regular one.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path) as stream:
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
    except (OSError, RuntimeError, ValueError) as error:
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
    return parse_json(read_bytes(path, limit, label), label)


def parse_json(content: bytes, label: str) -> Any:
    """Return what a JSON document says, if it says one thing to every reader.

    Refused beside what is no JSON: an object with a key twice (which of them counts depends on the reader), ``NaN`` and
    ``Infinity`` (a number that overflows is one), half of a surrogate pair (no text can be written with it), and more
    than :data:`MAX_JSON_DEPTH` levels.

    Raises:
        SourceError: It is refused.
    """
    hint = "download or copy the model again"
    try:
        value = json.loads(
            content.decode("utf-8-sig"),  # given bytes, the library lets halves of surrogate pairs pass
            object_pairs_hook=unique_keys,
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_integer,
        )
    except RecursionError as error:
        raise SourceError("the JSON is nested too deeply", where=label) from error
    except ValueError as error:
        raise SourceError(f"the file is not JSON: {error}", where=label, hint=hint) from error
    if isinstance(value, dict | list) and _depth_exceeds(value, MAX_JSON_DEPTH):
        raise SourceError("the JSON is nested too deeply", where=label)
    if b"\\ud" in content.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise SourceError("the JSON holds half of a surrogate pair", where=label, hint=hint) from error
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's keys and values: an ``object_pairs_hook`` that refuses a key that is there twice.

    Raises:
        ValueError: One is.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r:.80} is given twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text:.40} is larger than any number")
    return number


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


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
