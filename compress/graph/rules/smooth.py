"""Rescaled channels: what the weights were changed by (``compress.calibrate.smoothing``) is undone in the graph.

Before (x is a norm's output; r the linears that read it, o the one that it is added to)::

    x = Norm(..);  y = MatMul(x, Wr);  sum = Add(o, x)

After (the norm emits (x - z) / s, Wr and the biases are changed to match)::

    x' = Norm(..);  y = MatMul(x', Wr');  sum = Add(o', Mul(x', s))

Anything else that reads x gets ``Add(Mul(x', s), z)``. Inputs of a feed-forward's second linear::

    y = MatMul(h, W)   ->   y = MatMul(Mul(h, 1 / s), W')
"""

from __future__ import annotations

import onnx_ir as ir

from compress.calibrate.smoothing import scale_name, shift_name
from compress.contracts import Encoder, Junction
from compress.errors import CompressError
from compress.graph.rules._edit import Weights, node, only_user, products
from compress.planning import Plan


def apply(graph: ir.Graph, plan: Plan, weights: Weights) -> int:
    """Undo every change in the graph; returns how many values were rescaled. Nothing where nothing was changed."""
    encoder = plan.structure
    if not isinstance(encoder, Encoder):
        return 0
    names = [item.name for item in encoder.junctions] + [item.name for item in encoder.linears]
    scaled = {name for name in names if scale_name(name) in plan.by_name}
    if not scaled:
        return 0
    places = {
        linear.name: [matmul for name in linear.graph_weights for matmul in _matmuls(weights, name)]
        for linear in encoder.linears
    }
    count = sum(_junction(weights, plan, junction, places) for junction in encoder.junctions)
    for linear in encoder.linears:
        if linear.name in scaled and linear.role == "down":
            scale = weights.value(plan.by_name[scale_name(linear.name)].stored[0])
            for matmul in places[linear.name]:
                inner = matmul.inputs[0]
                assert inner is not None
                matmul.replace_input_with(0, _product(graph, inner, scale, before=matmul, name=f"{inner.name}/scaled"))
                count += 1
    return count


def _matmuls(weights: Weights, name: str) -> list[ir.Node]:
    weight = weights.skeleton(name)
    return products(weights.graph, weight, []) if weight is not None else []


def _junction(weights: Weights, plan: Plan, junction: Junction, places: dict[str, list[ir.Node]]) -> int:
    graph = weights.graph
    scale = weights.value(plan.by_name[scale_name(junction.name)].stored[0])
    readers = {matmul for name in junction.readers for matmul in places[name]}
    added = {_biased(matmul) for name in junction.added for matmul in places[name]}
    values = [_biased(matmul) for name in junction.producers for matmul in places[name]]
    for norm in junction.norms:
        weight = weights.skeleton(f"{norm}.weight")
        values += [user.outputs[0] for user, _ in weight.uses()] if weight is not None else []
    if not values or not readers:
        raise CompressError("the graph skeleton lacks a value that the family describes", where=junction.name)
    for value in values:
        _rescale(graph, weights, plan, junction, value, scale, readers, added)
    return len(values)


def _rescale(
    graph: ir.Graph,
    weights: Weights,
    plan: Plan,
    junction: Junction,
    value: ir.Value,
    scale: ir.Value,
    readers: set[ir.Node],
    added: set[ir.Value],
) -> None:
    """Give every user of a value that is no reader what it was before."""
    made = value.producer()
    assert made is not None
    residual: ir.Value | None = None
    whole: ir.Value | None = None
    was_output = value.is_graph_output()
    for user, index in list(value.uses()):
        if user in readers:
            continue
        if residual is None:
            residual = ir.Value(name=f"{value.name}/rescaled", shape=value.shape, type=value.type)
            _after(graph, made, "Mul", [value, scale], residual)
        if user.op_type == "Add" and any(other in added for other in user.inputs):
            user.replace_input_with(index, residual)
            continue
        if whole is None:
            whole = _restored(weights, plan, junction, value, residual)
        user.replace_input_with(index, whole)
    if was_output:
        name, value.name = value.name, f"{value.name}/smoothed"
        if residual is None:
            residual = ir.Value(name=f"{name}/rescaled", shape=value.shape, type=value.type)
            _after(graph, made, "Mul", [value, scale], residual)
        whole = whole or _restored(weights, plan, junction, value, residual)
        whole.name = name
        graph.outputs[list(graph.outputs).index(value)] = whole


def _restored(weights: Weights, plan: Plan, junction: Junction, value: ir.Value, residual: ir.Value) -> ir.Value:
    if shift_name(junction.name) not in plan.by_name:
        raise CompressError("a value is read by something that the family does not describe", where=junction.name)
    shift = weights.value(plan.by_name[shift_name(junction.name)].stored[0])
    whole = ir.Value(name=f"{value.name}/restored", shape=value.shape, type=value.type)
    made = residual.producer()
    assert made is not None
    _after(weights.graph, made, "Add", [residual, shift], whole)
    return whole


def _biased(matmul: ir.Node) -> ir.Value:
    """Return a linear's output: what its bias was added to."""
    following = only_user(matmul.outputs[0])
    return following.outputs[0] if following is not None and following.op_type == "Add" else matmul.outputs[0]


def _after(graph: ir.Graph, place: ir.Node, op_type: str, inputs: list[ir.Value], output: ir.Value) -> None:
    graph.insert_after(place, ir.node(op_type, inputs=inputs, outputs=[output], name=f"{output.name}/{op_type}"))


def _product(graph: ir.Graph, value: ir.Value, scale: ir.Value, *, before: ir.Node, name: str) -> ir.Value:
    # The first dimensions are the value's; the last one may have grown by repeated neurons.
    output = ir.Value(name=name, type=value.type)
    node(graph, before, "Mul", [value, scale], [output])
    return output
