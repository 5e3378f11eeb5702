"""Short-lived child processes of this package's own modules: they end with their parent, and leave nothing behind.

The standard library only: workers under other interpreters read this.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from compress import temporary
from compress.errors import EXIT_FAILED, ResourceError

_PARENT = "COMPRESS_PARENT"


def run_module(
    name: str, *arguments: str, timeout: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m name`` offline and wait for it; its temporary files go where this thread's go.

    Args:
        name: A module that calls :func:`follow_parent` first.
        arguments: Its arguments.
        timeout: Seconds.
        environment: Variables, over those of this process.

    Raises:
        subprocess.TimeoutExpired: It took longer, and was killed.
    """
    variables = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **(environment or {}),
        "TMPDIR": str(temporary.place()),
        _PARENT: str(os.getpid()),
    }
    return subprocess.run(
        [sys.executable, "-m", name, *arguments],
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
        check=False,
    )


def reason(log: str) -> str:
    """Return what ended a child: the last line of its log that is not indented, as a message's further lines are."""
    return next((line for line in reversed(log.splitlines()) if line and not line[0].isspace()), "")


def require_room(log: str, place: Path) -> None:
    """Tell a full disk from other failures of a child.

    Args:
        log: What it said on standard error.
        place: Where it was writing.

    Raises:
        ResourceError: It had no room.
    """
    if f"[Errno {errno.ENOSPC}]" in log or f"[Errno {errno.EDQUOT}]" in log:
        raise ResourceError(
            "no space is left on the disk", where=str(place), hint="free some space, or choose another place with -o"
        )


def follow_parent(parent: int | None = None) -> None:
    """Ask the kernel to end this process with its parent (Linux); leave at once if that is already gone.

    Args:
        parent: Its process id; by default what :func:`run_module` said, if it started this process.
    """
    if parent is None:
        told = os.environ.get(_PARENT)
        if told is None:
            return
        parent = int(told)
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise SystemExit(EXIT_FAILED)
