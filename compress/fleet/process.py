"""A job's process: ``compress export`` in a group of its own, its log in a file, ended with whoever started it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import compress
from compress.errors import EXIT_INTERRUPTED

#: How long a job that was told to end may clean up behind itself.
GRACE_SECONDS = 10.0
#: What is kept of a log that travels.
LOG_BYTES = 256 << 10
_ERROR_LINES = 3


@dataclass(frozen=True)
class Ended:
    """How a job's process ended: its exit code (negative for a signal's number), its time and its error's lines."""

    code: int
    seconds: float | None
    error: str | None
    machine: str


class Running:
    """A started job."""

    def __init__(self, launcher: Sequence[str], words: Sequence[str], log: Path, attempt: int, threads: int) -> None:
        """Start it.

        Args:
            launcher: What Python runs ``compress`` with; it is given this process's number first.
            words: The words after ``compress``.
            log: What it prints to standard error is appended here.
            attempt: Counted from 1, for the log.
            threads: Threads that libraries may use.
        """
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            stream.write(f"$ {shlex.join(['compress', *words])}  # attempt {attempt}\n".encode())
            stream.flush()
            self._begin = log.stat().st_size
            self._started = time.monotonic()
            # Its one JSON document says no more than the artifact's own files do.
            self._process = subprocess.Popen(
                [sys.executable, *launcher, str(os.getpid()), *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
                env=_variables(threads),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Return the number of its process, which is its group's."""
        return self._process.pid

    def poll(self) -> Ended | None:
        """Return how it ended, ``None`` while it runs."""
        code = self._process.poll()
        return None if code is None else self._ended(code)

    def wait(self) -> Ended:
        """Wait for its end."""
        return self._ended(self._process.wait())

    def terminate(self) -> None:
        """Tell it to end, and to clean up."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it and what it started; harmless when it has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ended(self, code: int) -> Ended:
        seconds = round(time.monotonic() - self._started, 3)
        return Ended(code, seconds, None if code == 0 else self._error(code), socket.gethostname())

    def _error(self, code: int) -> str | None:
        """Return the error that its log ends with."""
        lines = tail(self._log, self._begin).splitlines()
        at = next((at for at in range(len(lines) - 1, -1, -1) if lines[at].startswith("error: ")), None)
        if at is not None:
            return "\n".join(lines[at : at + _ERROR_LINES]).removeprefix("error: ")
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
            return f"ended by {name}" + (": out of memory, or somebody killed it" if name == "SIGKILL" else "")
        if code == EXIT_INTERRUPTED:
            return "interrupted"
        return None if code in (3, 4) else f"ended with code {code} and no error in its log"


def end_all(running: Sequence[Running]) -> None:
    """End jobs: told first, killed when they take longer than :data:`GRACE_SECONDS`."""
    for job in running:
        job.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(job.poll() is None for job in running):
        time.sleep(0.05)
    for job in running:
        job.kill()


def tail(log: Path, begin: int = 0) -> str:
    """Return the end of a log, at most :data:`LOG_BYTES`, nothing before ``begin``."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(begin, log.stat().st_size - LOG_BYTES))
            return stream.read(LOG_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _variables(threads: int) -> Mapping[str, str]:
    """Return a job's environment variables: this very package first, and as many threads as it may use."""
    root = str(Path(compress.__file__).resolve().parent.parent)
    inherited = os.environ.get("PYTHONPATH")
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    path = f"{root}{os.pathsep}{inherited}" if inherited else root
    return {**os.environ, **counts, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
