"""Structured pruning: parts of a model are removed, so that what is left is an ordinary, smaller model.

An algorithm is one module of this package, found by its name: one that defines ``PRUNER`` chooses neurons and heads,
one that defines ``DEPTH_PRUNER`` chooses blocks, one that defines ``SPARSIFIER`` sets single weights to zero.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any, cast

from compress.contracts import DepthPruner, Pruner, Sparsifier
from compress.errors import UsageError, did_you_mean


@cache
def _found(attribute: str) -> dict[str, Any]:
    names = (entry.name for entry in pkgutil.iter_modules(__path__) if not entry.name.endswith(("worker", "run")))
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names)
    found = [getattr(module, attribute) for module in modules if hasattr(module, attribute)]
    return {item.name: item for item in sorted(found, key=lambda item: item.name)}


def available(attribute: str = "PRUNER") -> tuple[str, ...]:
    """Return the names of the algorithms that define ``attribute``, sorted."""
    return tuple(_found(attribute))


def load_pruner(name: str) -> Pruner:
    """Return the algorithm that chooses neurons and heads.

    Raises:
        UsageError: There is none of that name.
    """
    return cast(Pruner, _load(name, "PRUNER"))


def load_depth_pruner(name: str) -> DepthPruner:
    """Return the algorithm that chooses blocks.

    Raises:
        UsageError: There is none of that name.
    """
    return cast(DepthPruner, _load(name, "DEPTH_PRUNER"))


def load_sparsifier(name: str) -> Sparsifier:
    """Return the algorithm that sets single weights to zero.

    Raises:
        UsageError: There is none of that name.
    """
    return cast(Sparsifier, _load(name, "SPARSIFIER"))


def _load(name: str, attribute: str) -> Any:
    known = _found(attribute)
    if name not in known:
        raise UsageError(
            f"no pruning algorithm is named {name!r}", hint=f"{did_you_mean(name, known)}; known: {', '.join(known)}"
        )
    return known[name]
