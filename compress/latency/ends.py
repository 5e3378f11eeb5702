"""The graph of a model's ends: what its embeddings, masks, pooling and small heads cost together."""

from __future__ import annotations

import numpy as np

from compress.latency.graphs import _MICROSOFT, _TABLE_ROWS, Graph, Noise, linear, norm
from compress.latency.parts import Ends, Workload


def add_ends(graph: Graph, part: Ends, workload: Workload, noise: Noise) -> None:
    """Add them to an empty graph."""
    batch, tokens = workload.batch, workload.tokens
    ids = graph.input("ids", np.arange(batch * tokens, dtype=np.int64).reshape(batch, tokens) * 7 % _TABLE_ROWS, (0, 1))
    mask = graph.input("mask", np.ones((batch, workload.past + tokens), np.int64), (0, 1))
    rows = [
        _by_columns(graph, noise, ids, columns, f"table{index}")
        if part.by_columns
        else _row(graph, noise, ids, columns, bits, f"table{index}")
        for index, (columns, bits) in enumerate(part.tables)
    ]
    width = part.tables[0][0]
    if part.decoder and len(rows) > 1:  # learned positions: their sum and the first norm are one operator
        shift, scale = (graph.weight(np.ones(width, np.float32), f"first.{kind}") for kind in ("bias", "weight"))
        value = graph.node("SkipLayerNormalization", [*rows, scale, shift], _MICROSOFT, epsilon=1e-5)[0]
    else:
        value = rows[0]
        for row in rows[1:]:
            value = graph.node("Add", [value, row])[0]
        value = norm(graph, value, width, rms=part.rms, name="first")
    if part.decoder:
        value = _decoder_end(graph, mask, value)
        for index, product in enumerate(part.products):
            sizes = (product.outputs, product.inputs, product.stored)
            value = linear(graph, noise, value, *sizes, bias=product.bias, name=f"end{index}")
        graph.output(value)
        return
    if part.padding:
        real = graph.node("Cast", [mask], to=1)[0]
        column = graph.node("Unsqueeze", [real, graph.constant(np.array([-1], np.int64))])[0]
        value = graph.node("Mul", [value, column])[0]
    cut = False
    for index, product in enumerate(part.products):
        if product.inputs != width:
            value, width = graph.input(f"x{index}", noise.floats(batch, tokens, product.inputs), (0, 1)), product.inputs
        if not product.every and not cut:
            limits = [graph.constant(np.array([number], np.int64)) for number in (0, 1, 1)]
            value, cut = graph.node("Slice", [value, *limits])[0], True
        width, stored = product.outputs, product.stored
        value = linear(graph, noise, value, width, product.inputs, stored, bias=product.bias, name=f"end{index}")
    graph.output(value)
    if part.pooled:
        _pooled(graph, mask, value)


def _row(graph: Graph, noise: Noise, ids: str, columns: int, bits: int, name: str) -> str:
    if bits == 32:
        return graph.node("Gather", [graph.weight(noise.floats(_TABLE_ROWS, columns), name), ids])[0]
    block = max(16, 1 << (columns - 1).bit_length()) if bits == 8 else 16
    codes = graph.weight(noise.codes(_TABLE_ROWS, -(-columns * bits // 8)), name)
    scales = graph.weight(np.full((_TABLE_ROWS, -(-columns // block)), 1e-3, np.float32), f"{name}.scales")
    sizes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    return graph.node("GatherBlockQuantized", [codes, ids, scales], _MICROSOFT, **sizes)[0]


def _by_columns(graph: Graph, noise: Noise, ids: str, columns: int, name: str) -> str:
    codes = graph.weight(noise.codes(columns, _TABLE_ROWS).view(np.int8), name)
    scales = graph.weight(np.full(_TABLE_ROWS, 1e-3, np.float32), f"{name}.scales")
    rows = graph.node("Transpose", [graph.node("Gather", [codes, ids], axis=1)[0]], perm=[1, 2, 0])[0]
    last = graph.constant(np.array([-1], np.int64))
    scale = graph.node("Unsqueeze", [graph.node("Gather", [scales, ids])[0], last])[0]
    return graph.node("Mul", [graph.node("Cast", [rows], to=1)[0], scale])[0]


def _decoder_end(graph: Graph, mask: str, value: str) -> str:
    """Add the lengths that attention reads, and the choice of the last token; returns its states."""
    one = graph.constant(np.array([1], np.int64))
    length = graph.node("ReduceSum", [mask, one], keepdims=0)[0]
    lengths = graph.node("Cast", [graph.node("Sub", [length, one])[0]], to=1)[0]
    total = graph.node("Gather", [graph.node("Shape", [mask])[0], one])[0]
    limits = [graph.constant(np.array([number], np.int64)) for number in (-1, np.iinfo(np.int64).max, 1)]
    for output in (lengths, graph.node("Cast", [total], to=1)[0]):
        graph.output(output)
    return graph.node("Slice", [value, *limits])[0]


def _pooled(graph: Graph, mask: str, value: str) -> None:
    """Add the mean over the tokens, of unit length."""
    middle, last = (graph.constant(np.array([axis], np.int64)) for axis in (1, -1))
    tiny = graph.constant(np.array(1e-9, np.float32))
    real = graph.node("Cast", [mask], to=1)[0]
    total = graph.node("MatMul", [graph.node("Unsqueeze", [real, middle])[0], value])[0]
    count = graph.node("Max", [graph.node("ReduceSum", [real, middle], keepdims=1)[0], tiny])[0]
    mean = graph.node("Div", [graph.node("Squeeze", [total, middle])[0], count])[0]
    length = graph.node("Max", [graph.node("ReduceL2", [mean, last])[0], tiny])[0]
    graph.output(graph.node("Div", [mean, length])[0])
