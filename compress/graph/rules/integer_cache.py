"""Keys and values kept as bytes: a quarter of float32's memory, and of what a token reads of a long text.

Before: ``GroupQueryAttention(qkv, ..., past_key, past_value, ...)`` and a cache of floats, in and out.
After:  the same node with ``k_scale`` and ``v_scale`` (float32 ``[kv_heads, 1, head_dim]``), ``k_quant_type`` and
        ``v_quant_type`` ``PER_CHANNEL`` and ``kv_cache_bit_width`` 8; ``past_key_values.N.*`` and ``present.N.*`` int8.

The node rounds what it appends, ``round(key / k_scale)`` kept within a byte, and multiplies by what it kept: a prompt's
own keys are rounded as well. Source: ONNX Runtime's contrib operators, com.microsoft.GroupQueryAttention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from compress.graph.rules._edit import Weights
from compress.planning import CACHE_SCALES, Plan

#: What an attention node says of such a cache.
ATTRIBUTES: Mapping[str, Any] = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
_PAST_INPUTS, _PRESENT_OUTPUTS, _SCALE_INPUTS = (3, 4), (1, 2), (12, 13)


def apply(graph: ir.Graph, plan: Plan, weights: Weights) -> int:
    """Let every attention node keep bytes; returns how many."""
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    for node in attention:
        held = [*(node.inputs[place] for place in _PAST_INPUTS), *(node.outputs[place] for place in _PRESENT_OUTPUTS)]
        kept = [value for value in held if value is not None]
        layer = (kept[0].name or "").split(".")[1]
        node.resize_inputs(max(len(node.inputs), _SCALE_INPUTS[1] + 1))
        for place, name in zip(_SCALE_INPUTS, CACHE_SCALES, strict=True):
            node.replace_input_with(place, weights.value(plan.by_name[name.format(layer)].stored[0]))
        for attribute in ir.convenience.convert_attributes(ATTRIBUTES):
            node.attributes.add(attribute)
        for value in kept:
            value.type = ir.TensorType(ir.DataType.INT8)
    return len(attention)
