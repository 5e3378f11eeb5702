"""Proof of what an artifact lost and gained: drift, speed, placement, and the gate that judges them.

Workers are modules of this package and run in interpreters of their own, which may lack what the main process has;
so this file imports nothing until a name is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.validation.run import CheckpointSpec, Validation, run_validation

__all__ = ["CheckpointSpec", "Validation", "run_validation"]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the module protocol (PEP 562)
    """Import the entry points when they are first used."""
    if name in __all__:
        from compress.validation import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
