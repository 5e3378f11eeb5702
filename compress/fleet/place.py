"""Where a sweep's artifacts lie - a directory, or a file system behind a URL - and where it keeps its journal."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from compress.environments import cache_directory
from compress.errors import CompressError, UsageError
from compress.fleet import outcome
from compress.fleet.model import Outcome
from compress.fleet.store import Store, is_url
from compress.package import manifest


class Place:
    """A sweep's output.

    Attributes:
        output: The directory or URL, as it was given.
        desk: The local directory of journal, logs and pages: the output itself, or of a URL one in the cache.
        store: What is behind a URL; ``None`` of a directory.
    """

    def __init__(self, output: str) -> None:
        """Connect to it; nothing is made yet.

        Raises:
            UsageError: It is no directory, or no URL that can be written to.
        """
        self.output = output
        self.store = Store(output) if is_url(output) else None
        if self.store is None:
            self.desk = self._work = Path(output).absolute()
            if self.desk.exists() and not self.desk.is_dir():
                raise UsageError("the output is not a directory", where=output, hint="choose another place with -o")
        else:
            name = hashlib.sha256(self.store.url.encode()).hexdigest()[:16]
            self.desk = cache_directory() / "sweeps" / name
            self._work = self.desk / "artifacts"

    def directory(self, name: str) -> Path:
        """Return where a job makes its artifact."""
        return self._work / name

    def log(self, name: str) -> Path:
        """Return a job's log."""
        return self.desk / "logs" / f"{name}.log"

    def made(self, name: str) -> bool:
        """Return whether an artifact was made that has not been settled yet."""
        return (self.directory(name) / manifest.NAME).is_file()

    def settle(self, name: str) -> Outcome:
        """Return what a job left, after its artifact was brought to where it belongs.

        Raises:
            CompressError: The artifact is damaged, or cannot be brought there; it stays where it was made.
        """
        directory = self.directory(name)
        found = outcome.read(directory)
        if not outcome.still_there(directory, found):
            raise CompressError(
                "the artifact is not what its manifest says", where=str(directory), hint=f"compress verify {directory}"
            )
        if self.store is not None:
            self.store.upload(directory, name)
            shutil.rmtree(directory)
        return found

    def still_there(self, name: str, expected: Outcome) -> bool:
        """Return whether a settled artifact is the recorded one.

        Raises:
            CompressError: The store does not answer.
        """
        if self.store is not None:
            return self.store.still_there(name, expected)
        return outcome.still_there(self.directory(name), expected)

    def occupied(self, name: str) -> bool:
        """Return whether something is where a job's artifact is to be.

        Raises:
            CompressError: The store does not answer.
        """
        directory = self.directory(name)
        if directory.is_symlink() or (directory.exists() and (not directory.is_dir() or any(directory.iterdir()))):
            return True
        return self.store is not None and self.store.holds(name)

    def remove(self, name: str) -> None:
        """Remove a job's artifact; what is no artifact is left alone.

        Raises:
            CompressError: It cannot be removed.
        """
        directory = self.directory(name)
        if self.made(name) and not directory.is_symlink():
            shutil.rmtree(directory)
        if self.store is not None and self.store.holds(name):
            self.store.remove(name)
