"""LongRoPE: sequences beyond the original context read the second half of the rotary tables.

Before: ``GroupQueryAttention(..., cos_cache, sin_cache)``, tables ``[short factors; long factors]`` one below the
        other. The fused node indexes them with plain positions, so the long factors would never be read from their
        first row.
After:  the same node with ``position_ids = position + (switch if total_sequence_length > switch else 0)``.

A position is counted from each row's own length (``attention_mask`` summed), so right-padded batches stay right. The
tables are not copied: choosing between two of them with If or Where would copy megabytes for every token.
Source: Ding et al., arXiv 2402.13753; the switch is transformers' (``longrope_frequency_update``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from compress.graph.rules._edit import node

_POSITION_INPUT = 9


def apply(graph: ir.Graph, switch: int) -> int:
    """Give every attention node its positions; returns how many."""
    attention = [item for item in graph if item.op_type == "GroupQueryAttention"]
    if not attention:
        return 0
    positions = _positions(graph, attention[0], switch)
    for item in attention:
        if len(item.inputs) <= _POSITION_INPUT:
            item.resize_inputs(_POSITION_INPUT + 1)
        item.replace_input_with(_POSITION_INPUT, positions)
    return len(attention)


def _positions(graph: ir.Graph, before: ir.Node, switch: int) -> ir.Value:
    ids, mask = (
        next(value for value in graph.inputs if value.name == name) for name in ("input_ids", "attention_mask")
    )

    def constant(name: str, value: int | list[int]) -> ir.Value:
        array = np.asarray(value, dtype=np.int64)
        tensor = ir.tensor(array, name=f"long_rope/{name}")
        made = ir.Value(
            name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
        )
        graph.register_initializer(made)
        return made

    def call(name: str, op_type: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        output = ir.Value(name=f"long_rope/{name}")
        node(graph, before, op_type, inputs, [output], **attributes)
        return output

    zero, one, axis = constant("zero", 0), constant("one", 1), constant("axis", [1])
    new = call("new", "Gather", [call("ids_shape", "Shape", [ids]), one])
    total = call("total", "Gather", [call("mask_shape", "Shape", [mask]), one])
    length = call("length", "ReduceSum", [mask, axis], keepdims=1)
    past = call("past", "Max", [call("difference", "Sub", [length, new]), zero])
    switch_value = constant("switch", switch)
    # Not a product: profiles name by its operator what a GPU may leave to the CPU, and Mul is the feed-forward's too.
    offset = call("offset", "Where", [call("beyond", "Greater", [total, switch_value]), switch_value, zero])
    plain = call("plain", "Add", [past, call("range", "Range", [zero, new, one])])
    return call("positions", "Add", [plain, offset])
