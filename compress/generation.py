"""Try an artifact: greedy completion with ONNX Runtime on the CPU, token by token."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compress import prompts, providers
from compress.errors import CompressError, UsageError
from compress.validation.artifact import DECODING, Artifact, open_artifact
from compress.validation.decoding import CachedDecoder
from compress.validation.static_decoding import StaticDecoder, decode_graph

#: Messages of a conversation, as chat templates take them: ``role`` and ``content``.
Messages = Sequence[Mapping[str, str]]


@dataclass
class Completion:
    """What was written, and how long it took; filled while it is written.

    Attributes:
        prompt_tokens: Length of the prompt.
        reused_tokens: How many of them the cache had already.
        tokens: The new tokens, without the one that ended the text.
        text: The new tokens as text, special tokens left out.
        prefill_seconds: Until the first new token was known.
        decode_seconds: Of the runs after that one, one a token.
        runs: How many they were.
        stopped: Why it ended: the model's end token, the limit of new tokens, the full context, or the user.
    """

    prompt_tokens: int
    reused_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    runs: int = 0
    stopped: Literal["end", "length", "context", "user"] = "user"

    def document(self) -> dict[str, Any]:
        """Return it as JSON-able data; a rate that nothing was measured for is ``None``."""
        return {
            "schema_version": 1,
            "text": self.text,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            "prefill_seconds": round(self.prefill_seconds, 6),
            "decode_seconds": round(self.decode_seconds, 6),
            "decode_tokens_per_second": round(self.runs / self.decode_seconds, 3) if self.runs else None,
            "stopped": self.stopped,
        }


class Writer:
    """A decoder's artifact, opened: turns prompts into tokens, and tokens into what follows them.

    The cache is kept between calls: a prompt that begins as the sequence before is only read from where it differs.

    Raises:
        UsageError: The artifact is an encoder.
        CompressError: The artifact or its tokenizer cannot be read.
    """

    def __init__(self, artifact: Path, threads: int | None) -> None:
        opened = open_artifact(artifact)
        if opened.task != DECODING:
            raise _no_writer(artifact, opened.task)
        self._tokenizer = prompts.tokenizer_of(artifact)
        self._decoder = _decoder(opened, threads or os.cpu_count() or 1)
        slots = self._decoder.slots if isinstance(self._decoder, StaticDecoder) else 1 << 30
        self._context = min(opened.context_length or 1 << 30, slots)
        self._switch = _rope_switch(opened.config)
        self._stop = prompts.end_tokens(artifact)
        self._fed: list[int] = []
        self.last: Completion | None = None

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return prompts.has_chat_template(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text that is to be completed."""
        return prompts.encode(self._tokenizer, text, chat=False)

    def encode_chat(self, messages: Messages) -> list[int]:
        """Return the tokens of a conversation, up to where the model's answer begins.

        Raises:
            CompressError: The chat template refuses it (some know no system message).
        """
        try:
            return prompts.encode_chat(self._tokenizer, messages)
        except prompts.ChatTemplateError as error:
            raise CompressError(
                f"the model's chat template refuses this conversation: {error.what}",
                hint="leave --system out, or use --raw",
            ) from error

    def write(self, ids: list[int], new_tokens: int, stop: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Yield what follows ``ids`` piece by piece; :attr:`last` says more once it ends.

        Args:
            ids: The prompt's tokens.
            new_tokens: The most tokens to generate; an end-of-sequence token ends earlier.
            stop: Asked after every token whether to end.

        Raises:
            CompressError: The prompt is empty, or does not fit the context.
        """
        if not ids:
            raise CompressError("the prompt is empty", hint="give at least one word")
        room = self._context - len(ids)
        if room < 1:
            raise CompressError(
                f"the prompt has {len(ids)} tokens, the model's context {self._context}", hint="shorten the prompt"
            )
        self.last = done = Completion(len(ids), self._rewind(ids))
        shown = ""
        for token in self._tokens(ids[done.reused_tokens :], min(new_tokens, room), done):
            done.tokens.append(token)
            # Decoding everything again is the only way that is right for every tokenizer (spaces, split characters).
            done.text = self._tokenizer.decode(done.tokens, skip_special_tokens=True)
            if not done.text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield done.text[len(shown) :]
                shown = done.text
            if stop():
                return
        if done.stopped == "length" and new_tokens > room:
            done.stopped = "context"
        if done.text != shown:
            yield done.text[len(shown) :]

    def _tokens(self, feed: list[int], most: int, done: Completion) -> Iterator[int]:
        """Yield up to ``most`` tokens, each the likeliest one, and keep the times."""
        for index in range(most):
            started = time.perf_counter()
            logits = self._decoder.feed(np.array([feed], np.int64), keep=1)
            token = int(logits[0, -1].argmax())
            seconds = time.perf_counter() - started
            self._fed += feed
            if index:
                done.decode_seconds, done.runs = done.decode_seconds + seconds, done.runs + 1
            else:
                done.prefill_seconds = seconds
            if token in self._stop:
                done.stopped = "end"
                return
            yield token
            feed = [token]
        done.stopped = "length"

    def _rewind(self, ids: list[int]) -> int:
        """Leave in the cache what ``ids`` begin with, and return how many tokens that are; one is always left to read.

        Beyond LongRoPE's switch keys are rotated by other factors than before it: nothing is reused there.
        """
        pairs = zip(self._fed, ids[:-1], strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if self._switch is not None and max(len(self._fed), len(ids)) > self._switch:
            common = 0
        self._decoder.keep(common)
        del self._fed[common:]
        return common


def stream(
    artifact: Path, prompt: str, *, new_tokens: int, chat: bool, threads: int | None, system: str | None = None
) -> Iterator[str]:
    """Yield the completion's text piece by piece.

    Args:
        artifact: The artifact's directory.
        prompt: What to complete, or to answer.
        new_tokens: The most tokens to generate; an end-of-sequence token ends earlier.
        chat: Apply the model's chat template, if it has one.
        threads: Intra-op threads; ``None`` for all cores.
        system: What a conversation begins with.

    Raises:
        UsageError: The artifact is an encoder, or ``system`` is given where there is no conversation.
        CompressError: The artifact or its tokenizer cannot be read, or the prompt does not fit the context.
    """
    writer = Writer(artifact, threads)
    yield from writer.write(prompt_tokens(writer, prompt, chat=chat, system=system), new_tokens)


def prompt_tokens(writer: Writer, prompt: str, *, chat: bool, system: str | None) -> list[int]:
    """Return the tokens of one prompt: of a conversation of one turn where the model has a template.

    Raises:
        UsageError: ``system`` is given where there is no conversation.
    """
    if chat and writer.chats:
        return writer.encode_chat([*opening(system), {"role": "user", "content": prompt}])
    if system is not None:
        raise UsageError("--system belongs to a chat template, which this artifact does not have or --raw leaves out")
    return writer.encode(prompt)


def opening(system: str | None) -> list[dict[str, str]]:
    """Return the messages that a conversation begins with."""
    return [] if system is None else [{"role": "system", "content": system}]


def _decoder(opened: Artifact, threads: int) -> CachedDecoder | StaticDecoder:
    cpu = providers.load("cpu")
    session = cpu.session(opened.model, opened.session_options, threads)
    beside = decode_graph(opened.model, session)
    if beside is None:
        return CachedDecoder(session)
    return StaticDecoder(session, cpu.session(beside, opened.session_options, threads))


def _no_writer(artifact: Path, task: str) -> UsageError:
    """Return what to say of an encoder: its graph is run once a text, and where the answer then is."""
    from compress.inspection import inspect_document

    document = inspect_document(artifact)
    inputs, outputs = (", ".join(item["name"] for item in document[kind]) for kind in ("inputs", "outputs"))
    return UsageError(
        f"this artifact is an encoder ({task}): it reads text and writes none",
        where=str(artifact),
        hint=f"onnxruntime.InferenceSession on its model.onnx: inputs {inputs}; outputs {outputs}",
    )


def _rope_switch(config: Mapping[str, Any]) -> int | None:
    """Return the length where LongRoPE changes its factors, ``None`` of other models."""
    for place in (config, config.get("rope_parameters"), config.get("rope_scaling")):
        found = place.get("original_max_position_embeddings") if isinstance(place, Mapping) else None
        if isinstance(found, int):
            return found
    return None
