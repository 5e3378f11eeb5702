"""What a rotated model computes that the source does not: its inputs' rotation at run time, and a tied head's.

Inputs ``x [.., K]`` of a linear that nothing linear makes are multiplied by a Hadamard matrix H in blocks of b::

    y = Reshape(MatMul(Reshape(x, [0, 0, K / b, b]), H), [0, 0, K])

A tied head, whose table is in the rotated basis (see :mod:`compress.rotation.structure`)::

    logits = MatMul(hidden, E)      ->      logits = MatMul(MatMul(hidden, R' diag(g) R), E)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.contracts import Linear
from compress.errors import CompressError
from compress.graph.rules._edit import constant, node, products
from compress.planning import Plan
from compress.rotation.matrices import hadamard


def turned(graph: ir.Graph, source: ir.Value, before: ir.Node, block: int, name: str) -> ir.Value:
    """Insert the rotation of ``source``, whose last axis is whole blocks; returns its output."""
    matrix = constant(graph, f"rotation/hadamard_{block}", np.array(hadamard(block)))
    split = constant(graph, f"rotation/blocks_{block}", np.array([0, 0, -1, block], np.int64))
    joined = constant(graph, "rotation/channels", np.array([0, 0, -1], np.int64))
    blocks, mixed, output = (ir.Value(name=f"{name}/{part}") for part in ("blocks", "mixed", "turned"))
    node(graph, before, "Reshape", [source, split], [blocks])
    node(graph, before, "MatMul", [blocks, matrix], [mixed])
    node(graph, before, "Reshape", [mixed, joined], [output])
    return output


def insert_head_turn(graph: ir.Graph, plan: Plan) -> int:
    """Insert the linear that turns the head's inputs into a skeleton, its weight without value; returns how many.

    Raises:
        CompressError: The skeleton has no head where the plan's family says so.
    """
    turn = next((linear for linear in plan.structure.linears if linear.role == "rotation"), None)
    if turn is None:
        return 0
    first = _head(graph, next(linear for linear in plan.structure.linears if linear.role == "head"))
    shape = ir.Shape([turn.in_features, turn.out_features])
    name = turn.graph_weights[0]
    place = ir.ExternalTensor("not-written", 0, 0, ir.DataType.FLOAT, shape=shape, name=name)
    weight = ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=place)
    graph.register_initializer(weight)
    output = ir.Value(name=f"{turn.name}/turned")
    node(graph, first, "MatMul", [first.inputs[0], weight], [output])
    first.replace_input_with(0, output)
    return 1


def _head(graph: ir.Graph, linear: Linear) -> ir.Node:
    weight = graph.initializers.get(linear.graph_weights[0])
    found = products(graph, weight, []) if weight is not None else []
    if not found:
        raise CompressError("the graph skeleton lacks the head that the family describes", where=linear.name)
    return found[-1]
