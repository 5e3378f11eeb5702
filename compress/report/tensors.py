"""How each weight is stored: made from a plan and what writing it measured, or read from a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from compress.errors import CompressError
from compress.quantize.scheme import scheme_name
from compress.report.model import TensorRecord

if TYPE_CHECKING:
    from compress.planning import Fate, Plan


def of_plan(plan: Plan, errors: Mapping[str, float]) -> tuple[TensorRecord, ...]:
    """Return a record of each linear and table, in the file's order; a tied table is one.

    Small float tables of a graph whose every tensor is an integer have none: they become constants of the graph.

    Args:
        plan: What was written.
        errors: Relative errors by name (:mod:`compress.stored_errors`).
    """
    layers = {linear.name: linear.layer for linear in plan.structure.linears}
    return tuple(
        TensorRecord(
            name=fate.name,
            role=fate.role or "",
            layer=layers.get(fate.name),
            storage=fate.stored[0].dtype if fate.scheme is None else scheme_name(fate.scheme),
            bits=round(8 * fate.nbytes / (fate.rows * fate.columns), 4),
            bytes=fate.nbytes,
            relative_error=errors.get(fate.name),
        )
        for fate in plan.fates
        if fate.kind != "vector" and not _becomes_a_constant(plan, fate)
    )


def of_manifest(record: Mapping[str, Any], where: str) -> tuple[TensorRecord, ...]:
    """Return what a manifest kept; nothing where an older compress wrote it.

    Raises:
        CompressError: The entry is damaged.
    """
    try:
        return tuple(TensorRecord.model_validate(item) for item in record.get("tensors", ()))
    except (ValidationError, TypeError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise CompressError(
            f"manifest.json is damaged: tensors: {first}", where=where, hint="export the model again"
        ) from None


def _becomes_a_constant(plan: Plan, fate: Fate) -> bool:
    return plan.activation_bits is not None and fate.scheme is None and fate.stored[0].offset is None
