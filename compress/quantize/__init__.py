"""Turning weights into codes: schemes, bytes, and one file an algorithm.

A quantizer is a class with a ``name`` in a module of this package; it is found by that name, so a new algorithm is a
new file and nothing else.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from compress.contracts import Quantizer
from compress.errors import UsageError, did_you_mean


def quantizers() -> dict[str, type[Quantizer]]:
    """Return every quantizer class of this package by its name.

    Raises:
        RuntimeError: Two classes claim the same name.
    """
    found: dict[str, type[Quantizer]] = {}
    for module in pkgutil.iter_modules(__path__):
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        candidates: list[type[Any]] = [member for _, member in inspect.getmembers(loaded, inspect.isclass)]
        for candidate in candidates:
            if candidate.__module__ != loaded.__name__ or not _is_quantizer(candidate):
                continue
            name = str(candidate.name)
            if name in found:
                raise RuntimeError(f"two quantizers are called {name!r}: {found[name]} and {candidate}")
            found[name] = candidate
    return found


def load_quantizer(name: str) -> Quantizer:
    """Return a new instance of the quantizer called ``name``.

    Raises:
        UsageError: There is none; the hint says which are near or known.
    """
    known = quantizers()
    if name not in known:
        raise UsageError(f"unknown quantization algorithm {name!r}", hint=did_you_mean(name, known))
    return known[name]()


def _is_quantizer(candidate: type[Any]) -> bool:
    return isinstance(getattr(candidate, "name", None), str) and callable(getattr(candidate, "quantize", None))
