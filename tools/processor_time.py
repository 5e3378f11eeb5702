"""Who had the processors while something was measured: a figure is worth what other processes left of them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def busy_seconds() -> float:
    """Return the seconds that all processors have worked, or were taken by a hypervisor, since the start."""
    user, nice, system, _, _, irq, soft, stolen, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + soft + stolen) / _TICKS


def seconds_of(pids: Sequence[int]) -> float:
    """Return the seconds that processes have worked, all their threads together."""
    total = 0
    for pid in pids:
        # The name, which may hold spaces and brackets, ends at the last bracket.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


class Others:
    """The share of the processors' time, 0 to 1, that went to others than ``pids`` from its creation on."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = [*pids, os.getpid()]
        self._start = time.perf_counter(), busy_seconds(), seconds_of(self._pids)

    def share(self) -> float:
        """Return the share so far."""
        elapsed, busy, own = time.perf_counter(), busy_seconds(), seconds_of(self._pids)
        taken = (busy - self._start[1]) - (own - self._start[2])
        return max(0.0, taken / ((elapsed - self._start[0]) * (os.cpu_count() or 1)))
