"""The worker that runs one artifact: ``python -m compress.validate.worker`` (see ``protocol``).

Request: ``model`` (path of the .onnx), ``provider``, ``session_options`` {str: str}, ``threads``, ``jobs``. A job is
``{"kind": ..., ...}``; its answer stands at the same place in ``results``:

- ``logits``: ``windows`` (.npy int64 ``[windows, length]``) -> ``output`` (.npy float32 ``[windows * length, vocab]``),
  each window on an empty cache;
- ``cached_logits``: the same windows, the first ``prefill`` tokens of each at once, the others one by one through the
  cache -> ``output`` (.npy float32 ``[windows * (length - prefill), vocab]``);
- ``greedy``: ``prompt`` [ids], ``new_tokens`` -> ``tokens`` [ids];
- ``speed``: ``prompt_tokens``, ``new_tokens``, ``repeats`` -> ``prefill_seconds`` [repeat], ``decode_seconds``
  [repeat][step]; one unrecorded warm-up first.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress import providers
from compress.contracts import Provider
from compress.errors import CompressError, ProviderError
from compress.validate.decoding import CachedDecoder
from compress.validate.protocol import Json, peak_rss_bytes, report_progress, serve

Progress = Callable[[float], None]


def handle(request: Json, job: Path) -> Json:
    """Open the session, run the jobs in order, and answer."""
    provider = providers.load(str(request["provider"]))
    usable, reason = provider.available()
    if not usable:
        raise ProviderError(f"the {provider.name} provider does not work here", hint=reason)
    model = Path(request["model"])
    if not model.is_file():
        raise CompressError("there is no such model file", where=str(model))
    start = time.perf_counter()
    session = provider.session(model, request.get("session_options", {}), int(request["threads"]))
    load_seconds = time.perf_counter() - start
    jobs = request["jobs"]
    decoder = CachedDecoder(session) if jobs else None
    results: list[Json] = []
    for index, item in enumerate(jobs):
        run = _JOBS.get(item["kind"])
        if run is None or decoder is None:
            raise CompressError(f"unknown job {item['kind']!r}", where="request")
        results.append(run(decoder, item, _part(job, index, len(jobs))))
    return {
        "results": results,
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "placement": placement(session, provider),
        "evidence": provider.evidence(),
        "versions": versions(),
    }


def placement(session: Any, provider: Provider) -> Json:  # noqa: ANN401 - onnxruntime has no stubs
    """Return where ONNX Runtime put the graph's nodes: totals, and each node that is not on ``provider``."""
    total, fallback = 0, []
    for subgraph in session.get_provider_graph_assignment_info():
        nodes = subgraph.get_nodes()
        total += len(nodes)
        if subgraph.ep_name != provider.onnxruntime_name:
            fallback += [f"{node.name} ({node.op_type}) on {subgraph.ep_name}" for node in nodes]
    return {
        "provider": provider.name,
        "nodes_total": total,
        "nodes_on_provider": total - len(fallback),
        "fallback_nodes": sorted(fallback),
    }


def versions() -> dict[str, str]:
    """Return the versions of what ran: Python, onnxruntime, numpy."""
    import onnxruntime

    return {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__, "numpy": np.__version__}


def open_output(path: str, rows: int, columns: int) -> npt.NDArray[np.float32]:
    """Create a float32 .npy of ``[rows, columns]`` on disk and return it mapped, to be filled."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, columns))


def _part(job: Path, index: int, count: int) -> Progress:
    return lambda fraction: report_progress(job, (index + fraction) / count)


def _logits(decoder: CachedDecoder, item: Json, progress: Progress) -> Json:
    windows = np.load(item["windows"])
    length = windows.shape[1]
    output: npt.NDArray[np.float32] | None = None
    for index, window in enumerate(windows):
        decoder.reset()
        logits = decoder.feed(window[None])[0]
        if logits.shape[0] != length:
            raise CompressError(f"the graph gave logits of {logits.shape[0]} of {length} positions")
        if output is None:
            output = open_output(item["output"], windows.size, logits.shape[1])
        output[index * length : (index + 1) * length] = logits
        progress((index + 1) / len(windows))
    decoder.reset()
    return {"shape": [] if output is None else list(output.shape)}


def _cached_logits(decoder: CachedDecoder, item: Json, progress: Progress) -> Json:
    windows, prefill = np.load(item["windows"]), int(item["prefill"])
    steps = windows.shape[1] - prefill
    output: npt.NDArray[np.float32] | None = None
    for index, window in enumerate(windows):
        decoder.reset()
        decoder.feed(window[None, :prefill], keep=1)
        for step in range(steps):
            logits = decoder.feed(window[None, prefill + step : prefill + step + 1])[0]
            if output is None:
                output = open_output(item["output"], len(windows) * steps, logits.shape[1])
            output[index * steps + step] = logits[-1]
        progress((index + 1) / len(windows))
    decoder.reset()
    return {"shape": [] if output is None else list(output.shape)}


def _greedy(decoder: CachedDecoder, item: Json, progress: Progress) -> Json:
    decoder.reset()
    ids = np.array([item["prompt"]], np.int64)
    tokens: list[int] = []
    count = int(item["new_tokens"])
    while len(tokens) < count:
        ids = decoder.feed(ids, keep=1)[:, -1].argmax(-1)[:, None]
        tokens.append(int(ids[0, 0]))
        progress(len(tokens) / count)
    decoder.reset()
    return {"tokens": tokens}


def _speed(decoder: CachedDecoder, item: Json, progress: Progress) -> Json:
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


_JOBS: dict[str, Callable[[CachedDecoder, Json, Progress], Json]] = {
    "logits": _logits,
    "cached_logits": _cached_logits,
    "greedy": _greedy,
    "speed": _speed,
}

if __name__ == "__main__":
    sys.exit(serve(handle))
