"""Products of integers: the nodes that a linear with 8-bit inputs becomes.

Range of the inputs found at run time::

    y = com.microsoft.DynamicQuantizeMatMul(x, codes, scales, , bias)

Range found by calibration, in standard operators that every provider fuses to its own::

    x' = DequantizeLinear(QuantizeLinear(x, s, z), s, z)
    y  = Add(MatMul(x', DequantizeLinear(codes, scales, axis=1)), bias)

Range found at run time for every token by itself (inputs whose tokens differ a thousandfold in size)::

    x', r = SimplifiedLayerNormalization(x, 1)          # r is 1 over the token's root mean square
    y     = Div(DynamicQuantizeMatMul(x', codes, scales), r);  y' = Add(y, bias)

Range known beforehand, whatever the text (:attr:`compress.contracts.Linear.input_range`), r to both sides of 0::

    y = com.microsoft.MatMulIntegerToFloat(QuantizeLinear(x, r / 127, 128), codes, r / 127, scales, 128, , bias)

Query, key and value are one linear: nothing else here reads a value twice. Without a range of its own (``graph/
quantize_activations.py`` gives every tensor one later) the product reads x as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.graph.rules._edit import Weights, constant, node
from compress.planning import INPUT_RANGE, Fate


def integer_product(
    weights: Weights, fate: Fate, bias: ir.Value | None, source: ir.Value, before: ir.Node, output: ir.Value
) -> None:
    """Insert ``output = source W^T + bias`` before a node."""
    assert fate.scheme is not None
    if fate.scheme.activations == "static":
        _static(weights, fate, bias, source, before, output)
        return
    inputs = [source, weights.part(fate, "codes"), weights.part(fate, "scales")]
    inputs += [None, bias] if bias is not None else []
    node(weights.graph, before, "DynamicQuantizeMatMul", inputs, [output], domain="com.microsoft")


def fixed_range(
    weights: Weights,
    fate: Fate,
    bias: ir.Value | None,
    source: ir.Value,
    before: ir.Node,
    output: ir.Value,
    reach: float,
) -> None:
    """Insert ``output = source W^T + bias``, inputs rounded in ``[-reach, reach]`` and clipped outside of it."""
    graph = weights.graph
    scale = constant(graph, f"range/{reach:g}/scale", np.array(reach / 127, np.float32))
    zero_point = constant(graph, "range/zero_point", np.array(128, np.uint8))
    rounded = ir.Value(name=f"{output.name}/rounded")
    node(graph, before, "QuantizeLinear", [source, scale, zero_point], [rounded])
    inputs = [rounded, weights.part(fate, "codes"), scale, weights.part(fate, "scales"), zero_point]
    inputs += [None, bias] if bias is not None else []
    node(graph, before, "MatMulIntegerToFloat", inputs, [output], domain="com.microsoft")


def row_by_row(
    weights: Weights, fate: Fate, bias: ir.Value | None, source: ir.Value, before: ir.Node, output: ir.Value
) -> None:
    """Insert ``output = source W^T + bias`` with every token brought to unit size first, and its size multiplied in."""
    graph = weights.graph
    one = constant(graph, f"unit/{fate.columns}", np.ones(fate.columns, np.float32))
    unit, inverse, product, whole = (
        ir.Value(name=f"{output.name}/{part}") for part in ("unit", "inverse_size", "unit_product", "product")
    )
    # The epsilon only keeps a token of zeros finite.
    node(
        graph,
        before,
        "SimplifiedLayerNormalization",
        [source, one],
        [unit, inverse],
        axis=-1,
        epsilon=1e-30,
        stash_type=1,
    )
    integer_product(weights, fate, None, unit, before, product)
    node(graph, before, "Div", [product, inverse], [whole if bias is not None else output])
    if bias is not None:
        node(graph, before, "Add", [whole, bias], [output])


def _static(
    weights: Weights, fate: Fate, bias: ir.Value | None, source: ir.Value, before: ir.Node, output: ir.Value
) -> None:
    graph, by_name = weights.graph, weights.plan.by_name
    codes, rounded, weight = (ir.Value(name=f"{output.name}/{part}") for part in ("codes", "rounded", "weight"))
    if f"{fate.name}.{INPUT_RANGE[0]}" in by_name:
        scale, zero_point = (weights.value(by_name[f"{fate.name}.{part}"].stored[0]) for part in INPUT_RANGE)
        node(graph, before, "QuantizeLinear", [source, scale, zero_point], [codes])
        node(graph, before, "DequantizeLinear", [codes, scale, zero_point], [rounded])
    else:
        rounded = source
    stored = [weights.part(fate, "codes"), weights.part(fate, "scales")]
    node(graph, before, "DequantizeLinear", stored, [weight], axis=1)
    product = output if bias is None else ir.Value(name=f"{output.name}/product")
    node(graph, before, "MatMul", [rounded, weight], [product])
    if bias is not None:
        node(graph, before, "Add", [product, bias], [output])
