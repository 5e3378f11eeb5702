"""Environments for providers that need another onnxruntime than the user's: made once, in a cache folder.

Two builds of onnxruntime in one environment overwrite each other's files. So each such provider gets a virtual
environment of its own, named after what is pinned in it; the user's own environment is never touched. An environment
counts as installed when its stamp is there, which is written last: an interrupted installation is begun anew.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import ProviderError

_STAMP = "installed"
_TIMEOUT_SECONDS = 1800
_LOG_LINES = 3


def cache_directory() -> Path:
    """Return where environments are kept: ``COMPRESS_CACHE``, else ``compress`` in the user's cache directory."""
    own = os.environ.get("COMPRESS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress"


@dataclass(frozen=True)
class Environment:
    """A virtual environment of this Python's version.

    Attributes:
        name: Whose it is.
        requirements: What pip installs, pinned.
    """

    name: str
    requirements: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Return its folder, whose name changes with the pins and the Python."""
        told = "\n".join((sys.version, *self.requirements))
        return cache_directory() / "environments" / f"{self.name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"

    @property
    def python(self) -> Path:
        """Return its interpreter."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def installed(self) -> bool:
        """Whether all of it is there."""
        return (self.folder / _STAMP).is_file() and self.python.exists()

    def install(self, say: Callable[[str], None]) -> None:
        """Make it, unless it is there.

        Raises:
            ProviderError: pip, or the disk, refuses.
        """
        if self.installed:
            say(f"{self.name}: already installed in {self.folder}")
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        say(f"{self.name}: making {self.folder}")
        run([sys.executable, "-m", "venv", str(self.folder)], what="the environment cannot be made")
        say(f"{self.name}: installing {', '.join(self.requirements)}")
        pip = [
            str(self.python),
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--quiet",
            "--only-binary=:all:",
        ]
        run([*pip, *self.requirements], what=f"pip cannot install {', '.join(self.requirements)}")
        (self.folder / _STAMP).write_text("\n".join(self.requirements) + "\n")


def run(command: Sequence[str], *, what: str, cwd: Path | None = None) -> None:
    """Run an installer's step.

    Raises:
        ProviderError: ``what``, with the last lines that the step printed.
    """
    with tempfile.TemporaryFile() as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=cwd, timeout=_TIMEOUT_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ProviderError(f"{what}: {error}", where=command[0]) from error
        if done.returncode:
            log.seek(0)
            lines = log.read().decode("utf-8", "replace").splitlines()
            raise ProviderError(what, where=command[0], hint="\n".join(lines[-_LOG_LINES:]) or None)
