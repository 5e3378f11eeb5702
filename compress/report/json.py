"""``report.json``: sorted keys, two spaces, a newline at the end, so that two reports can be compared line by line."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from compress.errors import CompressError
from compress.report.model import Report


def dumps(report: Report) -> str:
    """Return the report as JSON text."""
    return json.dumps(report.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False) + "\n"


def write(report: Report, path: Path) -> None:
    """Write the report, replacing an older one in one step."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(dumps(report), encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> Report:
    """Read a report back.

    Raises:
        CompressError: The file is missing, or not a report of this schema version (which key is wrong).
    """
    try:
        return Report.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CompressError(f"the report cannot be read: {error.strerror}", where=str(path)) from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the document"
        raise CompressError(
            f"this is not a report of schema version 1: {key}: {first['msg']}", where=str(path)
        ) from error
