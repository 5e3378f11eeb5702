"""Attention of an encoder: eleven nodes a layer become one, and the mask is prepared once for all layers.

Before (B batch, S sequence, N heads, D head size; the mask's dozen nodes are shared, its additions are not)::

    q', k', v' = Transpose(Reshape(q | k | v, [B, S, N, D]))          # k' is [B, N, D, S]
    p = Softmax(Add(Mul(MatMul(q', k'), scale), Where(padding, 0, -inf)))
    y = Reshape(Transpose(MatMul(p, v')), [B, S, N * D])

After::

    m = Cast(attention_mask, int32)                                     # once
    y = com.microsoft.MultiHeadAttention(q, k, v, , m, num_heads=N, scale=scale)
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from compress.errors import CompressError
from compress.graph.rules._edit import drop, node, number, producer, supersede

_MASK = "attention_mask"


@dataclass(frozen=True)
class _Place:
    """One layer's attention: what goes in, the value that comes out, and its nodes from the last to the first."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    scale: float
    output: ir.Value
    dead: tuple[ir.Node, ...]


def apply(graph: ir.Graph, heads: int) -> int:
    """Fuse every attention that has ``heads`` heads; returns how many.

    Raises:
        CompressError: An attention is masked by something else than ``attention_mask``.
    """
    places = [place for softmax in list(graph) if softmax.op_type == "Softmax" and (place := _match(softmax))]
    if not places:
        return 0
    mask = next((value for value in graph.inputs if value.name == _MASK), None)
    if mask is None:
        raise CompressError("the graph has no input attention_mask")
    narrow = ir.Value(name=f"{_MASK}/int32", shape=mask.shape, type=ir.TensorType(ir.DataType.INT32))
    node(graph, graph[0], "Cast", [mask], [narrow], to=int(ir.DataType.INT32))
    for place in places:
        old = place.output
        fused = ir.Value(name=f"{old.name}/fused", shape=old.shape, type=old.type)
        node(
            graph,
            place.dead[0],
            "MultiHeadAttention",
            [place.query, place.key, place.value, None, narrow],
            [fused],
            domain="com.microsoft",
            num_heads=heads,
            scale=place.scale,
        )
        supersede(old, fused)
        drop(graph, place.dead)
    drop_unread(graph)
    return len(places)


def _match(softmax: ir.Node) -> _Place | None:
    masked = producer(softmax.inputs[0], "Add")
    scaled = producer(masked.inputs[0], "Mul") if masked else None
    scores = producer(scaled.inputs[0], "MatMul") if scaled else None
    context = _user(softmax.outputs[0], "MatMul")
    merged = _user(context.outputs[0], "Transpose") if context else None
    flat = _user(merged.outputs[0], "Reshape") if merged else None
    if masked is None or scaled is None or scores is None or context is None or merged is None or flat is None:
        return None
    mask, scale = masked.inputs[1], number(scaled.inputs[1])
    if scale is None or _permutation(merged) != (0, 2, 1, 3) or not _is_padding(mask):
        return None
    parts = (
        _split_heads(scores.inputs[0], (0, 2, 1, 3)),
        _split_heads(scores.inputs[1], (0, 2, 3, 1)),
        _split_heads(context.inputs[1], (0, 2, 1, 3)),
    )
    if parts[0] is None or parts[1] is None or parts[2] is None:
        return None
    dead = [flat, merged, context, softmax, masked, scaled, scores]
    for _, nodes in (parts[0], parts[1], parts[2]):
        dead += nodes
    return _Place(parts[0][0], parts[1][0], parts[2][0], scale, flat.outputs[0], tuple(dead))


def _split_heads(value: ir.Value | None, permutation: tuple[int, ...]) -> tuple[ir.Value, list[ir.Node]] | None:
    """Return what was reshaped to heads and moved, and the nodes that did it."""
    moved = producer(value, "Transpose")
    shaped = producer(moved.inputs[0], "Reshape") if moved else None
    if moved is None or shaped is None or _permutation(moved) != permutation or shaped.inputs[0] is None:
        return None
    return shaped.inputs[0], [moved, shaped]


def _permutation(transpose: ir.Node) -> tuple[int, ...]:
    attribute = transpose.attributes.get("perm")
    return tuple(attribute.as_ints()) if attribute is not None else ()


def _user(value: ir.Value, op_type: str) -> ir.Node | None:
    users = {user for user, _ in value.uses()}
    user = next(iter(users)) if len(users) == 1 else None
    return user if user is not None and user.op_type == op_type else None


def _is_padding(value: ir.Value | None) -> bool:
    """Return whether a mask depends on ``attention_mask``, and on nothing else but shapes."""
    where = producer(value, "Where")
    if where is None:
        return False
    seen: set[ir.Value] = set()
    waiting, masks = [where.inputs[0]], False
    while waiting:
        current = waiting.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        if current.is_graph_input():
            masks = masks or current.name == _MASK
            if current.name != _MASK:
                return False
        made = current.producer()
        if made is not None and made.op_type != "Shape":
            waiting += made.inputs
    return masks


def drop_unread(graph: ir.Graph) -> None:
    """Remove every node that nobody reads any more."""
    for dead in reversed(list(graph)):
        drop(graph, [dead])
