"""Least and greatest value of every tensor between a static graph's nodes, seen while it runs on samples.

The graph is the artifact's own, its weights quantized, its activations not yet. A worker runs it on onnxruntime's CPU
provider with one thread, so that neither the machine nor its load changes a bit of what comes out.

Before -> after, for every watched x (its users stay as they are)::

    x                   ->  ReduceMin(x), ReduceMax(x), ReduceSum(x * 0)        # outputs, a number each

The last is 0, or NaN where anything in x is not finite: ONNX Runtime's least and greatest values pass over a NaN.
Tensors themselves as outputs were rejected: ONNX Runtime holds all outputs of a graph until a run ends, whichever are
asked for (60 tensors of 10 MB: 604 MB; with the last one as the only output: 20 MB), which grows with every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from compress.errors import CompressError
from compress.graph.finished import serialize
from compress.graph.rules._edit import constant, forget
from compress.validation.protocol import run_worker

TIMEOUT_SECONDS = 3600.0
_GRAPH, _SAMPLES, _ZERO = ".ranges.onnx", ".ranges.npz", ".ranges.zero"


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
        values: Of its graph, float.
        samples: By input name, one sample a row: the input's own shape behind the first axis.
        directory: Where the graph's external data lies; the graph is written beside it for a while.
        progress: Called with the fraction that is done.

    Raises:
        CompressError: An input has no samples, or a value is not finite on one.
    """
    count = _check(model.graph, samples)
    graph, data = directory / _GRAPH, directory / _SAMPLES
    try:
        with _watched(model.graph, values):
            serialize(model, graph)
        np.savez(data, **dict(samples))  # type: ignore[arg-type]
        request = {
            "model": str(graph),
            "samples": str(data),
            "count": count,
            "values": [value.name for value in values],
            "threads": 1,
        }
        response = run_worker("calibrate.activation_worker", request, timeout=TIMEOUT_SECONDS, progress=progress)
    finally:
        graph.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
    found: dict[str, list[float]] = response["results"][0]["ranges"]
    return {name: (low, high) for name, (low, high) in found.items()}


@contextmanager
def _watched(graph: ir.Graph, values: Sequence[ir.Value]) -> Iterator[None]:
    """Let a graph's outputs be the least value, the greatest one and the check of every value, in this order."""
    outputs, first = list(graph.outputs), graph[0]
    zero = constant(graph, _ZERO, np.zeros((), np.float32))
    made: list[ir.Node] = []
    try:
        graph.outputs.clear()
        for value in values:
            nodes = _reductions(value, zero)
            made += nodes
            # The worker runs nodes in the order of the graph: each tensor is read at once, then it is free.
            if (producer := value.producer()) is None:
                graph.insert_before(first, nodes)
            else:
                graph.insert_after(producer, nodes)
            graph.outputs.extend(node.outputs[0] for node in nodes if node.op_type != "Mul")
        yield
    finally:
        graph.outputs[:] = outputs
        graph.remove(made, safe=True)
        forget(graph, zero)


def _reductions(value: ir.Value, zero: ir.Value) -> list[ir.Node]:
    """Return the nodes of a value's least number, its greatest one, and its check."""

    def reduced(op_type: str, of: ir.Value, name: str) -> ir.Node:
        output = ir.Value(name=f"{value.name}/{name}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
        return ir.node(op_type, [of], outputs=[output], attributes={"keepdims": 0}, name=output.name)

    nothing = ir.node("Mul", [value, zero], outputs=[ir.Value(name=f"{value.name}/nothing")])
    low, high = reduced("ReduceMin", value, "least"), reduced("ReduceMax", value, "greatest")
    return [low, high, nothing, reduced("ReduceSum", nothing.outputs[0], "check")]


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
