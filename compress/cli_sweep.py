"""``compress sweep``: many models under many profiles."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from compress.cli_options import json_option, print_json, threads_option

_NO_WIDTH = 200


@click.command()
@click.argument("grid", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", metavar="DIR|URL", help="Where artifacts go; default the grid's output, else artifacts/GRID."
)
@click.option(
    "--jobs", type=click.IntRange(1, 1024), default=1, show_default=True, help="Jobs at once on a machine at most."
)
@click.option("--ray", metavar="ADDRESS", help="Run on a Ray cluster: auto, local, HOST:PORT or ray://HOST:PORT.")
@click.option(
    "--retries", type=click.IntRange(0, 100), help="Attempts after a first one that failed; default the grid's, else 1."
)
@click.option(
    "--max-memory", metavar="SIZE", help="What all jobs together may take on a machine; default what is available."
)
@click.option("--fresh", is_flag=True, help="Remove what earlier sweeps of this output have made, and start over.")
@click.option("--no-validate", is_flag=True, help="Do not measure drift and speed; the manifests say so.")
@threads_option
@json_option
def sweep(
    grid: Path,
    output: str | None,
    jobs: int,
    ray: str | None,
    retries: int | None,
    max_memory: str | None,
    fresh: bool,
    no_validate: bool,
    threads: int | None,
    as_json: bool,
) -> int:
    """Export every model of GRID under every profile of it, and compare what came out.

    GRID is a TOML file: models = ["smollm2"], profiles = ["arm-int4", "x86-int4"]. Ended midway, the same command
    continues: what is finished is not made again. The output has an artifact a job, logs/, sweep.json, README.md and
    sweep.html.

    Exit codes: 0 every artifact keeps its budget, 1 a job failed, 3 one is outside its budget, 4 a provider failed.
    """
    from compress import api

    found = api.sweep(
        grid,
        output,
        jobs=jobs,
        ray=ray,
        retries=retries,
        max_memory=max_memory,
        fresh=fresh,
        validate=False if no_validate else None,
        threads=threads,
        say=(lambda line: None) if as_json else (lambda line: click.echo(line, err=True)),
    )
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        from rich.console import Console

        from compress.fleet.terminal import show

        show(found, Console(file=sys.stdout, width=None if sys.stdout.isatty() else _NO_WIDTH))
    return found.exit_code
