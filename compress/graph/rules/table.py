"""Embedding tables: looked up in their quantized form.

Before: ``Gather(weight, ids)``.
After:  ``com.microsoft.GatherBlockQuantized(codes, ids, scales, zero_points?)``.

A tied table's codes are stored once: here they are read as [V, bytes], by the head as [V, blocks, bytes a block].
A table that stays float32 keeps its Gather.
"""

from __future__ import annotations

import onnx_ir as ir

from compress.errors import CompressError
from compress.graph.rules._edit import Weights, drop, forget, node
from compress.plan import Plan


def apply(graph: ir.Graph, plan: Plan, weights: Weights) -> int:
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


def _covering(columns: int) -> int:
    """Return a block that holds a whole row: the operator takes powers of two from 16 on."""
    return max(16, 1 << (columns - 1).bit_length())
