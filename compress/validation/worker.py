"""The worker that runs one artifact: ``python -m compress.validation.worker`` (see ``protocol``).

Request: ``model`` (path of the .onnx), ``provider``, ``session_options`` and ``provider_options`` {str: str},
``threads``, ``jobs``, ``in_pieces`` (true: see that module; the answer has their number as ``pieces``). A job is
``{"kind": ..., ...}``; its answer stands at the same place in ``results``:

- ``probe``: ``inputs`` {name: numbers} -> ``outputs`` {name: numbers}, for graphs of a few float32 numbers;

- ``logits``: ``windows`` (.npy int64 ``[windows, length]``) -> ``output`` (.npy float32 ``[windows * length, vocab]``),
  each window on an empty cache;
- ``cached_logits``: the same windows, the first ``prefill`` tokens of each at once, the others one by one through the
  cache -> ``output`` (.npy float32 ``[windows * (length - prefill), vocab]``);
- ``greedy``: ``prompt`` [ids], ``new_tokens`` -> ``tokens`` [ids];
- ``samples``: ``prompts`` [ids], ``limits`` [new tokens at most], ``stop`` [ids] -> ``tokens`` [new ids, the one that
  ended the text among them], ``limits`` as the graph's cache leaves them;
- ``speed``: ``prompt_tokens``, ``new_tokens``, ``repeats`` -> ``prefill_seconds`` [repeat], ``decode_seconds``
  [repeat][step]; one unrecorded warm-up first;
- an encoder's jobs are in ``encoding``.

A static decoder's other graph, ``decode.onnx``, is loaded too, and counts in the placement.
"""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress import providers
from compress.contracts import Provider
from compress.errors import CompressError, ProviderError
from compress.validation import encoding
from compress.validation.decoding import CachedDecoder
from compress.validation.logits import LogitsWriter
from compress.validation.protocol import Json, peak_rss_bytes, report_progress, serve
from compress.validation.static_decoding import DECODE_NAME, StaticDecoder, decode_graph

Progress = Callable[[float], None]
AnyDecoder = CachedDecoder | StaticDecoder


def handle(request: Json, job: Path) -> Json:
    """Open the session, run the jobs in order, and answer."""
    provider = providers.load(str(request["provider"]))
    usable, reason = provider.available()
    if not usable:
        raise ProviderError(f"the {provider.name} provider does not work here", hint=reason)
    model = Path(request["model"])
    if not model.is_file():
        raise CompressError("there is no such model file", where=str(model))
    if request.get("in_pieces"):
        return _in_pieces(request, model, provider, job)
    start = time.perf_counter()
    options, own = request.get("session_options", {}), request.get("provider_options", {})
    session = provider.session(model, options, int(request["threads"]), own)
    beside = decode_graph(model, session)
    other = None if beside is None else provider.session(beside, options, int(request["threads"]), own)
    load_seconds = time.perf_counter() - start
    jobs = request["jobs"]
    decoder: AnyDecoder | None = None
    results: list[Json] = []
    for index, item in enumerate(jobs):
        kind, part = item["kind"], _part(job, index, len(jobs))
        if kind == "probe":
            results.append(_probe(session, item))
        elif kind in encoding.JOBS:
            results.append(encoding.JOBS[kind](session, item, part))
        elif kind in _JOBS:
            if decoder is None and other is not None:
                decoder = StaticDecoder(session, other)
            decoder = decoder or _decoder(session, provider)
            results.append(_JOBS[kind](decoder, item, part))
        else:
            raise CompressError(f"unknown job {kind!r}", where="request")
    return {
        "results": results,
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "placement": placement(session, provider) if other is None else _both(session, other, provider),
        "evidence": provider.evidence(),
        "device": provider.device(),
        "versions": versions(),
    }


def _decoder(session: Any, provider: Provider) -> CachedDecoder:  # noqa: ANN401 - onnxruntime has no stubs
    """Return a decoder that keeps its cache where the provider wants it.

    Raises:
        ProviderError: It cannot keep such a cache; why.
    """
    decoder = CachedDecoder(session, provider.tokens_at_once(), provider.cache_device)
    reason = provider.supports_cache(decoder.cache_type)
    if reason is not None:
        raise ProviderError(reason, hint="validate on cpu, or export with --set graph.cache_type=float")
    return decoder


def _in_pieces(request: Json, model: Path, provider: Provider, job: Path) -> Json:
    from compress.validation import in_pieces

    done = in_pieces.run(
        model,
        provider,
        request.get("session_options", {}),
        int(request["threads"]),
        request.get("provider_options", {}),
        request["jobs"],
        lambda fraction: report_progress(job, fraction),
    )
    return {
        "results": done.results,
        "load_seconds": done.load_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "placement": _placement(provider, done.nodes),
        "evidence": provider.evidence(),
        "device": provider.device(),
        "versions": versions(),
        "pieces": done.pieces,
    }


def placement(session: Any, provider: Provider) -> Json:  # noqa: ANN401 - onnxruntime has no stubs
    """Return where ONNX Runtime put the graph's nodes: totals, and each node that is not on ``provider``."""
    found: dict[str, list[str]] = {}
    for subgraph in session.get_provider_graph_assignment_info():
        found.setdefault(subgraph.ep_name, []).extend(f"{node.name} ({node.op_type})" for node in subgraph.get_nodes())
    return _placement(provider, found)


def _placement(provider: Provider, nodes: Mapping[str, list[str]]) -> Json:
    total = sum(map(len, nodes.values()))
    owners = [owner for owner in nodes if owner != provider.onnxruntime_name]
    fallback = [f"{node} on {owner}" for owner in owners for node in nodes[owner]]
    return {
        "provider": provider.name,
        "nodes_total": total,
        "nodes_on_provider": total - len(fallback),
        "fallback_nodes": sorted(fallback),
    }


