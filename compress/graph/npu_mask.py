"""Padding masked by a small finite number.

Before (a is ``attention_mask``, ``[B, S]``; m is 1 for real tokens, however the exporter spells it)::

    scores' = Add(scores, Where(m(a), 0, -3.4e38))

After::

    scores' = Add(scores, Mul(Sub(Unsqueeze(Cast(a, float)), 1), 100))              # 0, or -100: [B, 1, 1, S]

Sixteen bits have 65,536 levels: with -3.4e38 in the range, every score rounds to the same one. After a softmax, 100
less is nothing (3.7e-44 times the others); the scores themselves lie within some tens. That the mask means nothing but
padding is not taken for granted: it is computed for a few masks and compared.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.errors import CompressError
from compress.graph.rules._edit import constant, drop, number

#: What a masked score is lowered by.
MASKED = 100.0
_LOWEST = -1e4


def apply(graph: ir.Graph, mask_name: str = "attention_mask") -> int:
    """Replace every such mask; returns how many. Shapes are static, and known.

    Raises:
        CompressError: A mask is not that of padding: a causal one, or one with a window.
    """
    mask = next((value for value in graph.inputs if value.name == mask_name), None)
    found = [node for node in graph if node.op_type == "Where" and _hides(node)]
    if mask is None or not found:
        return 0
    finite: ir.Value | None = None
    for node in found:
        _check(node, mask)
        finite = finite or _finite(graph, mask, node)
        ir.convenience.replace_all_uses_with(node.outputs[0], finite)
        _drop_behind(graph, node)
    return len(found)


def _hides(node: ir.Node) -> bool:
    kept, hidden = number(node.inputs[1]), number(node.inputs[2])
    return kept == 0 and hidden is not None and hidden <= _LOWEST


def _finite(graph: ir.Graph, mask: ir.Value, before: ir.Node) -> ir.Value:
    """Return the mask as something to add, ``[B, 1, 1, S]``."""
    assert mask.shape is not None
    batch, length = mask.shape
    real, column, less, finite = (ir.Value(name=f"mask/{part}") for part in ("real", "column", "less", "finite"))
    for value, shape in ((real, (batch, length)), *((one, (batch, 1, 1, length)) for one in (column, less, finite))):
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
    axes = constant(graph, "mask/axes", np.array([1, 2]))
    one = constant(graph, "mask/one", np.array(1, np.float32))
    masked = constant(graph, "mask/masked", np.array(MASKED, np.float32))
    made = (
        ir.node("Cast", [mask], outputs=[real], attributes={"to": int(ir.DataType.FLOAT)}, name="mask/Cast"),
        ir.node("Unsqueeze", [real, axes], outputs=[column], name="mask/Unsqueeze"),
        ir.node("Sub", [column, one], outputs=[less], name="mask/Sub"),
        ir.node("Mul", [less, masked], outputs=[finite], name="mask/Mul"),
    )
    graph.insert_before(before, made)
    return finite


def _check(where: ir.Node, mask: ir.Value) -> None:
    """Compute the mask by its own nodes.

    Raises:
        CompressError: It is not 0 for real tokens and the lowest number for padding.
    """
    assert mask.shape is not None and mask.type is not None
    nodes = _behind(where)
    graph = ir.Graph(
        [ir.Value(name=mask.name, shape=mask.shape, type=mask.type)],
        [],
        nodes=[],
        opset_imports=where.graph.opset_imports if where.graph is not None else {"": 21},
    )
    copies: dict[ir.Value, ir.Value] = {mask: graph.inputs[0]}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value.is_initializer():
                copy = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
                copies.setdefault(value, copy)
                if copies[value] is copy:
                    graph.register_initializer(copy)
        if any(value is not None and value not in copies for value in node.inputs):
            raise CompressError("an attention mask depends on more than the padding", where=where.name)
        copy_of = ir.node(
            node.op_type,
            [copies[value] if value is not None else None for value in node.inputs],
            attributes=dict(node.attributes),
            outputs=[ir.Value(name=value.name) for value in node.outputs],
            domain=node.domain,
            name=node.name,
        )
        graph.append(copy_of)
        copies |= dict(zip(node.outputs, copy_of.outputs, strict=True))
    output = copies[where.outputs[0]]
    output.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(output)
    _compare(ir.to_proto(ir.Model(graph, ir_version=10)), mask, where)


def _compare(model: object, mask: ir.Value, where: ir.Node) -> None:
    from onnx.reference import ReferenceEvaluator

    assert mask.shape is not None
    batch, length = mask.shape.numpy()
    runner = ReferenceEvaluator(model)
    for real in (length, max(1, length // 3), 1):
        given = np.zeros((batch, length), np.int64)
        given[:, :real] = 1
        given[:, length // 2 + 1 :: 2] = 0  # holes, which no causal mask has
        (seen,) = runner.run(None, {str(mask.name): given})
        assert isinstance(seen, np.ndarray)
        wanted = np.broadcast_to(given[:, None, None, :] == 0, seen.shape) if seen.ndim == 4 else None
        if wanted is None or not np.array_equal(seen < _LOWEST, wanted):
            raise CompressError(
                "an attention mask hides more than padding",
                where=where.name,
                hint="the static graph is made for encoders that see every token in both directions",
            )


def _behind(last: ir.Node) -> list[ir.Node]:
    """Return the nodes that a node's output depends on, itself included, in their order."""
    found: set[ir.Node] = set()
    todo = [last]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            made = (value.producer() for value in node.inputs if value is not None)
            todo += [node for node in made if node is not None]
    assert last.graph is not None
    return [node for node in last.graph if node in found]


def _drop_behind(graph: ir.Graph, node: ir.Node) -> None:
    for dead in reversed(_behind(node)):
        drop(graph, [dead])
