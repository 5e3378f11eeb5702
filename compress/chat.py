"""A conversation with an artifact on a terminal, or over a pipe that is read line by line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event
from typing import Any

import click

from compress.errors import CompressError, UsageError
from compress.generation import Writer, opening

_RESET = "/reset"
_PROMPT = "> "


def converse(writer: Writer, *, new_tokens: int, chat: bool, system: str | None) -> None:
    """Answer line after line of standard input until it ends; answers go to standard output.

    With a chat template the whole conversation is given every time (the cache is reused for what it begins with);
    without one, or without ``chat``, every line is completed by itself. ``/reset`` begins anew. Ctrl-C ends the current
    answer, of which the conversation keeps what was written.

    Raises:
        UsageError: ``system`` is given where there is no conversation.
    """
    if not (chat and writer.chats):
        if system is not None:
            raise UsageError(
                "--system belongs to a chat template, which this artifact does not have or --raw leaves out"
            )
        click.echo("no chat template is used: every line is completed by itself", err=True)
    chat = chat and writer.chats
    messages = opening(system)
    with _terminated_as_outside():
        for line in _lines():
            if line.strip() == _RESET:
                messages = opening(system)
                continue
            if not line.strip():
                continue
            try:
                asked = [*messages, {"role": "user", "content": line}]
                answer = _answer(writer, writer.encode_chat(asked) if chat else writer.encode(line), new_tokens)
            except CompressError as error:
                # One question too many for the context is no reason to lose the conversation.
                hint = f"\n  or: {_RESET} begins anew" if chat and len(messages) > len(opening(system)) else ""
                click.echo(f"error: {error}{hint}", err=True)
                continue
            messages = [*asked, {"role": "assistant", "content": answer}]


def _answer(writer: Writer, ids: list[int], new_tokens: int) -> str:
    with _stopped_by_interrupt() as stop:
        pieces = writer.write(ids, new_tokens, stop.is_set)
        for piece in pieces:
            click.echo(piece, nl=False)
            sys.stdout.flush()
        click.echo()
    assert writer.last is not None
    return writer.last.text


def _lines() -> Iterator[str]:
    """Yield the lines of standard input; a terminal gets a prompt, and its own line editing."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - makes input() edit lines and remember them
    while True:
        try:
            yield input(_PROMPT)
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo("\nCtrl-D ends", err=True)


@contextmanager
def _stopped_by_interrupt() -> Iterator[Event]:
    """Yield an event that Ctrl-C sets, instead of tearing a step of the model apart; a second Ctrl-C is as usual."""
    stop = Event()
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    with _handler(signal.SIGINT, note):
        yield stop


@contextmanager
def _terminated_as_outside() -> Iterator[None]:
    """Let a termination end the program, where an interrupt only ends an answer."""

    def end(number: int, frame: Any) -> None:
        raise click.exceptions.Abort

    with _handler(signal.SIGTERM, end):
        yield


@contextmanager
def _handler(number: signal.Signals, act: Callable[[int, Any], None]) -> Iterator[None]:
    before = signal.signal(number, act)
    try:
        yield
    finally:
        signal.signal(number, before)
