"""From checkpoint rows to stored bytes: read, check, quantize, pack, write - a few rows at a time.

Requires a plan whose every tensor has its place; ensures that the data file is complete. Peak memory is a few megabytes
a thread (for float32 linears: one tensor), whatever the model's size, because rows are quantized independently of each
other and written wherever they belong.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from threadpoolctl import threadpool_limits

from compress.allocator import keep_buffers
from compress.calibrate.smoothing import Smoothing, changed_rows, changes
from compress.contracts import Checkpoint, FloatArray, Quantizer
from compress.package.writer import DataFile
from compress.planning import Fate, Plan
from compress.reading import CHUNK_WEIGHTS, read_rows
from compress.store import AnyArray, Store, compared
from compress.stored_errors import StoredErrors

#: Progress after a number of weights is done: (weights done so far, weights in all).
Progress = Callable[[int, int], None]
#: Told the names of weights that are finished, and the small tensors among them.
Finished = Callable[[Sequence[str], Mapping[str, AnyArray]], None]
#: A flush to the disk takes a moment: it is not made for every weight of a small model.
_TELL_SECONDS = 0.5


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
    done: Collection[str] = (),
    errors: StoredErrors | None = None,
    finished: Finished | None = None,
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
        done: Tensors, by name, that were written already.
        errors: Is told how far what is stored is from what was read.
        finished: Is told, now and then, which weights are finished, and their tensors that are too small for the file;
            all else of them is on the disk then.

    Returns:
        The tensors that are too small for the data file, by planned name.

    Raises:
        SourceError: A weight is NaN or infinite (which tensor, which element), or cannot be read.
    """
    keep_buffers()
    stopped = threading.Event()
    needed = any(fate.scheme is not None and fate.name not in done for fate in plan.fates)
    calibration = calibrate(stopped) if calibrate is not None and needed else None
    stream = _Stream(plan, checkpoint, quantizer, data, calibration, stopped, progress, smoothing, moments, errors)
    tasks = list(_tasks(plan, smoothing, done))
    stream.ledger = _Ledger(tasks, stream.store, finished)
    known = [plan.by_name[name] for name in done]
    stream.written = sum(fate.rows * fate.columns for fate in known if fate.reads)
    for name, array in (smoothing.constants if smoothing is not None else {}).items():
        stream.store.constant(plan.by_name[name].stored[0], array)
    with (
        # One BLAS thread, for all of them together: the order of its sums must not depend on the machine's cores.
        threadpool_limits(limits=1, user_api="blas"),
        ThreadPoolExecutor(max_workers=1, thread_name_prefix="calibrate") as ahead,
        ThreadPoolExecutor(max_workers=threads, thread_name_prefix="quantize") as pool,
    ):
        futures = [*beside]
        futures += [ahead.submit(calibration.run)] if calibration is not None else []
        futures += [pool.submit(stream.run, task) for task in tasks]
        try:
            ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
            # A thread that was stopped has only waited for the one that failed.
            failures = [error for future in ended if (error := future.exception()) is not None]
            for error in sorted(failures, key=lambda error: isinstance(error, Stopped)):
                raise error
        finally:
            # One bad tensor, or Ctrl-C, must not wait for the gigabytes behind it.
            stopped.set()
            for future in futures:
                future.cancel()
    stream.ledger.flush()
    return stream.store.inline


def _tasks(plan: Plan, smoothing: Smoothing | None, done: Collection[str] = ()) -> Iterator[_Task]:
    # A tied table's statistics are those of the head's inputs, the last to be known.
    for fate in sorted(plan.fates, key=lambda fate: fate.tied):
        if not fate.reads or fate.name in done:
            continue
        whole = fate.kind == "matmul" and fate.scheme is None  # transposed on the way: needs all rows at once
        whole = whole or any(piece.whole for piece in fate.reads)
        whole = whole or (smoothing is not None and changes(smoothing, fate.name))
        step = fate.rows if whole else max(1, CHUNK_WEIGHTS // fate.columns)
        for start in range(0, fate.rows, step):
            yield _Task(fate, start, min(start + step, fate.rows))


class _Ledger:
    """Counts tasks, and tells which weights are finished; safe from several threads."""

    def __init__(self, tasks: Sequence[_Task], store: Store, told: Finished | None) -> None:
        self._left = Counter(task.fate.name for task in tasks)
        self._store, self._told = store, told
        self._new: list[Fate] = []
        self._lock, self._last = threading.Lock(), time.monotonic()

    def done(self, fate: Fate) -> None:
        """Take note of a finished task of a weight."""
        with self._lock:
            self._left[fate.name] -= 1
            if not self._left[fate.name]:
                self._new.append(fate)
            if time.monotonic() - self._last > _TELL_SECONDS:
                self._flush()

    def flush(self) -> None:
        """Tell what was not told yet."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        fates, self._new, self._last = self._new, [], time.monotonic()
        if fates and self._told is not None:
            self._store.data.sync()  # what is told to be there is there, whatever happens to the machine
            small = [part.name for fate in fates for part in fate.stored if part.offset is None]
            self._told([fate.name for fate in fates], {name: self._store.inline[name] for name in small})


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
        errors: StoredErrors | None,
    ) -> None:
        self.smoothing, self.moments = smoothing, moments
        self.plan, self.checkpoint, self.quantizer = plan, checkpoint, quantizer
        self.store = Store(plan, data, errors)
        self.calibration, self.stopped = calibration, stopped
        self._progress = progress
        self.written = 0
        self.ledger = _Ledger((), self.store, None)
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
            self.store.rows(fate.stored[0], task.start, rows.reshape(-1, *fate.stored[0].shape[1:]))
        if fate.scheme is None and fate.kind != "vector":
            self.store.floats(fate, task.start, rows)
        self.ledger.done(fate)
        with self._lock:
            self.written += rows.size
            if self._progress is not None:
                self._progress(self.written, self.plan.weight_count)

    def _quantize(self, task: _Task, rows: FloatArray) -> None:
        fate, scheme = task.fate, task.fate.scheme
        assert scheme is not None
        before = compared(fate, task.start, rows)
        importance = self.calibration.importance(fate) if self.calibration is not None else None
        if scheme.activations != "none":
            known = self.moments(fate.name) if self.moments is not None else None
            result = self.quantizer.quantize(rows, scheme, importance, moments=known)
        else:
            result = self.quantizer.quantize(rows, scheme, importance, scale_format=self.plan.scale_format)
        self.store.quantized(fate, task.start, result, before)

    def _transpose(self, fate: Fate, rows: FloatArray) -> None:
        """Store [N, K] as [K, N], a band of columns at a time so that no second copy of the tensor exists."""
        stored = fate.stored[0]
        step = max(1, CHUNK_WEIGHTS // fate.rows)
        for start in range(0, fate.columns, step):
            self.store.rows(stored, start, np.ascontiguousarray(rows[:, start : start + step].T))