def _both(prefill: Any, decode: Any, provider: Provider) -> Json:  # noqa: ANN401
    first, second = placement(prefill, provider), placement(decode, provider)
    totals = {name: first[name] + second[name] for name in ("nodes_total", "nodes_on_provider")}
    fallen = first["fallback_nodes"] + [f"{DECODE_NAME}: {node}" for node in second["fallback_nodes"]]
    return {"provider": provider.name, **totals, "fallback_nodes": fallen}


def versions() -> dict[str, str]:
    """Return the versions of what ran: Python, onnxruntime, numpy."""
    import onnxruntime

    return {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__, "numpy": np.__version__}


def _part(job: Path, index: int, count: int) -> Progress:
    return lambda fraction: report_progress(job, (index + fraction) / count)


def _probe(session: Any, item: Json) -> Json:  # noqa: ANN401
    names = [output.name for output in session.get_outputs()]
    feeds = {name: np.asarray(values, np.float32) for name, values in item["inputs"].items()}
    found = session.run(names, feeds)
    return {"outputs": {name: np.asarray(array, np.float64).tolist() for name, array in zip(names, found, strict=True)}}


def _logits(decoder: AnyDecoder, item: Json, progress: Progress) -> Json:
    windows = np.load(item["windows"])

    def prefill(window: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return np.asarray(decoder.feed(window[None])[0])

    return _write(decoder, windows, prefill, windows.shape[1], item["output"], progress)


def _cached_logits(decoder: AnyDecoder, item: Json, progress: Progress) -> Json:
    windows, first = np.load(item["windows"]), int(item["prefill"])

    def step_by_step(window: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        decoder.feed(window[None, :first], keep=1)
        return np.stack([decoder.feed(token[None, None])[0, -1] for token in window[first:]])

    return _write(decoder, windows, step_by_step, windows.shape[1] - first, item["output"], progress)


def _write(
    decoder: AnyDecoder,
    windows: npt.NDArray[np.int64],
    run: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]],
    rows: int,
    path: str,
    progress: Progress,
) -> Json:
    """Write ``run(window)``, float32 ``[rows, vocab]``, for each window on an empty cache, one after the other."""
    with contextlib.ExitStack() as stack:
        output: LogitsWriter | None = None
        for index, window in enumerate(windows):
            decoder.reset()
            logits = run(window)
            if len(logits) != rows:
                raise CompressError(f"the graph gave logits of {len(logits)} of {rows} positions")
            if output is None:
                output = stack.enter_context(LogitsWriter(path, len(windows) * rows, logits.shape[1]))
            output.write(index * rows, 0, logits)
            progress((index + 1) / len(windows))
    decoder.reset()
    return {"shape": [] if output is None else list(output.shape)}


def _greedy(decoder: AnyDecoder, item: Json, progress: Progress) -> Json:
    count = int(item["new_tokens"])
    tokens = _written(decoder, item["prompt"], count, frozenset(), lambda done: progress(done / count))
    return {"tokens": tokens}


def _samples(decoder: AnyDecoder, item: Json, progress: Progress) -> Json:
    texts, limits, stop = [], [], frozenset(item["stop"])
    for index, (prompt, limit) in enumerate(zip(item["prompts"], item["limits"], strict=True)):
        room = decoder.slots - len(prompt) if isinstance(decoder, StaticDecoder) else limit
        limits.append(max(0, min(limit, room)))
        texts.append(_written(decoder, prompt, limits[-1], stop, lambda done: None))
        progress((index + 1) / len(item["prompts"]))
    return {"tokens": texts, "limits": limits}


def _written(decoder: AnyDecoder, prompt: list[int], count: int, stop: frozenset[int], progress: Progress) -> list[int]:
    """Return ``count`` tokens after a prompt, greedily, or fewer: up to and including the first of ``stop``."""
    decoder.reset()
    ids = np.array([prompt], np.int64)
    tokens: list[int] = []
    while len(tokens) < count and not (tokens and tokens[-1] in stop):
        ids = decoder.feed(ids, keep=1)[:, -1].argmax(-1)[:, None]
        tokens.append(int(ids[0, 0]))
        progress(len(tokens))
    decoder.reset()
    return tokens


def _speed(decoder: AnyDecoder, item: Json, progress: Progress) -> Json:
    vocab = int(item["vocab_size"])
    prompt = np.random.default_rng(0).integers(0, vocab, (1, int(item["prompt_tokens"])), dtype=np.int64)
    prefill_seconds: list[float] = []
    decode_seconds: list[list[float]] = []
    repeats = int(item["repeats"])
    for repeat in range(repeats + 1):
        decoder.reset()
        start = time.perf_counter()
        ids = decoder.feed(prompt, keep=1)[:, -1].argmax(-1)[:, None]
        prefill = time.perf_counter() - start
        steps = []
        for _ in range(int(item["new_tokens"])):
            start = time.perf_counter()
            ids = decoder.feed(ids, keep=1)[:, -1].argmax(-1)[:, None]
            steps.append(time.perf_counter() - start)
        if repeat:  # the first is the warm-up
            prefill_seconds.append(prefill)
            decode_seconds.append(steps)
        progress((repeat + 1) / (repeats + 1))
    decoder.reset()
    return {"prefill_seconds": prefill_seconds, "decode_seconds": decode_seconds}


_JOBS: dict[str, Callable[[AnyDecoder, Json, Progress], Json]] = {
    "logits": _logits,
    "cached_logits": _cached_logits,
    "greedy": _greedy,
    "samples": _samples,
    "speed": _speed,
}

if __name__ == "__main__":
    sys.exit(serve(handle))
