"""What streaming wants of the C allocator: buffers of a few megabytes, made and dropped for every chunk.

By default glibc gives each thread its own arena and returns such buffers to the kernel, which has to clear the
pages again for the next chunk. One arena that keeps them took the Phi-3 export from 81 to 60 s (docs/benchmarks.md).
Elsewhere than on glibc nothing is done: it is a matter of time, not of bytes.
"""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEEP_BYTES = 256 << 20


def keep_buffers(largest: int = _KEEP_BYTES) -> bool:
    """Let the process keep buffers of up to ``largest`` bytes; returns whether the allocator took the setting."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, largest), (_M_TRIM_THRESHOLD, largest))
    return all(mallopt(name, value) == 1 for name, value in settings)


def return_buffers(smallest: int = 1 << 20) -> bool:
    """Let the process return buffers from ``smallest`` bytes on as soon as they are free; returns whether it will.

    By default glibc keeps what is below 32 MB for the next use, in pieces that the next use may not fit.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(name, smallest) == 1 for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def give_back() -> bool:
    """Return to the kernel what was kept and is free; returns whether there was anything."""
    if sys.platform != "linux":
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))
