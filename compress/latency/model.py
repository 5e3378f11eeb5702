"""How long a run takes on this machine, predicted from measured parts.

The time of a run is the sum of its parts' (:mod:`compress.latency.parts`), each measured in ONNX Runtime as a chain of
copies of itself, with caches as full of other weights as in the model. Sizes between the measured ones are
interpolated: a grid of four points an octave, for FFN neurons, for groups of heads and for the rows of a head.

What is not in it: a runtime's start, the tokenizer, memory that runs short, other processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Protocol

from compress.latency.geometry import Geometry
from compress.latency.parts import Attention, Empty, Ends, FeedForward, Part, Point, Product, Workload
from compress.latency.store import Store
from compress.validation.protocol import run_worker

#: Weights of a chain, at least where a few copies have as many: several of each core's own caches.
CHAIN_BYTES = 32 << 20
#: Bytes of other weights beyond which every processor's shared cache holds nothing of a part any more.
MAX_FOOTPRINT = 256 << 20
#: Fewer would show what it costs to come back to a processor that has just read something else.
_FEWEST_COPIES, _MOST_COPIES = 6, 32
_ROUNDS, _SECONDS = 4, 0.06
_TIMEOUT = 3600.0
#: FFN neurons below this are measured as they are.
_FINE_INNER = 64
_FINE_GROUPS = 4
_FINE_ROWS = 1024

Progress = Callable[[float], None]
Measure = Callable[[list[Point], int, Progress], list[float]]


def measure(points: list[Point], threads: int, progress: Progress) -> list[float]:
    """Measure points in a worker of their own; seconds of one run of each chain.

    Raises:
        WorkerError: The worker crashed or hung.
    """
    request = {
        "points": [point.as_request() for point in points],
        "threads": threads,
        "rounds": _ROUNDS,
        "seconds": _SECONDS,
    }
    response = run_worker("latency.worker", request, timeout=_TIMEOUT, progress=progress)
    return [min(times) for times in response["results"]]


class Sizes(Protocol):
    """What is kept of a model, as :class:`compress.prune.amounts.Amounts` has it."""

    @property
    def inner(self) -> int:
        """FFN neurons of a block."""
        ...

    @property
    def heads(self) -> int:
        """Query heads of a block."""
        ...

    @property
    def kv_heads(self) -> int:
        """Key/value heads of a block."""
        ...

    @property
    def layers(self) -> int:
        """Blocks."""
        ...


class LatencyModel:
    """Predicted seconds of a run on this machine.

    Args:
        threads: Threads inside an operator.
        measure: What measures points; in a worker by default.
        store: Where measured points are kept; this machine's cache by default.
        progress: Called with a fraction in 0..1 while points are measured.
    """

    def __init__(
        self,
        threads: int,
        *,
        measure: Measure = measure,
        store: Store | None = None,
        progress: Progress = lambda fraction: None,
    ) -> None:
        self.threads = threads
        self._measure, self._store, self._progress = measure, store or Store(threads), progress
        self._known = self._store.read()

    def seconds(self, geometry: Geometry, workload: Workload) -> float:
        """Return the predicted time of one run; what is not known yet is measured first."""
        return sum(self.breakdown(geometry, workload).values())

    def breakdown(self, geometry: Geometry, workload: Workload) -> dict[str, float]:
        """Return the predicted seconds of ``attention``, ``feed_forward``, ``head`` and ``ends`` in one run."""
        self.prepare([geometry], workload)
        found = dict.fromkeys(("attention", "feed_forward", "head", "ends"), 0.0)
        for part, count in geometry.parts().items():
            found[_label(part)] += count * self._part(part, workload, geometry)
        return found

    def predictor(self, geometry: Geometry, workload: Workload, sizes: Iterable[Sizes]) -> Callable[[Sizes], float]:
        """Return a function from sizes of a model to seconds of a run; all of ``sizes`` are measured for at once."""

        def resized(size: Sizes) -> Geometry:
            return geometry.resized(inner=size.inner, heads=size.heads, kv_heads=size.kv_heads, layers=size.layers)

        # Halves are measured by their own sizes: what differs in depth alone needs nothing of its own.
        distinct = {(size.inner, size.heads, size.kv_heads): size for size in sizes}
        self.prepare([resized(size) for size in distinct.values()], workload)
        return lambda size: self.seconds(resized(size), workload)

    def product(self, product: Product, workload: Workload, footprint: int = MAX_FOOTPRINT) -> float:
        """Return the seconds of one linear alone, for comparisons of ways to store it."""
        point = _point(product, workload, footprint)
        self._ensure([point, _empty()])
        return self._own(point)

    def prepare(self, geometries: Iterable[Geometry], workload: Workload) -> None:
        """Measure everything that predictions for these geometries need, in one worker."""
        points = [point for geometry in geometries for point in points_of(geometry, workload)]
        self._ensure(list(dict.fromkeys(points)))

    def knows(self, geometry: Geometry, workload: Workload) -> bool:
        """Return whether a prediction would measure nothing."""
        return all(point.key in self._known for point in points_of(geometry, workload))

    def _part(self, part: Part, workload: Workload, geometry: Geometry) -> float:
        return sum(
            weight * self._own(_point(neighbour, workload, geometry.footprint))
            for weight, neighbour in neighbours(part)
        )

    def _own(self, point: Point) -> float:
        """Return the seconds of one copy, what any run costs taken off; the ends bear that."""
        whole = self._known[point.key]
        if isinstance(point.part, Ends):
            return whole
        return max(0.0, whole - self._known[_empty().key]) / point.copies

    def _ensure(self, points: list[Point]) -> None:
        missing = [point for point in points if point.key not in self._known]
        if not missing:
            return
        times = self._measure(missing, self.threads, self._progress)
        found = {point.key: seconds for point, seconds in zip(missing, times, strict=True)}
        self._store.add(found)
        self._known |= found


def points_of(geometry: Geometry, workload: Workload) -> list[Point]:
    """Return everything that a prediction needs measured."""
    parts = [neighbour for part in geometry.parts() for _, neighbour in neighbours(part)]
    return [_empty(), *dict.fromkeys(_point(part, workload, geometry.footprint) for part in parts)]


def neighbours(part: Part) -> list[tuple[float, Part]]:
    """Return the parts of measured sizes whose weighted sum stands for a part; weights sum to 1."""
    if isinstance(part, FeedForward):
        return [(weight, replace(part, inner=size)) for weight, size in _between(part.inner, _FINE_INNER)]
    if isinstance(part, Attention):
        return [(weight, replace(part, kv_heads=size)) for weight, size in _between(part.kv_heads, _FINE_GROUPS)]
    if isinstance(part, Product):
        return [(weight, replace(part, outputs=size)) for weight, size in _between(part.outputs, _FINE_ROWS)]
    return [(1.0, part)]


def _between(size: int, fine: int) -> list[tuple[float, int]]:
    """Return the grid's points around a size, with the weights of linear interpolation."""
    if size < fine:
        return [(1.0, size)]
    step = (1 << int(math.log2(size))) // 4 or 1
    low = size // step * step
    if low == size:
        return [(1.0, size)]
    share = (size - low) / step
    return [(1 - share, low), (share, low + step)]


