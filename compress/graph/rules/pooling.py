"""One vector a text, inside the graph.

After (h = last_hidden_state [B, S, H], a = attention_mask [B, S])::

    mean   e = Div(Squeeze(MatMul(Unsqueeze(a, 1), h)), Max(ReduceSum(a), 1e-9))
    cls    e = Gather(h, 0, axis=1)
    max    e = ReduceMax(Where(a, h, -inf), axis=1)
    and, to unit length:  e / Max(ReduceL2(e), 1e-12)

For integers of fixed ranges (``static``) the order is another: sums over 2 and over 128 tokens have no range in common,
and neither floor is anything but 0 there::

    mean   e = Squeeze(MatMul(Unsqueeze(Div(a, ReduceSum(a)), 1), h))
    to unit length:  LpNormalization(e)

Padding never counts. The constants are those of sentence-transformers, so that both give the same vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_ir as ir

from compress.graph.rules._edit import append, constant

OUTPUT = "sentence_embedding"


def apply(graph: ir.Graph, mode: str, *, normalize: bool, static: bool = False) -> int:
    """Add the output ``sentence_embedding`` float32 ``[batch_size, hidden]``; returns 1, or 0 for mode ``none``."""
    if mode == "none":
        return 0
    hidden = graph.outputs[0]
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    mean = _weighted_mean if static else _mean
    modes: dict[str, Callable[[ir.Graph, ir.Value, ir.Value], ir.Value]]
    modes = {"mean": mean, "cls": _first, "max": partial(_greatest, static=static)}
    pooled = modes[mode](graph, hidden, mask)
    if normalize and static:
        pooled = append(graph, "LpNormalization", [pooled], "pooling/unit", axis=-1, p=2)
    elif normalize:
        length = append(graph, "ReduceL2", [pooled, constant(graph, "pooling/last", np.array([-1]))], "pooling/length")
        floor = append(graph, "Max", [length, _scalar(graph, "pooling/tiny", 1e-12)], "pooling/length_floor")
        pooled = append(graph, "Div", [pooled, floor], "pooling/unit")
    pooled.name = OUTPUT
    assert hidden.shape is not None
    pooled.shape = ir.Shape(["batch_size", hidden.shape[2]])
    pooled.type = hidden.type
    graph.outputs.append(pooled)
    return 1


def _mean(graph: ir.Graph, hidden: ir.Value, mask: ir.Value) -> ir.Value:
    weights = append(graph, "Cast", [mask], "pooling/mask", to=int(ir.DataType.FLOAT))
    middle = constant(graph, "pooling/middle", np.array([1]))
    row = append(graph, "Unsqueeze", [weights, middle], "pooling/row")
    product = append(graph, "MatMul", [row, hidden], "pooling/product")
    summed = append(graph, "Squeeze", [product, middle], "pooling/sum")
    count = append(graph, "ReduceSum", [weights, middle], "pooling/count", keepdims=1)
    tokens = append(graph, "Max", [count, _scalar(graph, "pooling/some", 1e-9)], "pooling/tokens")
    return append(graph, "Div", [summed, tokens], "pooling/mean")


def _weighted_mean(graph: ir.Graph, hidden: ir.Value, mask: ir.Value) -> ir.Value:
    real = append(graph, "Cast", [mask], "pooling/mask", to=int(ir.DataType.FLOAT))
    middle = constant(graph, "pooling/middle", np.array([1]))
    count = append(graph, "ReduceSum", [real, middle], "pooling/count", keepdims=1)
    weights = append(graph, "Div", [real, count], "pooling/weights")
    row = append(graph, "Unsqueeze", [weights, middle], "pooling/row")
    product = append(graph, "MatMul", [row, hidden], "pooling/product")
    return append(graph, "Squeeze", [product, middle], "pooling/sum")


def _first(graph: ir.Graph, hidden: ir.Value, mask: ir.Value) -> ir.Value:
    return append(graph, "Gather", [hidden, constant(graph, "pooling/first", np.array(0))], "pooling/cls", axis=1)


def _greatest(graph: ir.Graph, hidden: ir.Value, mask: ir.Value, *, static: bool = False) -> ir.Value:
    kept = append(graph, "Cast", [mask], "pooling/kept", to=int(ir.DataType.BOOL))
    column = append(graph, "Unsqueeze", [kept, constant(graph, "pooling/end", np.array([2]))], "pooling/column")
    # Far below any state; in a fixed range of 16 bits, near enough to leave states their resolution.
    least = _scalar(graph, "pooling/least", -100.0 if static else -1e9)
    masked = append(graph, "Where", [column, hidden, least], "pooling/masked")
    middle = constant(graph, "pooling/middle", np.array([1]))
    return append(graph, "ReduceMax", [masked, middle], "pooling/max", keepdims=0)


def _scalar(graph: ir.Graph, name: str, value: float) -> ir.Value:
    return constant(graph, name, np.array(value, np.float32))
