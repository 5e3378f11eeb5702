"""What a caller may give to the functions of :mod:`compress.api`, made into what the pipeline takes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from compress import pipeline
from compress.errors import UsageError
from compress.profile import Profile, load_profile, override
from compress.sizes import parse_size

#: A path, as text or as an object.
AnyPath = str | os.PathLike[str]


def recipe(profile: AnyPath | Profile, overrides: Iterable[str]) -> Profile:
    """Return a profile that was named, or given whole, with its overrides."""
    changes = words(overrides)
    if not isinstance(profile, Profile):
        return load_profile(os.fspath(profile), changes)
    return override(profile, changes) if changes else profile


def words(given: Iterable[str]) -> tuple[str, ...]:
    """Return several words; a single one is not taken for its letters."""
    return (given,) if isinstance(given, str) else tuple(given)


def reference(
    model: AnyPath, adapter: AnyPath | None, revision: str | None, task: str | None
) -> pipeline.ModelReference:
    """Return what names the model."""
    return pipeline.ModelReference(os.fspath(model), adapter=path(adapter), revision=revision, task=task)


def path(given: AnyPath | None) -> Path | None:
    """Return a path, if one was given."""
    return None if given is None else Path(given)


def size(given: int | str | None) -> int | None:
    """Return bytes; text is read as ``--max-memory`` is."""
    return parse_size(given) if isinstance(given, str) else given


def checked_threads(threads: int | None) -> int | None:
    """Return how many threads were asked for; refuse what no machine has."""
    if threads is not None and not 1 <= threads <= 1024:
        raise UsageError(f"{threads} threads cannot be used", hint="1 to 1024, or None for all cores")
    return threads


def thread_count(threads: int | None) -> int:
    """Return how many threads to use: all cores by default."""
    return checked_threads(threads) or os.cpu_count() or 1
