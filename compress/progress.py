"""Progress on standard error: bars with rates and time left on a terminal, nothing where there is none.

A stage that is done leaves one line on a terminal's standard error; ``--json`` and pipes stay quiet.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

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

    def add(self, name: str, seconds: float, peak: int) -> None:
        """Record a stage that measured itself, in a worker for instance."""
        self.done.append(Stage(name, round(seconds, 3), peak))


@contextmanager
def _bar(name: str, unit: str) -> Iterator[Meter]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as progress:
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
    scale = 1 if sys.platform == "darwin" else _KIB
    return scale * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
