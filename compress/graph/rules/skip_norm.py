"""Residual sum and norm in one node.

Before::

    y = LayerNormalization(Add(x, skip), weight, bias)

After::

    y = com.microsoft.SkipLayerNormalization(x, skip, weight, bias)
"""

from __future__ import annotations

import onnx_ir as ir

from compress.graph.rules._edit import drop, node, only_user, producer, supersede


def apply(graph: ir.Graph) -> int:
    """Fuse every norm of a sum that nobody else reads; returns how many."""
    count = 0
    for norm in [candidate for candidate in graph if candidate.op_type == "LayerNormalization"]:
        added = producer(norm.inputs[0], "Add")
        if added is None or only_user(added.outputs[0]) is not norm:
            continue
        first, second = added.inputs
        if first is None or second is None or first.is_initializer() or second.is_initializer():
            continue
        if first.shape != second.shape:  # a table's rows that are the same for every text: not the operator's shapes
            continue
        old = norm.outputs[0]
        fused = ir.Value(name=f"{old.name}/fused", shape=old.shape, type=old.type)
        epsilon = norm.attributes["epsilon"].as_float()
        node(
            graph,
            norm,
            "SkipLayerNormalization",
            [first, second, *norm.inputs[1:]],
            [fused],
            domain="com.microsoft",
            epsilon=epsilon,
        )
        supersede(old, fused)
        drop(graph, [norm, added])
        count += 1
    return count
