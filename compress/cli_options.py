"""Options that several commands share, and what they make of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.completion import complete_artifacts, complete_models, complete_profiles, complete_providers

if TYPE_CHECKING:
    from compress.report.mlflow_log import Tracking


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what says which model: an adapter, a revision, a task."""
    for option in (
        click.option("--adapter", type=click.Path(path_type=Path), help="A PEFT LoRA adapter's directory to merge."),
        click.option("--revision", help="Branch, tag or commit of a hub id."),
        click.option(
            "--task",
            metavar="NAME",
            help="What the model shall do: embedding, text-classification, token-classification, question-answering, "
            "fill-mask, text-generation. Default: what its architecture is for.",
        ),
    ):
        command = option(command)
    return command


def profile_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the profile and its overrides."""
    for option in (
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: quantize.block_size=64."
        ),
        click.option(
            "--profile",
            required=True,
            metavar="NAME",
            shell_complete=complete_profiles,
            help="compress profiles lists them; or a .toml file.",
        ),
    ):
        command = option(command)
    return command


model_argument = click.argument("model", shell_complete=complete_models)
artifact_argument = click.argument("artifact", type=click.Path(path_type=Path), shell_complete=complete_artifacts)
providers_option = click.option(
    "--on",
    "providers",
    multiple=True,
    metavar="PROVIDER",
    shell_complete=complete_providers,
    help="Providers to run on; default: the profile's.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to standard output.")
fresh_option = click.option(
    "--fresh", is_flag=True, help="Start over, also where an interrupted run of this command left finished work."
)
calibration_option = click.option(
    "--calibration-text",
    type=click.Path(path_type=Path),
    help="UTF-8 text of your domain that a calibrating profile runs the model on; default embedded, disjoint from "
    "--eval-text's. Encoders: int8 profiles; models that write text: quantize.effort balanced or max.",
)
labels_option = click.option(
    "--eval-labels",
    type=click.Path(path_type=Path),
    help="Labelled examples, one JSON object a line: measures the task's accuracy before and after (encoders).",
)
memory_option = click.option(
    "--max-memory",
    metavar="SIZE",
    help="Refuse to start if a stage would take more, e.g. 1GB. A decoder that does not fit whole is validated a "
    "block at a time, without speed and samples.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), default=None, help="Threads to use; never changes the artifact's bytes."
)


def outcome_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what tells other systems of the outcome: a JUnit file and an MLflow run."""
    for option in (
        click.option(
            "--mlflow", metavar="URI", help="Log parameters, measures and the report to this MLflow tracking URI."
        ),
        click.option("--junit", type=click.Path(path_type=Path), help="Write the verdict as JUnit XML to this file."),
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class Outcome:
    """Where the outcome is told, checked before work starts."""

    junit: Path | None
    tracking: Tracking | None

    @classmethod
    def prepare(cls, junit: Path | None, mlflow: str | None) -> Outcome:
        """Find out whether both can be written.

        Raises:
            UsageError: The JUnit file has no place.
            CompressError: MLflow is missing or does not answer.
        """
        if junit is not None:
            from compress.report.junit import check_place

            check_place(junit)
        tracking = None
        if mlflow is not None:
            from compress.report.mlflow_log import connect

            tracking = connect(mlflow)
        return cls(junit, tracking)

    def tell(self, artifact: Path, manifest: Mapping[str, Any], report: Mapping[str, Any] | None) -> None:
        """Write both, whatever the verdict."""
        if self.junit is not None and report is not None:
            from compress.report import junit
            from compress.report.model import Report

            junit.write(Report.model_validate(report), self.junit)
        if self.tracking is not None:
            run = self.tracking.log(artifact, manifest, report)
            click.echo(f"MLflow run: {run}", err=True)


def print_json(document: Any) -> None:
    """Print the one document of ``--json``."""
    click.echo(json.dumps(document, indent=2, sort_keys=True, allow_nan=False))
