"""Limits of computing time and memory that a process sets for itself before it reads what somebody else made.

Standard library only. Where the platform has no ``resource`` (Windows) the parent's clock is the only limit.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

resource: Any
try:
    import resource
except ImportError:
    resource = None


def limit(seconds: float, memory: int) -> None:
    """Let this process compute so much more, and have so much more address space; anew with every call.

    Beyond the time it ends by ``SIGXCPU``. Memory that is refused is a ``MemoryError`` in Python and mostly an abort in
    libraries. No core is written.

    Args:
        seconds: Processor seconds from now on, of all threads together.
        memory: Bytes of addresses beyond those that it has now.
    """
    if resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))


def address_space() -> int:
    """Return the bytes of addresses that this process has; a rough bound where the kernel does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 4 << 30
