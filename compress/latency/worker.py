"""The worker that measures parts: ``python -m compress.latency.worker`` (see :mod:`compress.validation.protocol`).

Request: ``points`` (:meth:`compress.latency.parts.Point.as_request`), ``threads``, ``rounds``, ``seconds`` (of one
round). Answer: a list of quantiles for each point in ``results``, one a round: seconds of one run of its graph.

Points are measured in turn, round by round, so that a machine that is busy for a while slows few of them in all their
rounds. With one thread the clock is the thread's own: what other processes take does not count.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from compress.latency.graphs import Noise, build
from compress.latency.parts import Point, point_from
from compress.validation.protocol import Json, peak_rss_bytes, report_progress, serve

#: Sessions that are open at once, and the bytes of their weights.
_AT_ONCE, _BYTES_AT_ONCE = 8, 256 << 20
#: Of the runs of a round: what is slower had to wait for something.
QUANTILE = 0.25
_FEWEST_RUNS = 3
#: onnxruntime would fuse these parts' residual sums with their norms, but not those of the graphs that we write.
_NOT_IN_ARTIFACTS = ["SkipLayerNormFusion"]


def handle(request: Json, job: Path) -> Json:
    """Measure every point, and answer."""
    points = [point_from(item) for item in request["points"]]
    threads, rounds, seconds = int(request["threads"]), int(request["rounds"]), float(request["seconds"])
    noise = Noise()
    results: list[list[float]] = []
    for group in groups(points):
        runs = [Run(point, noise, threads) for point in group]
        found: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds):
            for run, times in zip(runs, found, strict=True):
                times.append(float(np.quantile(timed(run.run, seconds, threads, run.evict), QUANTILE)))
        results += found
        report_progress(job, len(results) / len(points))
    return {"results": results, "peak_rss_bytes": peak_rss_bytes()}


def groups(points: list[Point]) -> Iterator[list[Point]]:
    """Yield the points in order, as many at once as memory is kept free for."""
    group: list[Point] = []
    size = 0
    for point in points:
        own = point.part.nbytes * point.copies
        if group and (len(group) == _AT_ONCE or size + own > _BYTES_AT_ONCE):
            yield group
            group, size = [], 0
        group.append(point)
        size += own
    if group:
        yield group


class Run:
    """An open session with its inputs."""

    def __init__(self, point: Point, noise: Noise, threads: int) -> None:
        import onnxruntime as ort

        graph = build(point, noise)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        value = ort.OrtValue.ortvalue_from_numpy
        if graph.weights:
            options.add_external_initializers(
                list(graph.weights), [value(np.ascontiguousarray(array)) for array in graph.weights.values()]
            )
        self._session = ort.InferenceSession(
            graph.serialized(), options, providers=["CPUExecutionProvider"], disabled_optimizers=_NOT_IN_ARTIFACTS
        )
        self._feeds: dict[str, Any] = {name: value(array) for name, array in graph.feeds.items()}
        self._names = [output.name for output in self._session.get_outputs()]
        self._others = noise.others(point.others)

    def run(self) -> None:
        """Run it once."""
        self._session.run_with_ort_values(self._names, self._feeds)

    def evict(self) -> None:
        """Read what the rest of a model would read."""
        self._others.sum()


def timed(
    run: Callable[[], object], seconds: float, threads: int, between: Callable[[], object] = lambda: None
) -> list[float]:
    """Return the seconds of each run, until ``seconds`` have passed; what is done in between does not count.

    The first run is a warm-up and not recorded. With one thread the clock is the thread's own.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    run()
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < _FEWEST_RUNS or time.perf_counter() - begin < seconds:
        between()
        start = clock()
        run()
        found.append(clock() - start)
    return found


if __name__ == "__main__":
    sys.exit(serve(handle))
