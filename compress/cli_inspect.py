"""``compress inspect``: what is in an artifact."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from compress.cli_options import artifact_argument, json_option, print_json

_NO_WIDTH = 400


@click.command()
@artifact_argument
@click.option("--tensors", is_flag=True, help="List every tensor, not their sums by block and role.")
@json_option
def inspect(artifact: Path, tensors: bool, as_json: bool) -> int:
    """Show what is in an ARTIFACT: source, status, files, and its tensors by block and role with sizes and bits.

    A directory that another tool made, or that only has a report, is shown as far as it goes.
    """
    from compress.inspection import inspect_document

    document = inspect_document(artifact)
    if as_json:
        print_json(document)
        return 0
    from rich.console import Console

    from compress.inspection_text import show_inspection

    # A tree is cut to the console's width: what goes into a file or a pipe has no width.
    width = None if sys.stdout.isatty() else _NO_WIDTH
    show_inspection(document, Console(file=sys.stdout, width=width), tensors=tensors)
    return 0
