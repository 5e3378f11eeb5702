"""Least and greatest value of every tensor between a static graph's nodes, seen while it runs on samples.

The graph is the artifact's own, its weights quantized, its activations not yet. A worker runs it on onnxruntime's CPU
provider with one thread, so that neither the machine nor its load changes a bit of what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from compress.errors import CompressError
from compress.graph.finished import serialize
from compress.validate.protocol import run_worker

TIMEOUT_SECONDS = 3600.0
#: Bytes of tensors that one run hands out; a graph with more is run several times a sample.
RUN_BYTES = 128 << 20
_GRAPH, _SAMPLES = ".ranges.onnx", ".ranges.npz"


def observe(
    model: ir.Model,
    values: Sequence[ir.Value],
    samples: Mapping[str, npt.NDArray[Any]],
    directory: Path,
    *,
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[str, tuple[float, float]]:
    """Run a graph on samples and return every value's range by its name.

    Args:
        model: Static shapes; not changed.
        values: Of its graph, with types and shapes.
        samples: By input name, one sample a row: the input's own shape behind the first axis.
        directory: Where the graph's external data lies; the graph is written beside it for a while.
        progress: Called with the fraction that is done.

    Raises:
        CompressError: An input has no samples, or a value is not finite on one.
    """
    names = [value.name or "" for value in values]
    count = _check(model.graph, samples)
    outputs = list(model.graph.outputs)
    graph, data = directory / _GRAPH, directory / _SAMPLES
    try:
        model.graph.outputs.extend(value for value in values if not value.is_graph_output())
        try:
            serialize(model, graph)
        finally:
            model.graph.outputs[:] = outputs
        np.savez(data, **dict(samples))  # type: ignore[arg-type]
        request = {
            "model": str(graph),
            "samples": str(data),
            "count": count,
            "groups": _groups(values),
            "threads": 1,
        }
        response = run_worker("calibrate.activation_worker", request, timeout=TIMEOUT_SECONDS, progress=progress)
    finally:
        graph.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
    found: dict[str, list[float]] = response["results"][0]["ranges"]
    return {name: (found[name][0], found[name][1]) for name in names}


def _check(graph: ir.Graph, samples: Mapping[str, npt.NDArray[Any]]) -> int:
    counts = set()
    for value in graph.inputs:
        given = samples.get(value.name or "")
        assert value.shape is not None
        if given is None or tuple(given.shape[1:]) != tuple(value.shape):
            raise CompressError(
                f"calibration samples of shape {None if given is None else list(given.shape)} do not fit the graph",
                where=f"input {value.name}, one sample a row of {list(value.shape)}",
            )
        counts.add(len(given))
    if len(counts) != 1 or not min(counts):
        raise CompressError(f"calibration has {sorted(counts)} samples of the graph's inputs")
    return counts.pop()


def _groups(values: Sequence[ir.Value]) -> list[list[str]]:
    """Return the values' names in groups that together are at most :data:`RUN_BYTES`, or one value."""
    groups: list[list[str]] = []
    size = RUN_BYTES
    for value in values:
        assert value.shape is not None
        nbytes = 4 * math.prod(value.shape.numpy())
        if size + nbytes > RUN_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(value.name or "")
        size += nbytes
    return groups
