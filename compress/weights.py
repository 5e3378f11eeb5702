"""From checkpoint rows to stored bytes: read, check, quantize, pack, write - a few rows at a time.

Requires a plan whose every tensor has its place; ensures that the data file is complete. Peak memory is a few megabytes
a thread (for float32 linears: one tensor), whatever the model's size, because rows are quantized independently of each
other and written wherever they belong.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from compress.allocator import keep_buffers
from compress.calibrate.smoothing import Smoothing, changed_rows, changes
from compress.contracts import Checkpoint, FloatArray, QuantizedRows, Quantizer
from compress.package.writer import DataFile
from compress.plan import Fate, Plan, StoredTensor
from compress.quantize.packing import pack_matmul_weight, pack_table, pack_zero_points
from compress.quantize.scales import pack_scales
from compress.quantize.scheme import zero_code
from compress.reading import CHUNK_WEIGHTS, read_rows

#: Progress after a number of weights is done: (weights done so far, weights in all).
Progress = Callable[[int, int], None]
AnyArray = npt.NDArray[Any]


class Stopped(Exception):
    """Another thread failed while this one waited for it."""


class Calibration(Protocol):
    """Finds out how much a weight's input channels matter, while weights stream by."""

    def run(self) -> None:
        """Do the work, in a thread of its own."""
        ...

    def importance(self, fate: Fate) -> FloatArray | None:
        """Return float32 ``[columns]``, waiting for it; ``None`` where nothing is to be known.

        Raises:
            Stopped: The run was stopped meanwhile.
        """
        ...


@dataclass(frozen=True)
class _Task:
    """Rows ``[start, stop)`` of a fate's stacked weight."""

    fate: Fate
    start: int
    stop: int


