"""Prune, quantize, export to ONNX and prove it: from a Hugging Face checkpoint to a deployable artifact.

The functions of the command line are here too (:mod:`compress.api`), imported when they are first asked for.

Examples:
    >>> import compress
    >>> compress.plan("tiny-llama", "x86-int8").task
    'text-generation'
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from compress.api import ExportResult as ExportResult
    from compress.api import PruneResult as PruneResult
    from compress.api import bench as bench
    from compress.api import export as export
    from compress.api import generate as generate
    from compress.api import inspect as inspect
    from compress.api import load_report as load_report
    from compress.api import models as models
    from compress.api import plan as plan
    from compress.api import profiles as profiles
    from compress.api import prune_model as prune_model
    from compress.api import sweep as sweep
    from compress.api import validate as validate
    from compress.errors import BudgetError as BudgetError
    from compress.errors import CompressError as CompressError
    from compress.errors import ProviderError as ProviderError
    from compress.errors import ResourceError as ResourceError
    from compress.errors import SourceError as SourceError
    from compress.errors import UnsupportedModelError as UnsupportedModelError
    from compress.errors import UsageError as UsageError
    from compress.errors import WorkerError as WorkerError
    from compress.plan_document import PlanDocument as PlanDocument
    from compress.profile import Profile as Profile
    from compress.report.model import Report as Report

__all__ = [
    "BudgetError",
    "CompressError",
    "ExportResult",
    "PlanDocument",
    "Profile",
    "ProviderError",
    "PruneResult",
    "Report",
    "ResourceError",
    "SourceError",
    "UnsupportedModelError",
    "UsageError",
    "WorkerError",
    "__version__",
    "bench",
    "export",
    "generate",
    "inspect",
    "load_report",
    "models",
    "plan",
    "profiles",
    "prune_model",
    "sweep",
    "validate",
]

# Hidden from type checkers, to whom a module's __getattr__ says that any name is there.
if not TYPE_CHECKING:

    def _home(name: str) -> str:
        if name.endswith("Error"):
            return "compress.errors"
        return {
            "PlanDocument": "compress.plan_document",
            "Profile": "compress.profile",
            "Report": "compress.report.model",
        }.get(name, "compress.api")

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import importlib

        value = getattr(importlib.import_module(_home(name)), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
