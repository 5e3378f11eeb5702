"""What an artifact shows to people: its report's page and its model card. Programs read the JSON files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.contracts import Checkpoint
from compress.report import card, html
from compress.report.model import Report


def write(
    directory: Path, record: Mapping[str, Any], source: Checkpoint, report: Mapping[str, Any] | None = None
) -> None:
    """Write ``report.html``, where there is a report, and ``README.md`` into an artifact.

    Args:
        directory: The artifact; all its other files but the manifest are there.
        record: Its manifest, as far as it is known.
        source: The source, whose own card may name its licence.
        report: The content of its ``report.json``; ``None`` where nothing was measured.
    """
    made = None if report is None else Report.model_validate(report)
    if made is not None:
        html.write(made, directory, record)
    card.write(directory, record, made, source.directory)
