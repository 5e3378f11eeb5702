"""``compress generate``: try a decoder's artifact, once or in a conversation."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from compress.cli_options import artifact_argument, json_option, print_json, threads_option
from compress.errors import CompressError, UsageError

#: More than any context of a small model, in characters.
_MOST_PROMPT = 4 << 20


@click.command()
@artifact_argument
@click.argument("prompt", required=False)
@click.option(
    "--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="The most tokens to generate."
)
@click.option("--interactive", is_flag=True, help="Converse: a line a question; Ctrl-D ends, /reset begins anew.")
@click.option("--system", metavar="TEXT", help="The system message that a conversation begins with.")
@click.option("--raw", is_flag=True, help="Do not apply the chat template.")
@threads_option
@json_option
def generate(
    artifact: Path,
    prompt: str | None,
    new_tokens: int,
    interactive: bool,
    system: str | None,
    raw: bool,
    threads: int | None,
    as_json: bool,
) -> int:
    """Try a decoder's ARTIFACT: complete PROMPT greedily, printed as it comes.

    PROMPT - is read from standard input. With --interactive, Ctrl-C stops the current answer; without a chat template,
    every line is completed by itself.
    """
    if interactive and (prompt is not None or as_json):
        raise UsageError("--interactive reads its questions line by line: it goes with neither PROMPT nor --json")
    if prompt is None and not interactive:
        raise UsageError("there is no PROMPT", hint="give one, - for standard input, or --interactive")
    if prompt == "-":
        prompt = _standard_input()
    from compress.generation import Writer, prompt_tokens

    writer = Writer(artifact, threads)
    if prompt is None:
        from compress.chat import converse

        converse(writer, new_tokens=new_tokens, chat=not raw, system=system)
        return 0
    for piece in writer.write(prompt_tokens(writer, prompt, chat=not raw, system=system), new_tokens):
        if not as_json:
            click.echo(piece, nl=False)
    if as_json:
        assert writer.last is not None
        print_json(writer.last.document())
    else:
        click.echo()
    return 0


def _standard_input() -> str:
    try:
        text = sys.stdin.read(_MOST_PROMPT + 1)
    except UnicodeDecodeError as error:
        raise CompressError(f"the prompt is not UTF-8: {error.reason}", where="standard input") from None
    if len(text) > _MOST_PROMPT:
        raise CompressError(f"the prompt has more than {_MOST_PROMPT:,} characters", where="standard input")
    return text.removesuffix("\n")
