"""What finished steps of an export leave for a run that goes on from there: a value in the journal, and files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from compress.journal import Journal

#: Entries that say something and finish nothing: no reason to keep a workspace.
NOTES = frozenset({"scratch", "source", "digests", "layout"})


class Kept:
    """Values by name, and a file of each name where a value is not enough.

    A value says that a step is finished, so its file is written, whole and on the disk, before.

    Args:
        journal: Holds the values.
        directory: Holds the files.
    """

    def __init__(self, journal: Journal, directory: Path) -> None:
        self._journal, self._directory = journal, directory

    def value(self, name: str) -> Any | None:
        """Return what was kept last under a name, ``None`` where nothing was."""
        return self._journal.get(name)

    def values(self, name: str) -> list[Any]:
        """Return all that was kept under a name, the oldest first."""
        return self._journal.all(name)

    def keep(self, name: str, value: Any) -> None:
        """Keep a JSON-able value; it is on the disk when this returns."""
        self._journal.put(name, value)

    def file(self, name: str) -> Path:
        """Return where a name's file is, or will be."""
        return self._directory / name

    @contextmanager
    def new_file(self, name: str) -> Iterator[IO[bytes]]:
        """Give a stream to write a name's file; afterwards it is on the disk."""
        with self.file(name).open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())

    def forget_from(self, name: str) -> None:
        """Forget the first value of a name and all that came after it, and the files that no value is left of."""
        self._journal.forget_from(name)
        names = self._journal.names()
        for path in self._directory.iterdir():
            if path.is_file() and path.stem not in names:
                path.unlink()
