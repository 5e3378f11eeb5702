"""How fast this machine reads memory, and what a decoded token reads of an ONNX decoder.

A token that is decoded alone reads every weight once, and little else is large: bytes a token times tokens a second is
the rate at which a runtime gets them, and the machine's own rate bounds it - unless the weights fit into the last
level's cache, which serves faster.

What is counted is what lies in the file. A runtime may read more: ONNX Runtime widens the scales of MatMulNBits to
float32 when it loads (stored at 8 or 16 bits, that is up to 12 % more at blocks of 32), llama.cpp packs Q4_0 anew with
sums for AMX. Activations and the key/value cache are not counted, which at a few hundred tokens are percents.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

#: Several times any last level's cache that a machine with these prices has.
BUFFER = 2 << 30
_LOOKUPS = {"Gather", "GatherBlockQuantized"}
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def read_bandwidth(threads: int, size: int = BUFFER, passes: int = 8) -> float:
    """Return the best rate, in bytes a second, at which ``threads`` threads read ``size`` bytes of memory.

    Every thread has its own contiguous part and looks for the largest integer in it: numpy does so without the
    interpreter's lock, eight bytes a lane, faster than memory delivers.
    """
    values = np.ones(size // 8, np.int64)
    parts = np.array_split(values, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, values.nbytes / (time.perf_counter() - started))
    return best


def last_level_cache() -> int | None:
    """Return the bytes of the last level's cache, ``None`` where the kernel does not say."""
    text = _CACHE.read_text().strip() if _CACHE.is_file() else ""
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:])
    return int(text[:-1]) * unit if unit and text[:-1].isdecimal() else None


def onnx_token_bytes(model: Path) -> int:
    """Return the bytes of weights that a decoded token reads: all but tables that rows are only looked up in.

    Rows of such a table, and of the cosines and sines of positions, are a few kilobytes.
    """
    import onnx_ir as ir

    from compress.graph.contents import weights

    read = (
        weight
        for weight in weights(ir.load(str(model)))
        if weight.kind != "constant" and not set(weight.operators) <= _LOOKUPS
    )
    return sum(weight.bytes for weight in read)
