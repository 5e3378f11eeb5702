"""``compress compare``: two artifacts side by side."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from compress.cli_options import json_option, print_json
from compress.completion import complete_artifacts
from compress.errors import EXIT_OK, EXIT_OUTSIDE_BUDGET

_NO_WIDTH = 200


@click.command()
@click.argument("a", type=click.Path(path_type=Path), shell_complete=complete_artifacts)
@click.argument("b", type=click.Path(path_type=Path), shell_complete=complete_artifacts)
@click.option(
    "--html", type=click.Path(path_type=Path), help="Also write the comparison as a page, every tensor in it."
)
@click.option("--fail-if-worse", is_flag=True, help="Exit with 3 when B is worse than A beyond the standard errors.")
@json_option
def compare(a: Path, b: Path, html: Path | None, fail_if_worse: bool, as_json: bool) -> int:
    """Compare A and B: artifacts, or report.json files.

    Shows what differs in identity, size, drift, speed, bits and files. Where the evaluation text, the machine, the
    threads or the provider differ, both values are shown and the reason why they say nothing of each other.

    B is worse where it loses more than A beyond a tenth of a percent of perplexity and chance, judged position by
    position where both have their drift.npz; else where it exceeds A by more than twice the standard error of the
    difference; where the spreads of two rates do not touch; by any growth in size; or where A passed its budget and B
    did not.
    """
    from compress.comparison import read_side
    from compress.package.staging import write_file
    from compress.report.compare import compare as compared

    found = compared(read_side(a), read_side(b))
    if html is not None:
        from compress.report.compare_show import page

        write_file(html, page(found))
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        from rich.console import Console

        from compress.report.compare_show import show

        show(found, Console(file=sys.stdout, width=None if sys.stdout.isatty() else _NO_WIDTH))
    if not fail_if_worse:
        return EXIT_OK
    for item in found.measures:
        if item.judgement == "not comparable":
            click.echo(f"not judged, {item.name}: {item.why}", err=True)
        elif item.why is not None and "not by position" in item.why:
            click.echo(f"judged by two standard errors alone, {item.name}: {item.why}", err=True)
    for key in ("drift", "speed"):
        if key in found.not_compared:
            click.echo(f"not judged, {key}: {found.not_compared[key]}", err=True)
    return EXIT_OUTSIDE_BUDGET if found.worse else EXIT_OK
