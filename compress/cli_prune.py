"""``compress prune``: a smaller Hugging Face checkpoint, loadable by transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from compress.cli_options import fresh_option, json_option, model_argument, model_options, print_json, threads_option
from compress.completion import complete_profiles


def _amount(name: str, what: str) -> Callable[[Any], Any]:
    return click.option(
        f"--{name}", type=click.FloatRange(min=0), metavar="AMOUNT", help=f"{what}: a share below 1, or a number."
    )


@click.command()
@model_argument
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Output directory; default artifacts/MODEL-pruned."
)
@_amount("ffn", "Feed-forward neurons to remove, of every block")
@_amount("heads", "Query heads to remove, of every block")
@_amount("kv-groups", "Key-value groups to remove with their heads, of every block")
@_amount("layers", "Blocks to remove")
@click.option("--vocabulary", type=click.Choice(["all", "from-text"]), help="Keep the tokens that the text uses.")
@click.option("--speedup", type=float, metavar="RATIO", help="Search the amounts that are so many times faster here.")
@click.option("--max-kl", type=float, metavar="NATS", help="Search the amounts that lose so much at the most.")
@click.option("--algorithm", metavar="NAME", help="Chooses neurons and heads: surgeon, activation, magnitude, random.")
@click.option("--depth", metavar="NAME", help="Chooses blocks: block-influence, angular-distance.")
@click.option(
    "--recover", type=click.Choice(["none", "refit", "distill"]), help="What is done for what stays; default refit."
)
@click.option(
    "--profile",
    default="float",
    metavar="NAME",
    shell_complete=complete_profiles,
    help="Take prune and calibration of this profile.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: prune.steps=200.")
@click.option(
    "--calibration-text",
    type=click.Path(path_type=Path),
    help="UTF-8 text of your domain that the model is run on; default embedded.",
)
@click.option("--max-memory", metavar="SIZE", help="Refuse to start if a stage would take more, e.g. 3GB.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@fresh_option
@threads_option
@model_options
@json_option
def prune(
    model: str,
    output: Path | None,
    ffn: float | None,
    heads: float | None,
    kv_groups: float | None,
    layers: float | None,
    vocabulary: str | None,
    speedup: float | None,
    max_kl: float | None,
    algorithm: str | None,
    depth: str | None,
    recover: str | None,
    profile: str,
    overrides: tuple[str, ...],
    calibration_text: Path | None,
    max_memory: str | None,
    seed: int,
    fresh: bool,
    threads: int | None,
    adapter: Path | None,
    revision: str | None,
    task: str | None,
    as_json: bool,
) -> int:
    """Remove parts of MODEL, fit what stays, and leave a checkpoint that transformers loads.

    Without amounts those of the profile count (its keys prune.*).
    """
    from compress import api
    from compress.show import pruning_text

    done = api.prune_model(
        model,
        output,
        ffn=ffn,
        heads=heads,
        kv_groups=kv_groups,
        layers=layers,
        vocabulary=vocabulary,
        speedup=speedup,
        max_kl=max_kl,
        algorithm=algorithm,
        depth=depth,
        recover=recover,
        profile=profile,
        overrides=overrides,
        calibration_text=calibration_text,
        max_memory=max_memory,
        seed=seed,
        fresh=fresh,
        threads=threads,
        adapter=adapter,
        revision=revision,
        task=task,
        progress=sys.stderr.isatty() and not as_json,
    )
    if as_json:
        print_json({"output": str(done.output), "pruning": done.record})
    else:
        click.echo(pruning_text(done.record), nl=False)
        click.echo(f"pruned: {done.output}")
    return 0