def _point(part: Part, workload: Workload, footprint: int) -> Point:
    """Return what is measured of a part of a model that reads ``footprint`` bytes of weights in a run."""
    if isinstance(part, Ends | Empty):
        return Point(part, workload, 1, 0)
    copies = min(max(-(-CHAIN_BYTES // part.nbytes), _FEWEST_COPIES), _MOST_COPIES)
    copies = min(copies, max(1, MAX_FOOTPRINT // part.nbytes))
    # To a power of two: models of nearly one size share their points.
    whole = min(1 << round(math.log2(max(1, footprint))), MAX_FOOTPRINT)
    return Point(part, workload, copies, max(0, whole - part.nbytes * copies))


def _empty() -> Point:
    return Point(Empty(), Workload(1, 1, 0), 1, 0)


def _label(part: Part) -> str:
    if isinstance(part, FeedForward):
        return "feed_forward"
    if isinstance(part, Attention):
        return "attention"
    return "head" if isinstance(part, Product) else "ends"


def standard_workloads(*, decoder: bool) -> Mapping[str, Workload]:
    """Return what a report measures: an encoder's text of 128 tokens, a decoder's prompt and a step after it."""
    if decoder:
        return {"decode": Workload(1, 1, 128), "prefill": Workload(1, 128, 0)}
    return {"latency": Workload(1, 128, 0)}