def write_weights(
    plan: Plan,
    checkpoint: Checkpoint,
    quantizer: Quantizer,
    data: DataFile,
    *,
    calibrate: Callable[[threading.Event], Calibration] | None,
    threads: int,
    progress: Progress | None = None,
    beside: Sequence[Future[None]] = (),
    smoothing: Smoothing | None = None,
    moments: Callable[[str], FloatArray | None] | None = None,
) -> dict[str, AnyArray]:
    """Write every weight of the plan to its place in the data file.

    Args:
        plan: Fates and places.
        checkpoint: Where the rows come from.
        quantizer: The algorithm.
        data: The data file, its space already claimed.
        calibrate: Makes what finds out each weight's importance, given the event that stops it; ``None``: nothing does.
        threads: Threads that quantize; the bytes do not depend on them.
        progress: Called with weights done and weights in all.
        beside: Other work of the same export: its failure ends this too, at once.
        smoothing: Weights that are changed on the way, and the vectors that undo it.
        moments: Gives the second moments of a linear's inputs, by its name; ``None`` where none are known.

    Returns:
        The tensors that are too small for the data file, by planned name.

    Raises:
        SourceError: A weight is NaN or infinite (which tensor, which element), or cannot be read.
    """
    keep_buffers()
    stopped = threading.Event()
    calibration = calibrate(stopped) if calibrate is not None else None
    stream = _Stream(plan, checkpoint, quantizer, data, calibration, stopped, progress, smoothing, moments)
    for name, array in (smoothing.constants if smoothing is not None else {}).items():
        stream.store_constant(plan.by_name[name].stored[0], array)
    with (
        # One BLAS thread, for all of them together: the order of its sums must not depend on the machine's cores.
        threadpool_limits(limits=1, user_api="blas"),
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="calibrate") as ahead,
        ThreadPoolExecutor(max_workers=threads, thread_name_prefix="quantize") as pool,
    ):
        futures = [*beside]
        futures += [ahead.submit(calibration.run)] if calibration is not None else []
        futures += [pool.submit(stream.run, task) for task in _tasks(plan, smoothing)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            # A thread that was stopped has only waited for the one that failed.
            errors = [error for future in done if (error := future.exception()) is not None]
            for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
                raise error
        finally:
            # One bad tensor, or Ctrl-C, must not wait for the gigabytes behind it.
            stopped.set()
            for future in futures:
                future.cancel()
    return stream.inline


def _tasks(plan: Plan, smoothing: Smoothing | None) -> Iterator[_Task]:
    # A tied table's statistics are those of the head's inputs, the last to be known.
    for fate in sorted(plan.fates, key=lambda fate: fate.tied):
        if not fate.reads:
            continue
        whole = fate.kind == "matmul" and fate.scheme is None  # transposed on the way: needs all rows at once
        whole = whole or any(piece.transposed for piece in fate.reads)
        whole = whole or (smoothing is not None and changes(smoothing, fate.name))
        step = fate.rows if whole else max(1, CHUNK_WEIGHTS // fate.columns)
        for start in range(0, fate.rows, step):
            yield _Task(fate, start, min(start + step, fate.rows))


class _Stream:
    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        quantizer: Quantizer,
        data: DataFile,
        calibration: Calibration | None,
        stopped: threading.Event,
        progress: Progress | None,
        smoothing: Smoothing | None,
        moments: Callable[[str], FloatArray | None] | None,
    ) -> None:
        self.smoothing, self.moments = smoothing, moments
        self.plan, self.checkpoint, self.quantizer, self.data = plan, checkpoint, quantizer, data
        self.calibration, self.stopped = calibration, stopped
        self.inline: dict[str, AnyArray] = {}
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def run(self, task: _Task) -> None:
        """Read, check, quantize and write one task's rows."""
        if self.stopped.is_set():
            return
        fate = task.fate
        if self.smoothing is not None and changes(self.smoothing, fate.name):
            rows = changed_rows(self.smoothing, self.plan, self.checkpoint, fate)
        else:
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
        importance = self.calibration.importance(fate) if self.calibration is not None else None
        if scheme.activations != "none":
            known = self.moments(fate.name) if self.moments is not None else None
            self._integer(task, self.quantizer.quantize(rows, scheme, importance, moments=known))
            return
        result = self.quantizer.quantize(rows, scheme, importance, scale_format=self.plan.scale_format)
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

    def _integer(self, task: _Task, result: QuantizedRows) -> None:
        """Store signed codes as [K, N], a column for every row that is quantized here."""
        fate, scheme = task.fate, task.fate.scheme
        codes, scales = fate.part("codes"), fate.part("scales")
        assert scheme is not None and codes is not None and scales is not None
        signed = (result.codes.T.astype(np.int16) - zero_code(scheme.bits)).astype(np.int8)
        if codes.offset is None:
            with self._lock:
                whole = self.inline.setdefault(codes.name, np.zeros(codes.shape, codes.dtype))
                whole[:, task.start : task.stop] = signed
        else:
            for row, values in enumerate(signed):
                self.data.write(codes.offset + row * fate.rows + task.start, values)
        self.store(scales, task.start, result.scales[:, 0])

    def _transpose(self, fate: Fate, rows: FloatArray) -> None:
        """Store [N, K] as [K, N], a band of columns at a time so that no second copy of the tensor exists."""
        stored = fate.stored[0]
        step = max(1, CHUNK_WEIGHTS // fate.rows)
        for start in range(0, fate.columns, step):
            self.store(stored, start, np.ascontiguousarray(rows[:, start : start + step].T))

    def store_constant(self, stored: StoredTensor, array: AnyArray) -> None:
        """Write a whole array, of any shape."""
        if stored.offset is None:
            self.inline[stored.name] = array
        else:
            self.data.write(stored.offset, array)

    def store(self, stored: StoredTensor, row: int, array: AnyArray) -> None:
        """Write rows of a stored tensor, from row ``row`` on."""
        if stored.offset is None:
            with self._lock:
                target = self.inline.setdefault(stored.name, np.zeros(stored.shape, stored.dtype))
                target[row : row + len(array)] = array.reshape(-1, *stored.shape[1:])
            return
        row_bytes = stored.nbytes // stored.shape[0]
        self.data.write(stored.offset + row * row_bytes, array)
