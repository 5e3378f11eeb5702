"""One run at a time on one place: a lock that the kernel lets go of when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress.errors import CompressError

_MAX_BYTES = 4096
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class LockedError(CompressError):
    """Another run holds the lock."""


@contextmanager
def held(path: Path, *, what: str, where: Path | str) -> Iterator[Mapping[str, Any] | None]:
    """Hold a lock file for as long as the body runs.

    Args:
        path: The lock file; its directory is made where it is missing.
        what: What nobody else may do meanwhile, for the message (``"writing to it"``).
        where: To what, for the message.

    Yields:
        What the last holder wrote, where it ended without removing the file: ``pid``, ``host`` and ``started``.

    Raises:
        LockedError: Somebody else holds it: who, and since when.
        CompressError: The file system has no locks.
        OSError: The place cannot be written.
    """
    descriptor = _acquire(path, what, where)
    try:
        before = _read(descriptor)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "started": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(me).encode(), 0)
        yield before
    finally:
        os.close(descriptor)


@contextmanager
def held_directory(path: Path, *, what: str) -> Iterator[None]:
    """Hold a directory itself, without a file in it or beside it, for as long as the body runs.

    Raises:
        LockedError: Somebody else holds it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                raise _no_locks(path, error) from None
            raise LockedError(f"another run is {what}", where=str(path), hint="wait for it") from None
        yield
    finally:
        os.close(descriptor)


def holder(described: Mapping[str, Any]) -> str:
    """Return who a lock's content names: ``process 12 on host, started 2026-11-27T10:00:00Z``."""
    return f"process {described.get('pid')} on {described.get('host')}, started {described.get('started')}"


def _acquire(path: Path, what: str, where: Path | str) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            continue  # its holder removed the directory between the two lines
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(descriptor).st_ino == path.stat().st_ino:
                    return descriptor
        except OSError as error:
            other = _read(descriptor)
            os.close(descriptor)
            if error.errno not in _HELD:
                raise _no_locks(path, error) from None
            who = f": {holder(other)}" if other else ""
            raise LockedError(
                f"another run is {what}{who}", where=str(where), hint="wait for it, or choose another place"
            ) from None
        os.close(descriptor)  # the holder removed the file before it let go: this is not the one that others see


def _no_locks(path: Path, error: OSError) -> CompressError:
    return CompressError(
        f"the file system cannot lock files: {error.strerror}", where=str(path), hint="choose another place with -o"
    )


def _read(descriptor: int) -> dict[str, Any] | None:
    try:
        found = json.loads(os.pread(descriptor, _MAX_BYTES, 0))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
