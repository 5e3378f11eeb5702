"""Progress on standard error: bars with rates and time left on a terminal, nothing where there is none.

A stage that is done leaves one line on a terminal's standard error; ``--json`` and pipes stay quiet.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress

_KIB = 1024


class Meter(Protocol):
    """What a stage calls as it goes: how much is done, of how much (weights, or a fraction of 1)."""

    def __call__(self, done: float, total: float) -> None:
        """Take note of progress."""
        ...


@dataclass(frozen=True)
class Stage:
    """A finished stage; ``peak_rss_bytes`` is the largest single process so far, by the kernel's own accounting."""

    name: str
    seconds: float
    peak_rss_bytes: int


@dataclass
class Stages:
    """Times stages, shows them when asked to, and keeps the record for the report."""

    show: bool = False
    done: list[Stage] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, *, unit: str = "") -> Iterator[Meter]:
        """Run a stage; the body may call the meter it gets. ``unit`` names what is counted (``weights``)."""
        start = time.perf_counter()
        if not self.show:
            yield lambda done, total: None
        else:
            with _bar(name, unit) as meter:
                yield meter
        seconds = time.perf_counter() - start
        self.done.append(Stage(name, round(seconds, 3), peak_rss_bytes()))

    @contextmanager
    def follow(self) -> Iterator[Callable[[str, float], None]]:
        """Show steps that name themselves: the body calls what it gets with a step's name and the fraction done."""
        if not self.show:
            yield lambda name, fraction: None
            return
        with _progress() as progress:
            tasks: dict[str, Any] = {}

            def report(name: str, fraction: float) -> None:
                if name not in tasks:
                    tasks[name] = progress.add_task(name, total=1.0, rate="")
                progress.update(tasks[name], completed=fraction)

            yield report

    def add(self, name: str, seconds: float, peak: int) -> None:
        """Record a stage that measured itself, in a worker for instance."""
        self.done.append(Stage(name, round(seconds, 3), peak))


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=False)


@contextmanager
def _bar(name: str, unit: str) -> Iterator[Meter]:
    with _progress() as progress:
        task = progress.add_task(name, total=None, rate="")
        start = time.perf_counter()

        def meter(done: float, total: float) -> None:
            elapsed = time.perf_counter() - start
            rate = f"{done / elapsed / 1e6:.1f}M {unit}/s" if unit and elapsed > 0 else ""
            progress.update(task, completed=done, total=total, rate=rate)

        yield meter
        total = progress.tasks[0].total or 1
        progress.update(task, completed=total, total=total)


def peak_rss_bytes() -> int:
    """Return the peak resident set of this process or of its largest finished child, in bytes."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else _KIB)
    return max(_own_peak(), children)


def _own_peak() -> int:
    # On Linux ru_maxrss starts with the peak of the process that started this one; VmHWM is this program's own.
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return own * (1 if sys.platform == "darwin" else _KIB)
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * _KIB
