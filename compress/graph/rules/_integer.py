"""Products of integers: the nodes that a linear with 8-bit inputs becomes.

One linear reads a value, range found at run time::

    y = com.microsoft.DynamicQuantizeMatMul(x, codes, scales, , bias)

Several read the same value (query, key, value), which is then quantized once::

    q, s, z = DynamicQuantizeLinear(x)
    y = com.microsoft.MatMulIntegerToFloat(q, codes, s, scales, z, , bias)

Range found by calibration, in standard operators that every provider fuses to its own::

    x' = DequantizeLinear(QuantizeLinear(x, s, z), s, z)
    y  = Add(MatMul(x', DequantizeLinear(codes, scales, axis=1)), bias)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import onnx_ir as ir

from compress.graph.rules._edit import Weights, node, products
from compress.plan import INPUT_RANGE, Fate, Plan


@dataclass
class IntegerProducts:
    """Makes the nodes; remembers which values are quantized already."""

    weights: Weights
    plan: Plan
    _quantized: dict[ir.Value, tuple[ir.Value, ...]] = field(default_factory=dict)
    _readers: Counter[ir.Value] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        for linear in self.plan.structure.linears:
            fate = self.plan.by_name.get(linear.name)
            if fate is None or fate.scheme is None or fate.scheme.activations == "none":
                continue
            skeleton = self.weights.skeleton(linear.graph_weights[0])
            for matmul in products(self.weights.graph, skeleton, []) if skeleton is not None else []:
                if matmul.inputs[0] is not None:
                    self._readers[matmul.inputs[0]] += 1

    def replace(self, fate: Fate, bias: ir.Value | None, source: ir.Value, before: ir.Node, output: ir.Value) -> None:
        """Insert ``output = source W^T + bias`` before a node."""
        assert fate.scheme is not None
        if fate.scheme.activations == "static":
            self._static(fate, bias, source, before, output)
        elif self._readers[source] > 1:
            self._shared(fate, bias, source, before, output)
        else:
            inputs = [source, self.weights.part(fate, "codes"), self.weights.part(fate, "scales")]
            inputs += [None, bias] if bias is not None else []
            node(self.weights.graph, before, "DynamicQuantizeMatMul", inputs, [output], domain="com.microsoft")

    def _shared(self, fate: Fate, bias: ir.Value | None, source: ir.Value, before: ir.Node, output: ir.Value) -> None:
        graph = self.weights.graph
        if source not in self._quantized:
            made = tuple(ir.Value(name=f"{source.name}/{part}") for part in ("codes", "scale", "zero_point"))
            node(graph, before, "DynamicQuantizeLinear", [source], made)
            self._quantized[source] = made
        codes, scale, zero_point = self._quantized[source]
        inputs = [codes, self.weights.part(fate, "codes"), scale, self.weights.part(fate, "scales"), zero_point]
        inputs += [None, bias] if bias is not None else []
        node(graph, before, "MatMulIntegerToFloat", inputs, [output], domain="com.microsoft")

    def _static(self, fate: Fate, bias: ir.Value | None, source: ir.Value, before: ir.Node, output: ir.Value) -> None:
        graph, weights = self.weights.graph, self.weights
        if source not in self._quantized:
            scale, zero_point = (
                weights.value(self.plan.by_name[f"{fate.name}.{part}"].stored[0]) for part in INPUT_RANGE
            )
            codes, rounded = (ir.Value(name=f"{source.name}/{part}") for part in ("codes", "rounded"))
            node(graph, before, "QuantizeLinear", [source, scale, zero_point], [codes])
            node(graph, before, "DequantizeLinear", [codes, scale, zero_point], [rounded])
            self._quantized[source] = (rounded,)
        weight = ir.Value(name=f"{output.name}/weight")
        node(
            graph,
            before,
            "DequantizeLinear",
            [weights.part(fate, "codes"), weights.part(fate, "scales")],
            [weight],
            axis=1,
        )
        product = output if bias is None else ir.Value(name=f"{output.name}/product")
        node(graph, before, "MatMul", [self._quantized[source][0], weight], [product])
        if bias is not None:
            node(graph, before, "Add", [product, bias], [output])
