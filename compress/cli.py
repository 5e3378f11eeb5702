"""The command line: arguments, exit codes, and nothing else.

Results go to standard output, progress and logs to standard error. Nothing heavy is imported before it is needed:
``compress --help`` loads neither torch nor transformers (a test asserts it).
"""

from __future__ import annotations

import errno
import logging
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from compress.cli_compare import compare
from compress.cli_completion import completion
from compress.cli_generate import generate
from compress.cli_inspect import inspect
from compress.cli_options import (
    Outcome,
    artifact_argument,
    calibration_option,
    fresh_option,
    json_option,
    labels_option,
    memory_option,
    model_argument,
    model_options,
    outcome_options,
    print_json,
    profile_options,
    providers_option,
    threads_option,
)
from compress.cli_prune import prune
from compress.cli_push import push
from compress.cli_sweep import sweep
from compress.cli_verify import sign, verify
from compress.cli_version import version_option
from compress.completion import complete_models, complete_profiles, complete_providers
from compress.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_PROVIDER,
    EXIT_USAGE,
    LAYOUT,
    MAX_HINT,
    CompressError,
    UsageError,
    did_you_mean,
    printable,
)
from compress.sizes import parse_size


class _Group(click.Group):
    """Suggests the nearest command for a mistyped one and lists commands in the order of a user's day."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise UsageError(f"there is no command {args[0]!r}", hint=did_you_mean(args[0], self.commands))
        return super().resolve_command(ctx, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@version_option
@click.option("--debug", is_flag=True, help="Show tracebacks and library logs.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Quantize small language models to ONNX, and prove what it cost.

    MODEL is a short name (compress models), a hub id, a local directory, package:NAME/PATH or a .gguf file.

    \b
    Exit codes: 0 done and within budget, 1 failed, 2 wrong usage, 3 built but outside the profile's budget,
    4 a requested provider is missing or fell back, 130 interrupted.
    """  # noqa: D301 - click wants the control character
    context.obj = {"debug": debug}
    logging.basicConfig(level=logging.INFO if debug else logging.ERROR, stream=sys.stderr)
    _show_notes(logging.getLogger("compress"))


