"""Render a report.json as the terminal shows it, as an SVG picture for the README."""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich.console import Console

from compress.report import json as report_json
from compress.report.terminal import show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    console = Console(record=True, width=84, file=io.StringIO(), force_terminal=True)
    report = report_json.read(options.report)
    show(report, console)
    title = f"compress export, profile {report.profile.name}" if report.profile else "compress"
    picture = console.export_svg(title=title)
    # The picture must not fetch a font from anywhere: the viewer's own monospace face will do.
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)
    options.output.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
