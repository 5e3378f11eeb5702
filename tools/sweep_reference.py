"""Write docs/sweep-json.md from the sweep's schema; ``--check`` exits 1 when it is stale."""

from __future__ import annotations

from pathlib import Path

from report_reference import models
from schema_tables import describe, table, write_or_check

from compress.fleet import model as schema

PAGE = Path(__file__).resolve().parent.parent / "docs" / "sweep-json.md"
HEADER = f"""# sweep.json

<!-- Written by tools/sweep_reference.py (`make docs`) from compress/fleet/model.py. Do not edit. -->

Every field of a sweep's `sweep.json`, schema version {schema.SCHEMA_VERSION}: the journal that the same command
continues from, and the comparison that it ends with ([Sweeps](sweep.md)). A key that is not here is an error, no number
is infinite or NaN, and what was not measured is `null`. In Python `compress.sweep(...)` returns it typed.

Times are seconds unless a name says otherwise, sizes bytes, divergences nats a token, shares 0 to 1.
"""


def page() -> str:
    """Return the page."""
    parts = [HEADER]
    parts += [f"## {model.__name__}\n\n{describe(model)}\n\n{table(model)}\n" for model in models(schema.Sweep)]
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    return write_or_check(PAGE, page(), arguments, __doc__)


if __name__ == "__main__":
    raise SystemExit(main())
