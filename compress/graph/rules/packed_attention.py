"""Query, key and value in the attention's own node: no split, no transposed copies between product and attention.

Before (one product for query, key and value; m is the padding mask)::

    q, k, v = Split(Add(MatMul(x, W), b))                            # or Split(DynamicQuantizeMatMul(x, W8, s, , b))
    y = com.microsoft.MultiHeadAttention(q, k, v, , m)

After, float32::

    y = com.microsoft.Attention(x, W, b, m)

After, integers::

    x8, xs, xz = DynamicQuantizeLinear(x)
    y = com.microsoft.QAttention(x8, W8, b, xs, s, m, xz, 0)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compress.graph.rules._edit import constant, drop, node, producer, supersede

_QUANTIZED = ("codes", "scale", "zero_point")


@dataclass(frozen=True)
class _Packed:
    """What the new node needs of the old ones."""

    source: ir.Value
    weight: ir.Value
    bias: ir.Value
    scales: ir.Value | None
    dead: tuple[ir.Node, ...]


def apply(graph: ir.Graph, head_dim: int) -> int:
    """Pack every attention whose inputs are one product's parts; returns how many."""
    count = 0
    for attention in [item for item in graph if item.op_type == "MultiHeadAttention"]:
        packed = _match(attention, head_dim)
        if packed is None:
            continue
        old = attention.outputs[0]
        fused = ir.Value(name=f"{old.name}/packed", shape=old.shape, type=old.type)
        mask = attention.inputs[4] if len(attention.inputs) > 4 else None
        _insert(graph, attention, packed, mask, fused)
        supersede(old, fused)
        drop(graph, [attention, *packed.dead])
        count += 1
    return count


def _insert(graph: ir.Graph, attention: ir.Node, packed: _Packed, mask: ir.Value | None, fused: ir.Value) -> None:
    heads = attention.attributes["num_heads"].as_int()
    inputs: list[ir.Value | None]
    if packed.scales is None:
        inputs = [packed.source, packed.weight, packed.bias, mask]
        node(graph, attention, "Attention", inputs, [fused], domain="com.microsoft", num_heads=heads)
        return
    codes, scale, zero = (ir.Value(name=f"{fused.name}/{part}") for part in _QUANTIZED)
    node(graph, attention, "DynamicQuantizeLinear", [packed.source], [codes, scale, zero])
    assert packed.scales.shape is not None
    count = packed.scales.shape.numpy()
    zeros = constant(graph, f"zero_points_{count[0]}", np.zeros(count, np.int8))
    inputs = [codes, packed.weight, packed.bias, scale, packed.scales, mask, zero, zeros]
    node(graph, attention, "QAttention", inputs, [fused], domain="com.microsoft", num_heads=heads)


def _match(attention: ir.Node, head_dim: int) -> _Packed | None:
    parts = attention.inputs[:3]
    split = producer(parts[0], "Split")
    scale = attention.attributes["scale"].as_float()
    if split is None or tuple(split.outputs) != tuple(parts) or not math.isclose(scale, head_dim**-0.5, rel_tol=1e-5):
        return None
    whole = split.inputs[0]
    integers = producer(whole, "DynamicQuantizeMatMul")
    if integers is not None and len(integers.inputs) == 5:
        source, weight, scales, _, bias = integers.inputs
        if source is not None and weight is not None and scales is not None and bias is not None:
            return _Packed(source, weight, bias, scales, (split, integers))
    added = producer(whole, "Add")
    product = producer(added.inputs[0], "MatMul") if added is not None else None
    if added is None or product is None or added.inputs[1] is None:
        return None
    source, weight = product.inputs
    if source is None or weight is None or not weight.is_initializer():
        return None
    return _Packed(source, weight, added.inputs[1], None, (split, added, product))
