"""Many models under many profiles, as a Python function."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress import api_arguments as arguments
from compress.api_arguments import AnyPath
from compress.errors import UsageError
from compress.fleet.grid import load_grid
from compress.fleet.model import Sweep
from compress.fleet.run import Options
from compress.fleet.run import sweep as _sweep
from compress.fleet.store import is_url


def sweep(
    grid: AnyPath | Mapping[str, Any],
    output: AnyPath | None = None,
    *,
    jobs: int = 1,
    ray: str | None = None,
    retries: int | None = None,
    max_memory: int | str | None = None,
    fresh: bool = False,
    validate: bool | None = None,
    threads: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Sweep:
    """Export models x profiles, and compare what came out: ``compress sweep``.

    What an earlier sweep of the same output has finished is not made again. A job that fails is a record with its
    error, not an exception. Every job is a process of its own, ended with this one.

    Args:
        grid: The path of a ``grid.toml``, or its content, whose paths are then relative to the working directory.
        output: A directory, or a URL that fsspec can write to; by default the grid's, else ``artifacts/GRID``.
        jobs: How many jobs run at once on a machine, as far as memory allows.
        ray: Run the jobs on a Ray cluster: ``auto``, ``local``, ``HOST:PORT`` or ``ray://HOST:PORT``.
        retries: Attempts after a first one that failed; by default the grid's, else 1.
        max_memory: What all jobs together may take on a machine: bytes, or text with a unit; by default the grid's,
            else what is available.
        fresh: Remove what earlier sweeps of this output have made, and start over.
        validate: Measure drift and speed; by default the grid's ``validate``, else yes.
        threads: Threads of each job, by default the machine's cores divided by ``jobs``.
        say: Takes a line about each job as it begins and ends.

    Returns:
        Every job's record, and the best artifacts of each model.

    Raises:
        UsageError: The grid is wrong, or the output holds something no sweep has made.
        LockedError: Another sweep is at the output.
        CompressError: The output cannot be written, or no Ray cluster answers.

    Examples:
        >>> import compress
        >>> grid = {"models": ["tiny-llama"], "profiles": ["arm-int4", "x86-int8-of-nobody"], "validate": False}
        >>> found = compress.sweep(grid, "out/fleet")
        >>> [(job.name, job.status) for job in found.jobs]
        [('tiny-llama-arm-int4', 'built'), ('tiny-llama-x86-int8-of-nobody', 'failed')]
        >>> print(found.jobs[1].error.splitlines()[0])
        no profile is named 'x86-int8-of-nobody'
        >>> found.exit_code
        1
    """
    loaded = load_grid(grid if isinstance(grid, Mapping) else os.fspath(grid))
    if jobs < 1 or (retries is not None and retries < 0):
        raise UsageError("a sweep has 1 job at once or more, and 0 retries or more", hint="--jobs 2 --retries 1")
    options = Options(
        output=_place(loaded.grid.output, loaded.base, loaded.name) if output is None else os.fspath(output),
        at_once=jobs,
        ray=ray,
        retries=loaded.grid.retries if retries is None else retries,
        max_memory=loaded.max_memory if max_memory is None else arguments.size(max_memory),
        fresh=fresh,
        validate=loaded.grid.measure if validate is None else validate,
        threads=arguments.checked_threads(threads),
        say=say or (lambda line: None),
    )
    return _sweep(loaded, options)


def _place(given: str | None, base: Path, name: str) -> str:
    if given is None:
        return str(Path("artifacts") / Path(name.replace(" ", "-")).stem)
    return given if is_url(given) else str(base / given)
