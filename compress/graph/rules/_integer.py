"""Products of integers: the nodes that a linear with 8-bit inputs becomes."""

from __future__ import annotations

import onnx_ir as ir

from compress.graph.rules._edit import Weights, node
from compress.plan import Fate


def integer(
    weights: Weights, fate: Fate, bias: ir.Value | None, source: ir.Value, before: ir.Node, output: ir.Value
) -> None:
    """Insert ``output = source W^T + bias`` in 8-bit integers, with the inputs' range found at run time."""
    inputs: list[ir.Value | None] = [source, weights.part(fate, "codes"), weights.part(fate, "scales")]
    if bias is not None:
        inputs += [None, bias]
    node(weights.graph, before, "DynamicQuantizeMatMul", inputs, [output], domain="com.microsoft")
