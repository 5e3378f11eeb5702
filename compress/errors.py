"""Errors a user can act on: what happened, where, and what to do about it.

Every expected failure is a :class:`CompressError` (or a subclass that carries another exit code). The command line
prints it as one to three lines and shows a traceback only under ``--debug``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_OUTSIDE_BUDGET = 3
EXIT_PROVIDER = 4
EXIT_INTERRUPTED = 130


#: Characters of a message that are shown: names and values in it come from files, and may be of any length.
MAX_LINE = 600
MAX_HINT = 8192
LAYOUT = "\n\t"


def printable(text: str, limit: int = MAX_LINE, *, keep: str = "") -> str:
    """Return text that cannot command a terminal: what cannot be printed is shown as an escape, its middle is left out.

    Args:
        text: Any text; it may hold what a hostile file says.
        limit: Characters that are shown at most.
        keep: Characters that stay as they are.
    """
    if len(text) > limit:
        tail = (limit - 5) // 2
        text = f"{text[: limit - 5 - tail]} ... {text[-tail:]}"
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() or sign in keep else sign.encode("unicode_escape").decode("ascii") for sign in text
    )


class CompressError(Exception):
    """An expected failure.

    Args:
        what: What happened, one sentence without a trailing period.
        where: The file, tensor, key or option concerned, if there is one.
        hint: What the user can do about it.
    """

    exit_code = EXIT_FAILED

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        super().__init__(self.render())

    def render(self) -> str:
        """Return the message as one to three lines (a hint may show a log), without what could command a terminal."""
        lines = [printable(self.what)]
        if self.where:
            lines.append(f"  in: {printable(self.where)}")
        if self.hint:
            lines.append(f"  try: {printable(self.hint, MAX_HINT, keep=LAYOUT)}")
        return "\n".join(lines)


class UsageError(CompressError):
    """The command was asked for something that cannot be: a wrong name, key, value or combination."""

    exit_code = EXIT_USAGE


class SourceError(CompressError):
    """The model cannot be read: missing, damaged, pickled, already quantized, or inconsistent with its config."""


class UnsupportedModelError(CompressError):
    """The architecture, or something its config asks for, has no implementation here."""


class ResourceError(CompressError):
    """Memory or disk space is not enough, found out before work starts."""


class BudgetError(CompressError):
    """No choice that the profile leaves open keeps its budget; the message says the nearest that can be kept."""

    exit_code = EXIT_OUTSIDE_BUDGET


class ProviderError(CompressError):
    """A requested execution provider is missing, or took less of the graph than it should have."""

    exit_code = EXIT_PROVIDER


class WorkerError(CompressError):
    """A worker process crashed, hung or answered nonsense; the message holds the end of its log."""


def did_you_mean(word: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return ``did you mean X?``, or the list of what is known when nothing is near.

    Args:
        word: What the user wrote.
        known: The names that would have been accepted.
        limit: The most suggestions to make.
    """
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=limit, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known: {', '.join(names)}" if names else "none is known"


class WorkerKilledError(WorkerError):
    """A worker was killed from outside: by the kernel, because memory ran out, or by somebody."""
