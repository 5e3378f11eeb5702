"""Model families, one file each, found by their ``model_type``: no list to extend."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

from compress.contracts import Family
from compress.errors import UnsupportedModelError, did_you_mean


@cache
def available_families() -> tuple[str, ...]:
    """Return the ``model_type`` of every family, sorted."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def load_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a Hugging Face config.

    Raises:
        UnsupportedModelError: The config names no ``model_type``, one without a family, or an architecture (task) that
            the family does not export.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedModelError("config.json names no model_type", hint="is this a transformers checkpoint?")
    if model_type not in available_families():
        raise UnsupportedModelError(
            f"no family exports model_type {model_type!r}",
            hint=f"{did_you_mean(model_type, available_families())}; supported: {', '.join(available_families())}",
        )
    family = cast(Family, importlib.import_module(f"{__name__}.{model_type}").FAMILY)
    architectures = config.get("architectures") or list(family.architectures[:1])
    if not isinstance(architectures, list) or not any(name in family.architectures for name in architectures):
        raise UnsupportedModelError(
            f"architecture {str(architectures)[:80]} of {model_type!r} is not exported",
            hint=f"supported: {', '.join(family.architectures)}",
        )
    return family
