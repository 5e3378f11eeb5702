"""Temporary directories: inside the workspace of the export that needs them, else where the system wants them.

What a killed run leaves in ``/tmp`` nobody finds again; what it leaves in a workspace, the next run removes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import ParamSpec, TypeVar

_place: ContextVar[Path | None] = ContextVar("_place", default=None)
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


@contextmanager
def within(place: Path) -> Iterator[None]:
    """Let everything temporary that is made meanwhile, in this thread, lie in ``place``."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def place() -> Path:
    """Return where temporary files go now."""
    return _place.get() or Path(tempfile.gettempdir())


def directory(prefix: str) -> tempfile.TemporaryDirectory[str]:
    """Return a new temporary directory, removed at the end of its ``with``."""
    return tempfile.TemporaryDirectory(prefix=prefix, dir=_place.get())


def make(prefix: str) -> Path:
    """Return a new temporary directory that its caller removes."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=_place.get()))


def carried(work: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Return a function that uses this thread's place also in another thread: threads begin without one."""
    context = copy_context()

    def run(*arguments: _Parameters.args, **named: _Parameters.kwargs) -> _Result:
        return context.run(work, *arguments, **named)

    return run
