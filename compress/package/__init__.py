"""Packaging: the data file, the manifest, and one file a target.

A target is a module of this package that defines ``TARGET``, its name in profiles, ``applies(structure)``, and, of what
it is given (:mod:`compress.package.target`), ``check(wish)``, ``needs(wish)`` and ``write(package)``; it is found by
being here. A model that no target of its profile applies to is a plain directory for onnxruntime; the manifest's
``targets`` says which ones took it.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

from compress.errors import UsageError, did_you_mean


@cache
def targets() -> dict[str, ModuleType]:
    """Return every target's module by its name."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.TARGET: module for module in modules if hasattr(module, "TARGET")}


def load_target(name: str, *, where: str) -> ModuleType:
    """Return a target's module.

    Raises:
        UsageError: There is none of that name.
    """
    if name not in targets():
        raise UsageError(f"no packager for target {name!r}", where=where, hint=did_you_mean(name, targets()))
    return targets()[name]
