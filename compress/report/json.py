"""``report.json``: sorted keys, two spaces, a newline at the end, so that two reports can be compared line by line."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from compress.errors import CompressError, SourceError
from compress.report.model import SCHEMA_VERSION, Report
from compress.source.files import parse_json, read_bytes

NAME = "report.json"
#: More is no report.
MAX_BYTES = 64 << 20


def dumps(report: Report) -> str:
    """Return the report as JSON text."""
    return json.dumps(report.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False) + "\n"


def write(report: Report, path: Path) -> None:
    """Write the report, replacing an older one in one step."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(dumps(report), encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> Report:
    """Read a report back; one of an older schema version is read as this version has it.

    Raises:
        CompressError: The file is missing or damaged, a report of a newer schema version, or a key of it is wrong.
    """
    try:
        data = parse_json(read_bytes(path, MAX_BYTES), path.name)
    except SourceError as error:
        absent = isinstance(error.__cause__, OSError)
        raise CompressError(
            f"the report {'cannot be read' if absent else 'is damaged'}: {error.what}", where=str(path)
        ) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        raise CompressError(
            f"the report has schema version {version}, this compress knows {SCHEMA_VERSION} and older",
            where=str(path),
            hint="upgrade compress",
        )
    if version == 1:
        data["schema_version"] = SCHEMA_VERSION  # every key that version 2 added may be absent
    try:
        return Report.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the document"
        raise CompressError(
            f"this is not a report of schema version {SCHEMA_VERSION}: {key}: {first['msg']}", where=str(path)
        ) from error
