"""Embedding tables: looked up in their quantized form.

Before: ``Gather(weight, ids)``.
After:  ``com.microsoft.GatherBlockQuantized(codes, ids, scales, zero_points?)``.

In standard operators, for runtimes without that operator (``standard``: onnxruntime-web's wasm)::

    y = Mul(DequantizeLinear(Gather(codes, ids), 1, 128), Gather(scales, ids))

and for graphs whose every tensor is of integers later (``integers``), where the runtime moves the Gather itself::

    y = Mul(Gather(DequantizeLinear(codes, 1, 128), ids), Gather(scales, ids))

A table that a head of integer products shares is stored as that multiplies by it, ``[H, V]``::

    y = Mul(Cast(Transpose(Gather(codes, ids, axis=1))), Unsqueeze(Gather(scales, ids)))

A tied table's codes are stored once: here they are read as [V, bytes], by the head as [V, blocks, bytes a block].
A table that stays float32 keeps its Gather.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_ir as ir

from compress.errors import CompressError, UsageError
from compress.graph.rules._edit import Weights, constant, drop, forget, node
from compress.planning import Fate, Plan
from compress.quantize.scheme import zero_code

Spelling = Literal["fused", "standard", "integers"]


def apply(graph: ir.Graph, plan: Plan, weights: Weights, spelling: Spelling = "fused") -> int:
    """Replace every table of the plan; returns how many."""
    for table in plan.structure.tables:
        fate = plan.by_name[table.name]
        old = weights.skeleton(table.graph_name)
        gather = next((user for user, _ in old.uses() if user.op_type == "Gather"), None) if old is not None else None
        if old is None or gather is None:
            raise CompressError(
                "the graph skeleton lacks an embedding that the family describes", where=table.graph_name
            )
        if fate.scheme is None:
            gather.replace_input_with(0, weights.value(fate.stored[0]))
            forget(graph, old)
            continue
        if fate.scheme.activations != "none":
            _columns(graph, fate, weights, gather)
            continue
        if spelling != "fused":
            _rows(graph, fate, weights, gather, whole=spelling == "integers")
            continue
        output = ir.Value(name=gather.outputs[0].name)
        inputs = [weights.part(fate, "codes"), gather.inputs[1], weights.scales(fate, gather)]
        zero_points = weights.part(fate, "zero_points")
        if zero_points is not None:
            inputs.append(zero_points)
        node(
            graph,
            gather,
            "GatherBlockQuantized",
            inputs,
            [output],
            domain="com.microsoft",
            bits=fate.scheme.bits,
            block_size=fate.scheme.block_size or _covering(fate.columns),
            gather_axis=0,
            quantize_axis=1,
        )
        ir.convenience.replace_all_uses_with(gather.outputs[0], output)
        drop(graph, [gather])
    return len(plan.structure.tables)


def _rows(graph: ir.Graph, fate: Fate, weights: Weights, gather: ir.Node, *, whole: bool) -> None:
    """Gather rows of bytes, and each row's scale; ``whole`` makes floats of the table before rows are gathered.

    Raises:
        UsageError: A row has several scales, or zero points.
    """
    scheme, codes, scales = fate.scheme, fate.part("codes"), fate.part("scales")
    assert scheme is not None and codes is not None and scales is not None
    if scheme.bits != 8 or scheme.block_size or not scheme.symmetric or (whole and scales.dtype != "float32"):
        raise UsageError(
            "a table of a graph in standard operators has symmetric bytes and one float32 scale a row",
            where=fate.name,
            hint="--set quantize.roles.embedding.bits=8 --set quantize.roles.embedding.block_size=0",
        )
    old, ids = gather.outputs[0], gather.inputs[1]
    floats, integers = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.UINT8)
    first, rows, scale, output = (
        ir.Value(name=f"{fate.name}/{part}", type=kind)
        for part, kind in (
            ("whole" if whole else "codes", floats if whole else integers),
            ("rows", floats),
            ("row_scale", floats),
            ("output", floats),
        )
    )
    one = constant(graph, "table/one", np.array(1, np.float32))
    middle = constant(graph, "table/middle", np.array(zero_code(8), np.uint8))
    if whole:
        node(graph, gather, "DequantizeLinear", [weights.value(codes), one, middle], [first])
        node(graph, gather, "Gather", [first, ids], [rows], axis=0)
    else:
        node(graph, gather, "Gather", [weights.value(codes), ids], [first], axis=0)
        node(graph, gather, "DequantizeLinear", [first, one, middle], [rows])
    node(graph, gather, "Gather", [weights.scales(fate, gather), ids], [scale], axis=0)
    node(graph, gather, "Mul", [rows, scale], [output])
    ir.convenience.replace_all_uses_with(old, output)
    drop(graph, [gather])


def _columns(graph: ir.Graph, fate: Fate, weights: Weights, gather: ir.Node) -> None:
    """Gather columns of signed bytes ``[H, V]``, and each column's scale."""
    codes, scales = fate.part("codes"), fate.part("scales")
    assert codes is not None and scales is not None
    old, ids = gather.outputs[0], gather.inputs[1]
    columns, rows, floats, scale, wide, output = (
        ir.Value(name=f"{fate.name}/{part}") for part in ("columns", "rows", "floats", "scale", "row_scale", "output")
    )
    last = constant(graph, "table/last_axis", np.array([-1], np.int64))
    node(graph, gather, "Gather", [weights.value(codes), ids], [columns], axis=1)
    node(graph, gather, "Transpose", [columns], [rows], perm=[1, 2, 0])
    node(graph, gather, "Cast", [rows], [floats], to=int(ir.DataType.FLOAT))
    node(graph, gather, "Gather", [weights.value(scales), ids], [scale], axis=0)
    node(graph, gather, "Unsqueeze", [scale, last], [wide])
    node(graph, gather, "Mul", [floats, wide], [output])
    ir.convenience.replace_all_uses_with(old, output)
    drop(graph, [gather])


def _covering(columns: int) -> int:
    """Return a block that holds a whole row: the operator takes powers of two from 16 on."""
    return max(16, 1 << (columns - 1).bit_length())
