"""From checkpoint rows to stored bytes: read, check, quantize, pack, write - a few rows at a time.

Requires a plan whose every tensor has its place; ensures that the data file is complete. Peak memory is a few megabytes
a thread (for float32 linears: one tensor), whatever the model's size, because rows are quantized independently of each
other and written wherever they belong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.contracts import Checkpoint, FloatArray, Quantizer, Slice
from compress.errors import SourceError
from compress.package.writer import DataFile
from compress.plan import Fate, Plan, StoredTensor
from compress.quantize.finite import first_nonfinite
from compress.quantize.packing import pack_matmul_weight, pack_table, pack_zero_points
from compress.quantize.scales import pack_scales

#: Weights a task holds as float32 at once: 8 MiB of them, small enough for the promise, large enough to read well.
CHUNK_WEIGHTS = 1 << 21
#: Progress after a number of weights is done: (weights done so far, weights in all).
Progress = Callable[[int, int], None]
AnyArray = npt.NDArray[Any]


@dataclass(frozen=True)
class _Task:
    """Rows ``[start, stop)`` of a fate's stacked weight."""

    fate: Fate
    start: int
    stop: int


def read_inline(plan: Plan, checkpoint: Checkpoint, quantizer: Quantizer) -> dict[str, AnyArray]:
    """Return the values of the planned tensors that stay in the graph file, by planned name."""
    stream = _Stream(plan, checkpoint, quantizer, None, None)
    for fate in plan.fates:
        if fate.reads and any(stored.offset is None for stored in fate.stored):
            stream.run(_Task(fate, 0, fate.rows))
    return stream.inline


