"""Functions of :mod:`compress.api` for artifacts that are there: measured again, timed, read, tried."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import api_arguments as arguments
from compress.api_arguments import AnyPath
from compress.errors import UsageError
from compress.progress import Stages
from compress.report.model import Report

if TYPE_CHECKING:
    from compress.report.model import AnySpeed


def validate(
    artifact: AnyPath,
    *,
    reference: AnyPath | None = None,
    adapter: AnyPath | None = None,
    on: Sequence[str] = (),
    eval_text: AnyPath | None = None,
    eval_labels: AnyPath | None = None,
    max_memory: int | str | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> Report:
    """Measure an artifact again: drift against its source, speed, placement: ``compress validate``.

    Its ``report.json`` and ``manifest.json`` are renewed.

    Args:
        artifact: The artifact's directory.
        reference: The source model; by default the one that the manifest names (it keeps no local paths).
        adapter: The adapter that the artifact was made with.
        on: Execution providers to run on; by default the profile's.
        eval_text: UTF-8 text to measure drift on; by default built in.
        eval_labels: Labelled examples, one JSON object a line (encoders).
        max_memory: Refuse to start if it would take more: bytes, or text with a unit. A decoder that does not fit whole
            is run a block at a time, and speed and samples are not measured.
        threads: Threads to use, by default all cores.
        progress: Show stages on standard error.

    Returns:
        The report; ``passed`` says whether the budget is kept, ``providers`` what each provider did.

    Raises:
        UsageError: The source is a local path, and no reference was given.
        ResourceError: It would take more memory than ``max_memory``.
        ProviderError: A provider does not work here.
        CompressError: The reference is another model, or something cannot be read.

    Examples:
        >>> import compress
        >>> report = compress.validate("out/too-strict", reference="tiny-llama")
        >>> report.passed, report.verdict.status
        (False, 'fail')
        >>> [(item.provider, item.state) for item in report.providers]
        [('cpu', 'ran')]
    """
    from compress import proof

    made, _ = proof.validate_artifact(
        Path(artifact),
        reference=None if reference is None else os.fspath(reference),
        adapter=arguments.path(adapter),
        providers=arguments.words(on),
        eval_text=arguments.path(eval_text),
        eval_labels=arguments.path(eval_labels),
        max_memory=arguments.size(max_memory),
        threads=arguments.checked_threads(threads),
        stages=Stages(show=progress),
    )
    return Report.model_validate(made)


def bench(
    artifact: AnyPath,
    *,
    on: Sequence[str] = (),
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    repeats: int = 5,
    threads: int | None = None,
) -> tuple[AnySpeed, ...]:
    """Time an artifact - load, prefill, decode or latency, peak memory - and write nothing: ``compress bench``.

    Args:
        artifact: The artifact's directory.
        on: Execution providers to run on; by default the profile's.
        prompt_tokens: Length of the prompt (decoders).
        new_tokens: Tokens to generate, 2 at least (decoders).
        repeats: Measured runs.
        threads: Threads to use, by default all cores.

    Returns:
        One entry a provider: :class:`~compress.report.model.Speed` of a decoder,
        :class:`~compress.report.model.EncoderSpeed` of an encoder.

    Raises:
        UsageError: The numbers do not fit the model's context, or are out of range.
        ProviderError: A provider does not work here.

    Examples:
        >>> import compress
        >>> (speed,) = compress.bench("out/tiny-int4", prompt_tokens=8, new_tokens=4, repeats=1)
        >>> speed.provider, speed.evidence, speed.decode_tokens_per_second.median > 0
        ('cpu', 'measured', True)
    """
    from pydantic import TypeAdapter

    from compress import proof
    from compress.report.model import AnySpeed

    if prompt_tokens < 1 or new_tokens < 2 or not 1 <= repeats <= 1000:
        raise UsageError(
            f"{prompt_tokens} prompt tokens, {new_tokens} new tokens, {repeats} repeats cannot be timed",
            hint="at least 1 prompt token, 2 new tokens, and 1 to 1000 repeats",
        )
    document = proof.bench_artifact(
        Path(artifact),
        providers=arguments.words(on),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        threads=arguments.checked_threads(threads),
    )
    found: tuple[AnySpeed, ...] = TypeAdapter(tuple[AnySpeed, ...]).validate_python(document["speed"])
    return found


def load_report(path: AnyPath) -> Report:
    """Read a report that an export or a validation wrote; one of an older schema version is read as today's.

    Args:
        path: An artifact's directory, or a ``report.json``.

    Raises:
        CompressError: The file is missing or damaged, or of a newer schema version.

    Examples:
        >>> import compress
        >>> report = compress.load_report("out/too-strict")
        >>> report.verdict.status, report.profile.name
        ('fail', 'arm-int4')
        >>> report.drift.kl_divergence.mean > 1e-6
        True
    """
    from compress.report import json as report_json

    given = Path(path)
    return report_json.read(given / report_json.NAME if given.is_dir() else given)


def inspect(artifact: AnyPath) -> dict[str, Any]:
    """Read what an artifact says of itself, without its weights: what ``compress inspect --json`` prints.

    Args:
        artifact: The artifact's directory.

    Raises:
        CompressError: It is not an artifact, or its graph cannot be read.

    Examples:
        >>> import compress
        >>> document = compress.inspect("out/tiny-int4")
        >>> document["operators"]["MatMulNBits"], document["inputs"][0]["name"]
        (13, 'input_ids')
    """
    from compress.inspection import inspect_document

    return inspect_document(Path(artifact))


def generate(
    artifact: AnyPath, prompt: str, *, new_tokens: int = 64, raw: bool = False, threads: int | None = None
) -> Iterator[str]:
    """Complete a prompt greedily on the CPU, and yield the text as it comes: ``compress generate``.

    Nothing is loaded, and nothing raised, before the first piece is asked for.

    Args:
        artifact: A decoder's artifact.
        prompt: What to complete, or to answer.
        new_tokens: The most tokens to generate; an end-of-sequence token ends earlier.
        raw: Do not apply the model's chat template.
        threads: Threads to use, by default all cores.

    Raises:
        UsageError: The artifact is an encoder's.
        CompressError: It cannot be read, or the prompt is empty or longer than the context.

    Examples:
        >>> import compress
        >>> text = "".join(compress.generate("out/tiny-int4", "The module", new_tokens=6))
        >>> isinstance(text, str)
        True
    """
    from compress.generation import stream

    if new_tokens < 1:
        raise UsageError(f"new_tokens is {new_tokens}", hint="1 or more")
    yield from stream(
        Path(artifact), prompt, new_tokens=new_tokens, chat=not raw, threads=arguments.checked_threads(threads)
    )
