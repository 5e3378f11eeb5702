"""A journal: what is finished, one JSON document a line, each on the disk before the work goes on.

A line that a kill or a full disk tore off is the last one, and does not count. The first line is the basis: everything
that the results depend on. With another basis nothing of the journal counts, so that one model's results are never
another's.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.package.writer import disk_full, is_full

FORMAT = 1
#: More is no journal of ours.
MAX_BYTES = 256 << 20
_BASIS = "basis"


class Journal:
    """Entries by name, in the order in which they came; safe from several threads.

    Args:
        path: The file; it need not exist.
        basis: What results depend on, JSON-able.

    Attributes:
        fresh: Whether nothing that was there counts.
        differs: The keys of the basis in which the file that was there differs; it counts as absent then.
    """

    def __init__(self, path: Path, basis: Mapping[str, Any]) -> None:
        self._path, self._lock = path, threading.Lock()
        self._basis: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **basis}))
        self._entries, length, found = _read(path)
        before = {} if found is None else found
        self.differs = tuple(
            key for key in sorted(self._basis.keys() | before.keys()) if self._basis.get(key) != before.get(key)
        )
        self.fresh = found is None or bool(self.differs)
        if self.fresh:
            self._entries, length = [], 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._file, length)
        if not length:
            self._append(_BASIS, self._basis)
        if found is None:
            self.differs = ()

    def put(self, name: str, value: Any) -> None:
        """Add an entry; it is on the disk when this returns.

        Raises:
            ResourceError: The disk is full.
            OSError: It refuses for another reason.
        """
        with self._lock:
            self._append(name, value)
            self._entries.append((name, json.loads(json.dumps(value))))

    def get(self, name: str) -> Any | None:
        """Return the last entry of a name, ``None`` where there is none."""
        return next((value for known, value in reversed(self._entries) if known == name), None)

    def all(self, name: str) -> list[Any]:
        """Return all entries of a name, the oldest first."""
        return [value for known, value in self._entries if known == name]

    def names(self) -> set[str]:
        """Return the names that have entries."""
        return {name for name, _ in self._entries}

    def forget_from(self, name: str | None = None) -> None:
        """Forget the first entry of a name and all that follow it, or every entry; the basis stays."""
        with self._lock:
            names = [known for known, _ in self._entries]
            stay = self._entries[: names.index(name) if name in names else 0 if name is None else len(names)]
            os.ftruncate(self._file, 0)
            self._append(_BASIS, self._basis)
            for known, value in stay:
                self._append(known, value)
            self._entries = stay

    def close(self) -> None:
        """Close the file."""
        with self._lock:  # another thread's entry must not go to a file that got the same number
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    def _append(self, name: str, value: Any) -> None:
        line = json.dumps({"name": name, "value": value}, allow_nan=False).encode() + b"\n"
        end = os.lseek(self._file, 0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], end + written)
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, end)
            if is_full(error):
                raise disk_full(self._path) from None
            raise


def _read(path: Path) -> tuple[list[tuple[str, Any]], int, dict[str, Any] | None]:
    """Return entries, the bytes that hold them, and the basis; ``None`` where there is no journal."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CompressError("this is no journal: too large", where=str(path), hint="--fresh starts over")
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0, None
    entries: list[tuple[str, Any]] = []
    length = 0
    for line in content.splitlines(keepends=True):
        try:
            document: Any = json.loads(line) if line.endswith(b"\n") else None
            entries.append((str(document["name"]), document["value"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            break  # torn off: nothing behind it counts
        length += len(line)
    if not entries or entries[0][0] != _BASIS or not isinstance(entries[0][1], dict):
        return [], 0, None
    return entries[1:], length, entries[0][1]
