"""Write docs/report.md from the report's schema; ``--check`` exits 1 when it is stale."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel
from schema_tables import describe, models_in, table, write_or_check

from compress.report import model as schema

PAGE = Path(__file__).resolve().parent.parent / "docs" / "report.md"
HEADER = f"""# report.json

<!-- Written by tools/report_reference.py (`make docs`) from compress/report/model.py. Do not edit. -->

Every field of an artifact's `report.json`, schema version {schema.SCHEMA_VERSION}. A key that is not here is an error,
no number is infinite or NaN, and what was not measured is `null` or left out of its list. An older version is read as
this one, a newer one is refused. In Python `compress.load_report(PATH)` returns it typed: the sections below are
classes of `compress.report.model`.

Times are seconds unless a name says otherwise, sizes bytes, divergences nats a token, shares 0 to 1. `evidence` says
what a run was: `measured` on the hardware itself, `simulated` by a vendor's simulator, `emulated` on another processor
in software, `static` if only operators were looked up. Only `measured` runs have speeds.
"""


def models(root: type[BaseModel] = schema.Report) -> list[type[BaseModel]]:
    """Return a document's models, each once, a model before those that it is made of."""
    found: list[type[BaseModel]] = []
    waiting: list[type[BaseModel]] = [root]
    while waiting:
        model = waiting.pop(0)
        if model not in found:
            found.append(model)
            waiting += [inner for field in model.model_fields.values() for inner in models_in(field.annotation)]
    return found


def page() -> str:
    """Return the page."""
    parts = [HEADER]
    parts += [f"## {model.__name__}\n\n{describe(model)}\n\n{table(model)}\n" for model in models()]
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    return write_or_check(PAGE, page(), arguments, __doc__)


if __name__ == "__main__":
    raise SystemExit(main())
