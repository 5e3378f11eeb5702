"""Keys and values kept as bytes: a quarter of float32's memory, and of what a token reads of a long text.

Before: ``GroupQueryAttention(qkv, ..., past_key, past_value, ...)`` and a cache of floats, in and out.
After:  the same node with ``k_scale`` and ``v_scale`` (float32 ``[kv_heads, 1, head_dim]``), ``k_quant_type`` and
        ``v_quant_type`` ``PER_CHANNEL`` and ``kv_cache_bit_width`` 8; ``past_key_values.N.*`` and ``present.N.*`` int8.

The node rounds what it appends, ``round(key / k_scale)`` kept within a byte, and multiplies by what it kept: a prompt's
own keys are rounded as well. Source: ONNX Runtime's contrib operators, com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

import onnx_ir as ir

from compress.graph.rules._edit import Weights
from compress.planning import CACHE_SCALES, Plan

_PAST_INPUTS, _PRESENT_OUTPUTS, _SCALE_INPUTS = (3, 4), (1, 2), (12, 13)
_BITS = 8


def apply(graph: ir.Graph, plan: Plan, weights: Weights) -> int:
    """Let every attention node keep bytes; returns how many."""
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    for node in attention:
        layer = (node.inputs[_PAST_INPUTS[0]].name or "").split(".")[1]  # type: ignore[union-attr]
        node.resize_inputs(max(len(node.inputs), _SCALE_INPUTS[1] + 1))
        for place, name in zip(_SCALE_INPUTS, CACHE_SCALES, strict=True):
            node.replace_input_with(place, weights.value(plan.by_name[name.format(layer)].stored[0]))
        for name in ("k_quant_type", "v_quant_type"):
            node.attributes[name] = ir.AttrString(name, "PER_CHANNEL")
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", _BITS)
        for value in (*(node.inputs[place] for place in _PAST_INPUTS), *(node.outputs[i] for i in _PRESENT_OUTPUTS)):
            if value is not None:
                value.type = ir.TensorType(ir.DataType.INT8)
    return len(attention)
