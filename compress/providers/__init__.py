"""Execution providers, one file each, found by name: ``compress/providers/<name>.py`` defines ``PROVIDER``."""

from __future__ import annotations

import importlib
import pkgutil
from typing import cast

from compress.contracts import Provider
from compress.errors import UsageError, did_you_mean


def names() -> list[str]:
    """Return the names of the providers that have a file here, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> Provider:
    """Return the provider called ``name``; a hyphen stands for an underscore.

    Raises:
        UsageError: There is no such provider.
    """
    known = names()
    wanted = name.replace("-", "_")
    if wanted not in known:
        raise UsageError(f"unknown provider {name!r}", hint=did_you_mean(name, known))
    module = importlib.import_module(f"{__name__}.{wanted}")
    return cast(Provider, module.PROVIDER)
