"""Try an artifact: greedy completion with ONNX Runtime on the CPU, token by token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from compress import prompts, providers
from compress.errors import CompressError, UsageError
from compress.validation.artifact import DECODING, Artifact, open_artifact
from compress.validation.decoding import CachedDecoder
from compress.validation.static_decoding import StaticDecoder, decode_graph


def stream(artifact: Path, prompt: str, *, new_tokens: int, chat: bool, threads: int | None) -> Iterator[str]:
    """Yield the completion's text piece by piece.

    Args:
        artifact: The artifact's directory.
        prompt: What to complete, or to answer.
        new_tokens: The most tokens to generate; an end-of-sequence token ends earlier.
        chat: Apply the model's chat template, if it has one.
        threads: Intra-op threads; ``None`` for all cores.

    Raises:
        UsageError: The artifact is an encoder.
        CompressError: The artifact or its tokenizer cannot be read, or the prompt does not fit the context.
    """
    opened = open_artifact(artifact)
    if opened.task != DECODING:
        raise _no_writer(artifact, opened.task)
    tokenizer = prompts.tokenizer_of(artifact)
    ids = prompts.encode(tokenizer, prompt, chat)
    if not ids:
        raise CompressError("the prompt is empty", hint="give at least one word")
    decoder = _decoder(opened, threads or os.cpu_count() or 1)
    slots = decoder.slots if isinstance(decoder, StaticDecoder) else 1 << 30
    room = min(opened.context_length or 1 << 30, slots) - len(ids)
    if room < 1:
        raise CompressError(
            f"the prompt has {len(ids)} tokens, the model's context {len(ids) + room}", hint="shorten the prompt"
        )
    stop = prompts.end_tokens(artifact)
    made: list[int] = []
    shown = ""
    feed = np.array([ids], np.int64)
    for _ in range(min(new_tokens, room)):
        token = int(decoder.feed(feed, keep=1)[0, -1].argmax())
        if token in stop:
            break
        made.append(token)
        # Decoding everything again is the only way that is right for every tokenizer (spaces, split characters).
        text = tokenizer.decode(made, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
        feed = np.array([[token]], np.int64)


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
