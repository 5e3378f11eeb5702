"""Linear layers: weights as the checkpoint has them -> one node over planned bytes.

Before (any number of stacked weights, one MatMul or one for each; the bias is optional)::

    W = Transpose(w)                      W = Transpose(Concat(w0, w1, w2))
    y = MatMul(x, W)                      y = MatMul(x, W);  y' = Add(y, b)

After, quantized::

    y = com.microsoft.MatMulNBits(x, codes, scales, zero_points?, , bias?)

After, integers times integers (``graph/rules/_integer.py``)::

    y = com.microsoft.DynamicQuantizeMatMul(x, codes, scales, , bias?)          # or with a fixed range

After, float32 (the weight is stored as [K, N], so that no transposed copy is made at load time)::

    y = MatMul(x, weight);  y' = Add(y, bias)

Inputs that are rotated at run time (``graph/rules/rotation.py``) are rotated in front of it.

Several MatMuls of the same input (gate and up) become one node and a Split.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from compress.contracts import Linear
from compress.errors import CompressError
from compress.graph.rules._edit import Weights, drop, node, only_user, products, supersede
from compress.graph.rules._integer import fixed_range, integer_product, row_by_row
from compress.graph.rules.rotation import turned
from compress.planning import Fate, Plan


@dataclass(frozen=True)
class _Place:
    """Where a linear sits in the skeleton: its input, the values it must produce, the nodes it makes superfluous."""

    source: ir.Value
    outputs: tuple[ir.Value, ...]
    first: ir.Node
    dead: tuple[ir.Node, ...]


def apply(graph: ir.Graph, plan: Plan, weights: Weights, *, accuracy_level: int) -> int:
    """Replace every linear of the plan; returns how many."""
    fired = 0
    for linear in plan.structure.linears:
        # A tied head has no weight of its own.
        fate = plan.by_name.get(linear.name) or plan.by_name[plan.structure.tables[0].name]
        bias = plan.by_name.get(f"{linear.name}.bias")
        places = _find(weights, linear)
        for index, place in enumerate(places):
            name = linear.name if len(places) == 1 else f"{linear.name}.{index}"
            _replace(weights, linear, name, fate, bias, place, accuracy_level)
        fired += len(places)
    return fired


def _find(weights: Weights, linear: Linear) -> list[_Place]:
    """Return where a linear is used: once, or as often as its block is run (ALBERT)."""
    found: list[list[ir.Node]] = []
    passed: list[ir.Node] = []
    for name in linear.graph_weights:
        weight = weights.skeleton(name)
        matmuls = products(weights.graph, weight, passed) if weight is not None else []
        if not matmuls or (found and len(found[0]) != len(matmuls)):
            raise CompressError("the graph skeleton lacks a linear layer that the family describes", where=name)
        found.append(matmuls)
    return [_place(linear, list(dict.fromkeys(together)), passed) for together in zip(*found, strict=True)]


def _place(linear: Linear, matmuls: list[ir.Node], passed: list[ir.Node]) -> _Place:
    dead = list(passed)
    outputs: list[ir.Value] = []
    for product in matmuls:
        output = product.outputs[0]
        dead.insert(0, product)
        if linear.graph_biases:
            added = only_user(output)
            if added is None or added.op_type != "Add":
                raise CompressError("the graph skeleton lacks the bias that the family describes", where=linear.name)
            bias = next(value for value in added.inputs if value is not output)
            output = added.outputs[0]
            dead.insert(0, added)
            if bias is not None and (stacked := bias.producer()) is not None:
                dead.append(stacked)
        outputs.append(output)
    source = matmuls[0].inputs[0]
    assert source is not None
    return _Place(source, tuple(outputs), matmuls[0], tuple(dead))


def _replace(
    weights: Weights,
    linear: Linear,
    name: str,
    fate: Fate,
    bias: Fate | None,
    place: _Place,
    accuracy_level: int,
) -> None:
    graph = weights.graph
    whole = place.outputs[0] if len(place.outputs) == 1 else None
    output = ir.Value(name=whole.name if whole is not None else f"{name}/output")
    if whole is not None:
        output.shape, output.type = whole.shape, whole.type
    bias_value = weights.value(bias.stored[0]) if bias is not None else None
    if linear.hadamard:
        place = replace(place, source=turned(graph, place.source, place.first, linear.hadamard, name))
    if fate.scheme is None:
        _float(weights, fate, bias_value, place, output)
    elif fate.scheme.activations != "none" and linear.hadamard:
        row_by_row(weights, fate, bias_value, place.source, place.first, output)
    elif fate.scheme.activations == "dynamic" and linear.input_range:
        fixed_range(weights, fate, bias_value, place.source, place.first, output, linear.input_range)
    elif fate.scheme.activations != "none":
        integer_product(weights, fate, bias_value, place.source, place.first, output)
    else:
        _quantized(weights, linear, fate, bias_value, place, output, accuracy_level)
    if whole is not None:
        supersede(whole, output)
    else:
        halves = [ir.Value(name=value.name) for value in place.outputs]
        node(graph, place.first, "Split", [output], halves, axis=-1, num_outputs=len(halves))
        for old, new in zip(place.outputs, halves, strict=True):
            ir.convenience.replace_all_uses_with(old, new)
    drop(graph, place.dead)


def _float(weights: Weights, fate: Fate, bias: ir.Value | None, place: _Place, output: ir.Value) -> None:
    graph = weights.graph
    weight = weights.value(fate.stored[0])
    if fate.tied:
        # The table is stored once, [V, H]; the runtime transposes its own copy when it loads.
        transposed = ir.Value(name=f"{fate.name}.transposed")
        node(graph, place.first, "Transpose", [weight], [transposed], perm=[1, 0])
        weight = transposed
    product = output if bias is None else ir.Value(name=f"{output.name}/product")
    node(graph, place.first, "MatMul", [place.source, weight], [product])
    if bias is not None:
        node(graph, place.first, "Add", [product, bias], [output])


def _quantized(
    weights: Weights,
    linear: Linear,
    fate: Fate,
    bias: ir.Value | None,
    place: _Place,
    output: ir.Value,
    accuracy_level: int,
) -> None:
    scheme = fate.scheme
    assert scheme is not None
    codes = fate.part("codes")
    assert codes is not None
    blocks = scheme.blocks(linear.in_features)
    # MatMulNBits sees the codes as [N, blocks, bytes a block]: the same bytes that an embedding reads as [N, bytes].
    shape = (linear.out_features, blocks, scheme.block_size * scheme.bits // 8)
    inputs: list[ir.Value | None] = [
        place.source,
        weights.value(codes, name=f"{fate.name}.blocked_codes" if fate.tied else None, shape=shape),
        weights.scales(fate, place.first),
        weights.part(fate, "zero_points"),
        None,
        bias,
    ]
    while inputs[-1] is None:
        inputs.pop()
    node(
        weights.graph,
        place.first,
        "MatMulNBits",
        inputs,
        [output],
        domain="com.microsoft",
        K=linear.in_features,
        N=linear.out_features,
        bits=scheme.bits,
        block_size=scheme.block_size,
        accuracy_level=accuracy_level,
    )