def write_weights(
    plan: Plan,
    checkpoint: Checkpoint,
    quantizer: Quantizer,
    data: DataFile,
    *,
    constants: Mapping[str, FloatArray],
    threads: int,
    progress: Progress | None = None,
) -> None:
    """Write every planned tensor that has its place in the data file.

    Raises:
        SourceError: A weight is NaN or infinite (which tensor, which element), or cannot be read.
    """
    stream = _Stream(plan, checkpoint, quantizer, data, progress)
    for name, array in constants.items():
        stream.store(plan.by_name[name].stored[0], 0, array)
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="quantize") as pool:
        futures = [pool.submit(stream.run, task) for task in _tasks(plan)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            # One bad tensor, or Ctrl-C, must not wait for the gigabytes behind it.
            stream.stopped.set()
            for future in futures:
                future.cancel()


def _tasks(plan: Plan) -> Iterator[_Task]:
    for fate in plan.fates:
        if not fate.reads:
            continue
        whole = fate.kind == "matmul" and fate.scheme is None  # transposed on the way: needs all rows at once
        whole = whole or any(piece.transposed for piece in fate.reads)
        step = fate.rows if whole else max(1, CHUNK_WEIGHTS // fate.columns)
        for start in range(0, fate.rows, step):
            yield _Task(fate, start, min(start + step, fate.rows))


class _Stream:
    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        quantizer: Quantizer,
        data: DataFile | None,
        progress: Progress | None,
    ) -> None:
        self.plan, self.checkpoint, self.quantizer, self.data = plan, checkpoint, quantizer, data
        self.inline: dict[str, AnyArray] = {}
        self.stopped = threading.Event()
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()
        self._norms: dict[str, FloatArray] = {}

    def run(self, task: _Task) -> None:
        """Read, check, quantize and write one task's rows."""
        if self.stopped.is_set():
            return
        fate = task.fate
        rows = read_rows(self.checkpoint, fate, task.start, task.stop)
        if fate.scheme is not None:
            self._quantize(task, rows)
        elif fate.kind == "matmul":
            self._transpose(fate, rows)
        else:
            self.store(fate.stored[0], task.start, rows.reshape(-1, *fate.stored[0].shape[1:]))
        with self._lock:
            self._done += rows.size
            if self._progress is not None:
                self._progress(self._done, self.plan.weight_count)

    def _quantize(self, task: _Task, rows: FloatArray) -> None:
        fate, scheme = task.fate, task.fate.scheme
        assert scheme is not None
        result = self.quantizer.quantize(rows, scheme, self._importance(fate), scale_format=self.plan.scale_format)
        packed = (
            pack_table(result.codes, scheme, fate.columns)
            if fate.kind == "table"
            else pack_matmul_weight(result.codes, scheme)
        )
        scales, row_scales = pack_scales(result.scales, self.plan.scale_format)
        parts: dict[str, AnyArray] = {"codes": packed, "scales": scales}
        if row_scales is not None:
            parts["row_scales"] = row_scales[:, None]
        if result.zero_points is not None:
            parts["zero_points"] = pack_zero_points(result.zero_points, scheme)
        for kind, array in parts.items():
            stored = fate.part(kind)
            assert stored is not None, f"{fate.name}: the plan has no place for {kind}"
            self.store(stored, task.start, array)

    def _transpose(self, fate: Fate, rows: FloatArray) -> None:
        """Store [N, K] as [K, N], a band of columns at a time so that no second copy of the tensor exists."""
        stored = fate.stored[0]
        step = max(1, CHUNK_WEIGHTS // fate.rows)
        for start in range(0, fate.columns, step):
            self.store(stored, start, np.ascontiguousarray(rows[:, start : start + step].T))

    def _importance(self, fate: Fate) -> FloatArray | None:
        """Return the squared norm weight of each input channel: what the data-free search knows of its inputs."""
        if not fate.norm:
            return None
        name = fate.norm[0]
        if name not in self._norms:
            norm = self.plan.by_name[name]
            weight = read_rows(self.checkpoint, norm, 0, norm.rows).reshape(-1)
            # Importance counts up to a factor; a power of two changes no digit and keeps the square in range.
            _, exponent = np.frexp(np.abs(weight).max())
            self._norms[name] = np.square(np.ldexp(weight, -int(exponent)))
        return self._norms[name]

    def store(self, stored: StoredTensor, row: int, array: AnyArray) -> None:
        """Write rows of a stored tensor, from row ``row`` on."""
        if stored.offset is None:
            with self._lock:
                target = self.inline.setdefault(stored.name, np.zeros(stored.shape, stored.dtype))
                target[row : row + len(array)] = array
            return
        if self.data is None:
            return
        row_bytes = stored.nbytes // stored.shape[0]
        self.data.write(stored.offset + row * row_bytes, array)


def read_rows(checkpoint: Checkpoint, fate: Fate, start: int, stop: int) -> FloatArray:
    """Return rows ``[start, stop)`` of a fate's stacked weight, float32 ``[stop - start, columns]``, checked finite.

    Raises:
        SourceError: A value is NaN or infinite; the message names tensor and element.
    """
    parts: list[FloatArray] = []
    below = 0
    for piece in fate.reads:
        length = _length(piece, checkpoint)
        first, last = max(start - below, 0), min(stop - below, length)
        below += length
        if first < last:
            parts.append(_read_piece(checkpoint, piece, piece.start + first, piece.start + last))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _length(piece: Slice, checkpoint: Checkpoint) -> int:
    if piece.stop is not None:
        return piece.stop - piece.start
    shape = checkpoint.tensors()[piece.tensor].shape
    return (shape[-1] if piece.transposed else shape[0]) - piece.start


def _read_piece(checkpoint: Checkpoint, piece: Slice, first: int, last: int) -> FloatArray:
    if piece.transposed:
        whole = checkpoint.read(piece.tensor)
        array = np.ascontiguousarray(whole[:, first:last].T)
    else:
        array = checkpoint.read(piece.tensor, first, last)
    bad = first_nonfinite(array)
    if bad is not None:
        row = bad[0] + first
        raise SourceError(
            f"a weight is not a finite number: {array[bad]}",
            where=f"{piece.tensor}, {'column' if piece.transposed else 'row'} {row}",
            hint="the checkpoint is damaged, or its training diverged; fetch it again",
        )
    return array