class _Notes(logging.Handler):
    """Shows what this package warns of as one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(f"note: {record.getMessage()}", err=True)


def _show_notes(logger: logging.Logger) -> None:
    # The root's level, which keeps libraries quiet, would be this logger's as well.
    logger.setLevel(logging.WARNING)
    if not any(isinstance(handler, _Notes) for handler in logger.handlers):
        logger.addHandler(_Notes(logging.WARNING))
        logger.propagate = False


@cli.command()
@model_argument
@profile_options
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Output directory; default artifacts/MODEL-PROFILE."
)
@calibration_option
@click.option("--eval-text", type=click.Path(path_type=Path), help="UTF-8 text to measure drift on; default embedded.")
@labels_option
@memory_option
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@fresh_option
@click.option("--no-validate", is_flag=True, help="Do not measure drift and speed; the manifest says so.")
@outcome_options
@threads_option
@model_options
@json_option
def export(
    model: str,
    profile: str,
    overrides: tuple[str, ...],
    output: Path | None,
    calibration_text: Path | None,
    eval_text: Path | None,
    eval_labels: Path | None,
    max_memory: str | None,
    seed: int,
    fresh: bool,
    no_validate: bool,
    junit: Path | None,
    mlflow: str | None,
    threads: int | None,
    adapter: Path | None,
    revision: str | None,
    task: str | None,
    as_json: bool,
) -> int:
    """Export MODEL under a profile, measure it, and leave a deployable artifact."""
    from compress import api

    if no_validate and junit is not None:
        raise UsageError("there is no verdict to write without validation", hint="leave --junit or --no-validate out")
    outcome = Outcome.prepare(junit, mlflow)
    result = api.export(
        model,
        profile,
        output,
        overrides=overrides,
        calibration_text=calibration_text,
        eval_text=eval_text,
        eval_labels=eval_labels,
        max_memory=max_memory,
        seed=seed,
        validate=not no_validate,
        fresh=fresh,
        threads=threads,
        adapter=adapter,
        revision=revision,
        task=task,
        progress=sys.stderr.isatty() and not as_json,
    )
    report = None if result.report is None else result.report.model_dump(mode="json")
    if as_json:
        print_json({"output": str(result.output), "manifest": result.manifest, "report": report})
    else:
        _show_report(report)
        click.echo(f"{result.status}: {result.output}")
    outcome.tell(result.output, result.manifest, report)
    return result.exit_code


def _show_report(report: Any) -> None:
    if report is None:
        return
    from rich.console import Console

    from compress.report.model import Report
    from compress.report.terminal import show

    show(Report.model_validate(report), Console(file=sys.stdout))


@cli.command()
@model_argument
@profile_options
@calibration_option
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
@click.option(
    "--speed",
    is_flag=True,
    help="Predict how fast it would be on this machine, beside float32 ONNX. Its parts are measured, the first time.",
)
@threads_option
@model_options
@json_option
def plan(
    model: str,
    profile: str,
    overrides: tuple[str, ...],
    calibration_text: Path | None,
    seed: int,
    speed: bool,
    threads: int | None,
    adapter: Path | None,
    revision: str | None,
    task: str | None,
    as_json: bool,
) -> int:
    """Show what an export would do: sizes, memory and bits of every tensor, and with --speed how fast it would be.

    Only config and headers are read, unless the profile chooses bits under a budget (quantize.allocation): then every
    tensor's errors are measured on the calibration text, as an export would, which takes minutes. --speed takes half a
    minute, the next time none.
    """
    from compress import api
    from compress.show import plan_text

    document = api.plan(
        model,
        profile,
        overrides=overrides,
        calibration_text=calibration_text,
        seed=seed,
        threads=threads,
        adapter=adapter,
        revision=revision,
        task=task,
        speed=speed,
        progress=sys.stderr.isatty() and not as_json,
    ).model_dump(mode="json")
    if as_json:
        print_json(document)
    else:
        click.echo(plan_text(document), nl=False)
    return 0


cli.add_command(sweep)
cli.add_command(prune)


@cli.command()
@artifact_argument
@click.option("--reference", metavar="MODEL", help="The source model; default: the one the manifest names.")
@click.option("--adapter", type=click.Path(path_type=Path), help="The adapter that the artifact was made with.")
@providers_option
@click.option("--eval-text", type=click.Path(path_type=Path), help="UTF-8 text to measure drift on; default embedded.")
@labels_option
@memory_option
@outcome_options
@threads_option
@json_option
def validate(
    artifact: Path,
    reference: str | None,
    adapter: Path | None,
    providers: tuple[str, ...],
    eval_text: Path | None,
    eval_labels: Path | None,
    max_memory: str | None,
    junit: Path | None,
    mlflow: str | None,
    threads: int | None,
    as_json: bool,
) -> int:
    """Measure an ARTIFACT again: drift against its source, speed, placement; updates its report and manifest."""
    from compress import proof
    from compress.package.manifest import read_manifest
    from compress.progress import Stages

    outcome = Outcome.prepare(junit, mlflow)
    stages = Stages(show=sys.stderr.isatty() and not as_json)
    report, exit_code = proof.validate_artifact(
        artifact,
        reference=reference,
        adapter=adapter,
        providers=providers,
        eval_text=eval_text,
        eval_labels=eval_labels,
        max_memory=None if max_memory is None else parse_size(max_memory),
        threads=threads,
        stages=stages,
    )
    if as_json:
        print_json(report)
    else:
        _show_report(report)
    outcome.tell(artifact, read_manifest(artifact), report)
    return exit_code


@cli.command()
@artifact_argument
@providers_option
@click.option(
    "--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Length of the prompt (decoders)."
)
@click.option(
    "--new-tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens to generate (decoders)."
)
@click.option("--repeats", type=click.IntRange(1, 1000), default=5, show_default=True, help="Measured runs.")
@threads_option
@json_option
def bench(
    artifact: Path,
    providers: tuple[str, ...],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    threads: int | None,
    as_json: bool,
) -> int:
    """Time an ARTIFACT: load, prefill, decode and peak memory; medians over the repeats.

    An encoder is timed at the lengths and batches that its profile's validation.lengths and validation.batches say.
    """
    from compress import proof
    from compress.show import bench_text

    document = proof.bench_artifact(
        artifact,
        providers=providers,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=threads,
    )
    if as_json:
        print_json(document)
    else:
        click.echo(bench_text(document), nl=False)
    return 0


cli.add_command(generate)


@cli.command()
@click.argument("name", required=False, shell_complete=complete_profiles)
@json_option
def profiles(name: str | None, as_json: bool) -> int:
    """List the profiles, or show one whole."""
    from compress.profile import available_profiles, load_profile

    if name is not None:
        recipe = load_profile(name)
        if as_json:
            print_json(recipe.model_dump(mode="json"))
        else:
            path = available_profiles().get(name, Path(name))
            click.echo(path.read_text(encoding="utf-8"), nl=False)
        return 0
    recipes = [load_profile(known) for known in available_profiles()]
    if as_json:
        print_json([recipe.model_dump(mode="json") for recipe in recipes])
    else:
        for recipe in recipes:
            click.echo(f"{recipe.name:<18} {recipe.description}")
    return 0


@cli.command()
@click.argument("name", required=False, shell_complete=complete_models)
@json_option
def models(name: str | None, as_json: bool) -> int:
    """List the short names of models, or show one."""
    from compress import catalog
    from compress.show import models_text

    found = catalog.entries()
    if name is not None:
        entry = catalog.resolve(name)
        if entry is None:
            raise UsageError(f"no model is called {name!r}", hint=catalog.suggest(name))
        found = (entry,)
    if as_json:
        print_json([{**entry.model_dump(mode="json"), "support": entry.support} for entry in found])
    else:
        click.echo(models_text(found), nl=False)
    return 0


cli.add_command(inspect)
cli.add_command(compare)
cli.add_command(push)


cli.add_command(verify)
cli.add_command(sign)


@cli.command()
@click.argument("names", metavar="[PROVIDER]...", nargs=-1, shell_complete=complete_providers)
@click.option(
    "--install",
    multiple=True,
    metavar="PROVIDER",
    shell_complete=complete_providers,
    help="Install what the provider needs into the cache first.",
)
@json_option
def doctor(names: tuple[str, ...], install: tuple[str, ...], as_json: bool) -> int:
    """Try every execution provider on this machine: what works, what a run on it proves, and what is missing.

    With names, only those are tried, and one that does not work is exit code 4.
    """
    from compress import doctor as diagnosis
    from compress import providers

    asked = [providers.load(name) for name in (*names, *install)]
    for provider in asked[len(names) :]:
        provider.install(lambda step: click.echo(step, err=True))
    found = diagnosis.examine_all(tuple(dict.fromkeys(provider.name for provider in asked)))
    if as_json:
        print_json(diagnosis.document(found))
    else:
        click.echo(diagnosis.text(found), nl=False)
    return EXIT_PROVIDER if asked and not all(item.works for item in found) else EXIT_OK


cli.add_command(completion)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    # A stopped container or a timeout cleans up behind itself as Ctrl-C does.
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(run(arguments))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def run(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code; every expected failure ends as one to three lines."""
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    try:
        code = cli.main(args=words, prog_name="compress", standalone_mode=False)
        return int(code or EXIT_OK)
    except (click.exceptions.Abort, KeyboardInterrupt):
        # CPython remembers an interrupt that passed through an exec of a string (an import that makes a dataclass is
        # enough) and ends `python -m` by that signal instead of by our exit code; running another string forgets it.
        exec("")
        return _fail("interrupted", EXIT_INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return EXIT_USAGE
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        command = context.command_path if context is not None else "compress"
        return _fail(f"{error.format_message()}\n  try: {command} --help", EXIT_USAGE)
    except SystemExit:
        # click's answer to a reader that went away (`compress models | head`): nothing to complain about.
        if type(sys.stdout).__name__.endswith("PacifyFlushWrapper"):  # its public name comes and goes with versions
            return EXIT_OK
        raise
    except CompressError as error:
        if debug:
            traceback.print_exc()
        return _fail(str(error), error.exit_code)
    except OSError as error:
        if debug:
            traceback.print_exc()
        where = f"\n  in: {error.filename}" if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "\n  try: free some space, or choose another place with -o" if full else ""
        return _fail(f"{error.strerror or error}{where}{hint}", EXIT_FAILED)
    except MemoryError:
        if debug:
            traceback.print_exc()
        return _fail("memory ran out\n  try: --max-memory to be told before, and --threads 1", EXIT_FAILED)
    except Exception as error:
        if debug:
            traceback.print_exc()
            return EXIT_FAILED
        first = (str(error).splitlines() or [""])[0]
        return _fail(
            f"unexpected {type(error).__name__}: {first}\n  try: the same with --debug, and report it", EXIT_FAILED
        )


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {printable(message, MAX_HINT, keep=LAYOUT)}", err=True)
    return code


if __name__ == "__main__":
    main()
