"""An encoder's graph in the worker that runs artifacts: its jobs, beside the decoder's in ``worker``.

- ``encode``: ``texts`` (an ``Encoded`` on disk), ``task``, ``batch``, ``pad_id`` -> ``output`` (.npy float32
  ``[rows, columns]``). Texts are padded in batches in the order they stand, lengths mixed. Rows by task: an embedding
  or a class distribution a text; labels, ``(start, end)`` or the vocabulary a kept token;
- ``latency``: ``points`` [[batch, length]], ``seconds``, ``runs``, ``vocab_size`` -> ``seconds`` [point][run]. Every
  point is run once unrecorded, then until ``seconds`` have passed, at most ``runs`` times.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.errors import CompressError
from compress.validation.encoded import Batch, Encoded, padded_batches
from compress.validation.logits import LogitsWriter
from compress.validation.protocol import Json

FloatArray = npt.NDArray[np.float32]
Progress = Callable[[float], None]

#: Outputs with one number a token; others with something for each token have an axis more than those a text.
_TOKEN_NUMBERS = ("start_logits", "end_logits")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class Encoder:
    """A session of an encoder, by its inputs' and outputs' names alone.

    A graph of static shapes ``[1, length]`` is given text by text, padded to its length.

    Raises:
        CompressError: The graph's inputs are not an encoder's.
    """

    def __init__(self, session: Any) -> None:  # noqa: ANN401 - onnxruntime has no stubs
        self._session = session
        self._inputs = [value.name for value in session.get_inputs()]
        self.outputs = [value.name for value in session.get_outputs()]
        first = session.get_inputs()[0].shape
        self._length = first[1] if all(isinstance(size, int) for size in first) else None
        unknown, missing = sorted(set(self._inputs) - set(_INPUTS)), sorted({"input_ids"} - set(self._inputs))
        if unknown or missing:
            raise CompressError(
                "the graph is not an encoder", where=f"unknown inputs {unknown}, missing inputs {missing}"
            )

    def run(self, batch: Batch, names: list[str]) -> list[npt.NDArray[Any]]:
        """Return the named outputs for a batch."""
        feeds = dict(zip(_INPUTS, (batch.ids, batch.mask, batch.types), strict=True))
        given = {name: feeds[name] for name in self._inputs}
        found: list[npt.NDArray[Any]]
        if self._length is None:
            found = self._session.run(names, given)
            return found
        size = batch.ids.shape[1]
        if size > self._length:
            raise CompressError(f"a sequence of {size} tokens is longer than the graph's {self._length}")
        padding = ((0, 0), (0, self._length - size))
        wide = {name: np.pad(array, padding) for name, array in given.items()}
        rows = [
            self._session.run(names, {name: array[row : row + 1] for name, array in wide.items()})
            for row in range(len(batch.ids))
        ]
        found = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
        return [
            array[:, :size] if array.ndim > 2 or name in _TOKEN_NUMBERS else array
            for name, array in zip(names, found, strict=True)
        ]


def rows_of(task: str, outputs: Mapping[str, npt.NDArray[Any]], batch: Batch) -> FloatArray:
    """Return what is compared of a batch's outputs, float32 ``[rows, columns]``.

    Raises:
        CompressError: An output's shape is not the task's.
    """
    first = next(iter(outputs.values()))
    wanted = (
        batch.ids.shape
        if task != "text-classification" and "sentence_embedding" not in outputs
        else batch.ids.shape[:1]
    )
    ranks = len(wanted) + (0 if task == "question-answering" else 1)
    for name, array in outputs.items():
        if array.ndim != ranks or array.shape[: len(wanted)] != wanted:
            raise CompressError(
                f"the output's shape is {list(array.shape)} for inputs {list(batch.ids.shape)}", where=name
            )
    if task == "question-answering":
        both = np.stack([outputs["start_logits"], outputs["end_logits"]], axis=-1)
        return np.asarray(both[batch.keep], np.float32)
    if task == "embedding" and "sentence_embedding" not in outputs:
        weights = batch.mask[..., None].astype(np.float64)
        return np.asarray((first * weights).sum(axis=1) / weights.sum(axis=1), np.float32)
    return np.asarray(first if task in ("embedding", "text-classification") else first[batch.keep], np.float32)


def outputs_of(task: str, present: list[str]) -> list[str]:
    """Return the graph outputs to fetch for a task: the pooled embedding where there is one.

    Raises:
        CompressError: The graph lacks one.
    """
    if task == "embedding":
        names = ["sentence_embedding"] if "sentence_embedding" in present else ["last_hidden_state"]
    else:
        names = ["start_logits", "end_logits"] if task == "question-answering" else ["logits"]
    missing = sorted(set(names) - set(present))
    if missing:
        raise CompressError(f"the graph lacks the output {missing[0]} of {task}", where=f"its outputs: {present}")
    return names


def write_rows(
    encoded: Encoded,
    task: str,
    path: str,
    batches: Any,
    run: Callable[[Batch], FloatArray],
    progress: Progress,  # noqa: ANN401
) -> Json:
    """Write ``run(batch)`` of every batch to its texts' rows of a file, and return the file's shape."""
    counts = encoded.rows_of_texts(task)
    starts = np.cumsum(counts) - counts
    done = 0
    with contextlib.ExitStack() as stack:
        output: LogitsWriter | None = None
        for batch in batches:
            rows = run(batch)
            if output is None:
                output = stack.enter_context(LogitsWriter(path, encoded.rows(task), rows.shape[1]))
            begin = 0
            for text in batch.texts:
                output.write(int(starts[text]), 0, rows[begin : begin + counts[text]])
                begin += int(counts[text])
            done += len(batch.texts)
            progress(done / len(encoded))
    return {"shape": [] if output is None else list(output.shape)}


def timed(run: Callable[[], object], seconds: float, runs: int) -> list[float]:
    """Return the seconds of each recorded run.

    The first is a warm-up and not recorded. Then it runs until ``seconds`` have passed, 2 to ``runs`` times; once only
    if the warm-up alone took longer than that: the rounds of a measurement bring the others.
    """
    begin = time.perf_counter()
    run()
    least = 1 if time.perf_counter() - begin > seconds else 2
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < least or (len(found) < runs and time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def random_batch(batch: int, length: int, vocab_size: int) -> Batch:
    """Return ``batch`` sequences of random tokens without padding; seeded."""
    ids = np.random.default_rng(0).integers(0, vocab_size, (batch, length), dtype=np.int64)
    whole = np.ones_like(ids)
    return Batch(np.arange(batch), ids, whole, np.zeros_like(ids), whole.astype(np.bool_))


def _encode(session: Any, item: Json, progress: Progress) -> Json:  # noqa: ANN401
    encoder, task = Encoder(session), str(item["task"])
    encoded = Encoded.load(item["texts"])
    names = outputs_of(task, encoder.outputs)

    def run(batch: Batch) -> FloatArray:
        return rows_of(task, dict(zip(names, encoder.run(batch, names), strict=True)), batch)

    batches = padded_batches(encoded, int(item["batch"]), int(item["pad_id"]))
    return write_rows(encoded, task, item["output"], batches, run, progress)


def _latency(session: Any, item: Json, progress: Progress) -> Json:  # noqa: ANN401
    encoder, points = Encoder(session), item["points"]
    found: list[list[float]] = []
    for batch, length in points:
        tokens = random_batch(batch, length, int(item["vocab_size"]))
        found.append(timed(lambda: encoder.run(tokens, encoder.outputs), item["seconds"], int(item["runs"])))  # noqa: B023
        progress(len(found) / len(points))
    return {"seconds": found}


JOBS: dict[str, Callable[[Any, Json, Progress], Json]] = {"encode": _encode, "latency": _latency}
