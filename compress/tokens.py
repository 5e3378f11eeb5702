"""A model's tokenizer and chat template, run in a process of their own under limits (:mod:`compress.tokens_worker`).

Both come with the model, and both are programs: none of them runs where it could stop the command or take the machine's
memory. One process serves all tokenizers of this one; it ends with it, and is started anew when a limit ended it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from compress import tokens_worker
from compress.errors import CompressError
from compress.source.files import check_regular

#: The largest in use (256,000 tokens with pretty-printed merges) take some 35 MiB.
MAX_TOKENIZER_BYTES = 128 << 20
#: Computing seconds that every request may take; ten times the slowest tokenizer in use on top, by size.
BASE_SECONDS = 8.0
TEXT_BYTES_A_SECOND = 50_000
FILE_BYTES_A_SECOND = 200_000
BASE_MEMORY = 768 << 20
#: Bytes that a tokenizer takes for one of its file, and its answer for one of the text.
MEMORY_A_FILE_BYTE = 24
MEMORY_A_TEXT_BYTE = 400
_HINT = "the tokenizer or its chat template is damaged or hostile: use the files that the model came with"

Json = dict[str, Any]


class ChatTemplateError(CompressError):
    """The chat template refuses a conversation; ``what`` is what it says."""


@dataclass(frozen=True)
class Encoding:
    """A text as tokens; lists that were not asked for are empty.

    Attributes:
        ids: Token ids.
        types: ``token_type_ids``.
        special: Which tokens are special ones that were added.
        cut: Whether the text was longer.
        offsets: First and last character (exclusive) of every token.
        words: Index of the word that a token is of, ``None`` for special ones.
    """

    ids: list[int]
    types: list[int]
    special: list[bool]
    cut: bool
    offsets: list[tuple[int, int]]
    words: list[int | None]


class _Process:
    """The process, and one request at a time."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        package = Path(tokens_worker.__file__).resolve().parents[1]
        environment = os.environ | {
            "PYTHONPATH": str(package),
            "TOKENIZERS_PARALLELISM": "false",
            "RUST_BACKTRACE": "0",
            "OMP_NUM_THREADS": "1",
        }
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", tokens_worker.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a panic prints its stack
            env=environment,
            start_new_session=True,  # an interrupt of the command is the command's to handle
        )
        self._end = weakref.finalize(self, _end, self._child)
        self._lock = threading.Lock()
        self._begun = b""
        #: Tokenizers to forget with the next request: a finalizer may run while one is under way.
        self.dropped: deque[int] = deque()

    @property
    def alive(self) -> bool:
        return self._end.alive and self._child.poll() is None

    def ask(self, request: Json, label: str) -> Json:
        """Return the answer.

        Raises:
            CompressError: A limit ended the process, or the tokenizer refuses.
        """
        # Twelve times the computing that is allowed: a loaded machine must not look like a hostile file.
        deadline = time.monotonic() + 60 + 12 * request["seconds"]
        with self._lock:
            dropped = [self.dropped.popleft() for _ in range(len(self.dropped))]
            assert self._child.stdin is not None
            try:
                self._child.stdin.write(json.dumps({**request, "dropped": dropped}).encode() + b"\n")
                self._child.stdin.flush()
                line = self._line(deadline)
            except (OSError, TimeoutError):
                line = b""
            if not line:
                raise self._ended(request["seconds"], label)
        answer: Json = json.loads(line)
        return answer

    def _line(self, deadline: float) -> bytes:
        assert self._child.stdout is not None
        descriptor = self._child.stdout.fileno()
        parts = [self._begun]
        while b"\n" not in parts[-1]:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            read = os.read(descriptor, 1 << 20)
            if not read:
                return b""
            parts.append(read)
        line, _, rest = b"".join(parts).partition(b"\n")
        self._begun = rest
        return line

    def _ended(self, seconds: float, label: str) -> CompressError:
        self._end()
        code = self._child.returncode
        if code == -signal.SIGXCPU:
            what = f"the tokenizer computed for {seconds:.0f} seconds without an end"
        elif code is not None and code < 0 and -code in (signal.SIGABRT, signal.SIGSEGV):
            what = "the tokenizer asks for more memory than it may have, or crashed"
        else:
            what = f"the tokenizer's process ended (code {code})"
        return CompressError(what, where=label, hint=_HINT)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the process, which has nothing to lose: its input is closed, and what does not go by that is killed."""
    for stream in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.close()
    try:
        child.wait(0.5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


_slots = itertools.count()
_process: _Process | None = None
_starting = threading.Lock()


def _running() -> _Process:
    global _process
    with _starting:
        if _process is None or _process.owner != os.getpid() or not _process.alive:
            _process = _Process()
        return _process


class Tokenizer:
    """A tokenizer of the ``tokenizers`` library, without padding and truncation of its own.

    Args:
        path: ``tokenizer.json``; or
        document: its content.
        label: The name that error messages show.

    Raises:
        CompressError: The library refuses it, or it takes more time or memory than any tokenizer.
    """

    def __init__(self, *, path: Path | None = None, document: str | None = None, label: str | None = None) -> None:
        if path is not None:
            self._size = check_regular(path, MAX_TOKENIZER_BYTES, str(path))
            request: Json = {"path": str(path.resolve())}
        else:
            assert document is not None
            self._size = len(document)
            request = {"document": document}
        self._label = label or (str(path) if path else "tokenizer.json")
        self._slot = next(_slots)
        self._process = _running()
        self._ask("load", FILE_BYTES_A_SECOND, self._size, 0, **request)
        self._dropped = weakref.finalize(self, self._process.dropped.append, self._slot)
        self._dropped.atexit = False

    def encode(
        self,
        texts: Iterable[tuple[str, str | None]],
        *,
        special: bool = False,
        length: int | None = None,
        fields: Sequence[str] = ("ids",),
    ) -> list[Encoding]:
        """Return texts, and pairs of them, as tokens.

        Args:
            texts: Each with its second text, or ``None``.
            special: Whether the model's special tokens are added.
            length: Tokens after which a text is cut, special ones included.
            fields: What of :class:`Encoding` is wanted.
        """
        given = list(texts)
        size = sum(len(a.encode("utf-8", "replace")) + len((b or "").encode("utf-8", "replace")) for a, b in given)
        answer = self._ask(
            "encode", TEXT_BYTES_A_SECOND, size, size, texts=given, special=special, length=length, fields=list(fields)
        )
        return [
            Encoding(
                ids=item.get("ids", []),
                types=item.get("types", []),
                special=[bool(flag) for flag in item.get("special", [])],
                cut=bool(item.get("cut", False)),
                offsets=[(first, last) for first, last in item.get("offsets", [])],
                words=item.get("words", []),
            )
            for item in answer["encoded"]
        ]

    def ids(self, text: str, *, special: bool = False) -> list[int]:
        """Return one text's ids."""
        return self.encode([(text, None)], special=special)[0].ids

    def split(self, text: str) -> list[str]:
        """Return the words that the tokenizer's model sees of a text."""
        words: list[str] = self._ask("split", TEXT_BYTES_A_SECOND, len(text), 4 * len(text), text=text)["words"]
        return words

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        size = 16 * len(ids)
        text: str = self._ask(
            "decode", TEXT_BYTES_A_SECOND, size, size, ids=list(ids), skip_special=skip_special_tokens
        )["text"]
        return text

    def vocabulary(self) -> dict[str, int]:
        """Return every token's id, those that were added too."""
        found: dict[str, int] = self._ask("vocabulary", FILE_BYTES_A_SECOND, self._size, 0)["vocabulary"]
        return found

    def special_ids(self) -> list[int]:
        """Return the ids of the added tokens that are special, ascending."""
        found: list[int] = self._ask("vocabulary", FILE_BYTES_A_SECOND, self._size, 0)["special"]
        return found

    def close(self) -> None:
        """Let the process forget it."""
        self._dropped()

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _ask(self, action: str, rate: int, size: int, answered: int, **request: Any) -> Json:
        memory = BASE_MEMORY + MEMORY_A_FILE_BYTE * self._size + MEMORY_A_TEXT_BYTE * answered
        asked = {"do": action, "slot": self._slot, "seconds": BASE_SECONDS + size / rate, "memory": memory, **request}
        answer = self._process.ask(asked, self._label)
        if "error" in answer:
            raise CompressError(f"the tokenizer is damaged: {answer['what']}", where=self._label, hint=_HINT)
        return answer


def render_chat(template: str, variables: Mapping[str, Any]) -> str:
    """Return what a chat template makes of ``messages`` and the other variables it is given.

    Raises:
        ChatTemplateError: It refuses, is no template, or writes without an end.
        CompressError: It computes, or takes memory, without an end.
    """
    request = {"do": "render", "seconds": BASE_SECONDS, "memory": BASE_MEMORY, "slot": -1}
    try:
        answer = _running().ask({**request, "template": template, "variables": dict(variables)}, "chat template")
    except CompressError as error:
        raise CompressError(
            error.what.replace("the tokenizer", "the chat template"), where="chat template", hint=_HINT
        ) from None
    if "error" in answer:
        raise ChatTemplateError(answer["what"])
    text: str = answer["text"]
    return text
