"""The worker that runs the source model in PyTorch: ``python -m compress.validation.reference`` (see ``protocol``).

Request: ``checkpoint`` {reference, adapter, revision, task}, ``threads``, ``jobs``:

- ``logits``: ``windows`` (.npy int64 ``[windows, length]``) -> ``output`` (.npy float32 ``[windows * length, vocab]``),
  one decoder block in memory at a time, with ``by_rows`` (true) less than that;
- ``speed``: ``prompt_tokens``, ``new_tokens``, ``repeats``, ``memory_cap`` (bytes or null) -> ``prefill_seconds``,
  ``decode_seconds``, with the whole float32 model in memory; refused when it is predicted not to fit. With ``samples``
  (a job of that kind) its answer is there as well, made after the clock has stopped;
- ``prompts`` and ``samples`` are in ``source_samples``.
"""

from __future__ import annotations

import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.allocator import return_buffers
from compress.contracts import Checkpoint
from compress.errors import CompressError
from compress.validation import source_samples
from compress.validation.logits import LogitsWriter
from compress.validation.memory import check_memory
from compress.validation.protocol import Json, peak_rss_bytes, report_progress, serve
from compress.validation.streaming import StreamedModel

Progress = Callable[[float], None]
MEMORY_FACTOR = 1.2
HEAD_SHARE = 0.2


def handle(request: Json, job: Path) -> Json:
    """Open the checkpoint, run the jobs in order, and answer."""
    from compress.source import open_checkpoint

    torch.set_num_threads(int(request["threads"]))
    wanted = request["checkpoint"]
    adapter = wanted.get("adapter")
    checkpoint = open_checkpoint(
        wanted["reference"],
        adapter=Path(adapter) if adapter else None,
        revision=wanted.get("revision"),
        task=wanted.get("task"),
    )
    jobs = request["jobs"]
    results = []
    for index, item in enumerate(jobs):
        run = _JOBS.get(item["kind"])
        if run is None:
            raise CompressError(f"unknown job {item['kind']!r}", where="request")
        results.append(run(checkpoint, item, _part(job, index, len(jobs))))
    return {
        "results": results,
        "load_seconds": next((result["load_seconds"] for result in results if "load_seconds" in result), None),
        "peak_rss_bytes": peak_rss_bytes(),
        "placement": None,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what ran: Python, torch, transformers, numpy."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def write_logits(checkpoint: Checkpoint, item: Json, progress: Progress) -> Json:
    """Write the source model's logits for every position of the windows."""
    windows = np.load(item["windows"])
    by_rows = bool(item.get("by_rows"))
    if by_rows:
        return_buffers()
    model = StreamedModel(checkpoint, by_rows=by_rows)
    hidden = model.hidden_states(windows, lambda fraction: progress((1 - HEAD_SHARE) * fraction))
    with LogitsWriter(item["output"], windows.size, model.vocab_size) as output:
        for start, block in model.logits(hidden):
            output.write(0, start, block)
            progress(1 - HEAD_SHARE + HEAD_SHARE * (start + block.shape[1]) / model.vocab_size)
    return {"shape": list(output.shape), "dtype": storage_type(checkpoint)}


def storage_type(checkpoint: Checkpoint) -> str:
    """Return the type that most of the source's bytes are stored in (``BF16``, ``Q4_1``, ...)."""
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors().values():
        sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0]


def _speed(checkpoint: Checkpoint, item: Json, progress: Progress) -> Json:
    streamed = StreamedModel(checkpoint)
    check_memory(int(streamed.parameters() * 4 * MEMORY_FACTOR), item.get("memory_cap"))
    start = time.perf_counter()
    streamed.fill_all()
    load_seconds = time.perf_counter() - start
    prompt = np.random.default_rng(0).integers(0, streamed.vocab_size, (1, int(item["prompt_tokens"])), dtype=np.int64)
    prefill_seconds: list[float] = []
    decode_seconds: list[list[float]] = []
    repeats = int(item["repeats"])
    for repeat in range(repeats + 1):
        prefill, steps = _generate(streamed.model, torch.from_numpy(prompt), int(item["new_tokens"]))
        if repeat:  # the first is the warm-up
            prefill_seconds.append(prefill)
            decode_seconds.append(steps)
        progress((repeat + 1) / (repeats + 1))
    times = {
        "prefill_seconds": prefill_seconds,
        "decode_seconds": decode_seconds,
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak_rss_bytes(),  # samples are no part of what is compared
    }
    samples = item.get("samples")
    return times if samples is None else {**times, "samples": source_samples.whole(streamed.model, samples)}


@torch.inference_mode()
def _generate(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, list[float]]:
    """Return the seconds of the prefill and of each greedy step with transformers' own cache."""
    start = time.perf_counter()
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    ids = out.logits[:, -1].argmax(-1, keepdim=True)
    prefill = time.perf_counter() - start
    steps = []
    for _ in range(new_tokens):
        start = time.perf_counter()
        out = model(input_ids=ids, cache=out.past_key_values, use_cache=True, logits_to_keep=1)
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        steps.append(time.perf_counter() - start)
    return prefill, steps


def _part(job: Path, index: int, count: int) -> Progress:
    return lambda fraction: report_progress(job, (index + fraction) / count)


_JOBS: dict[str, Callable[[Checkpoint, Json, Progress], Json]] = {
    "logits": write_logits,
    "speed": _speed,
    "prompts": source_samples.encode,
    "samples": source_samples.ahead,
}

if __name__ == "__main__":
    sys.exit(serve(handle))
