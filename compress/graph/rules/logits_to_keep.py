"""The head only where it is wanted: generation reads the last position's logits, never the rest.

Before: ``logits = head(hidden)``.
After:  ``logits = head(Slice(hidden, starts=-logits_to_keep, axis=sequence))``

``logits_to_keep`` (int64, shape [1]) is an *optional* graph input: an initializer of the same name holds its default.
0 keeps every position, k the last k - the meaning the argument has in transformers. About a fifth of a small model's
prefill is the head of positions that nobody reads.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.errors import CompressError
from compress.graph.rules._edit import node, producer

NAME = "logits_to_keep"
_SEQUENCE_AXIS = 1
_PRODUCTS = ("MatMulNBits", "MatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")


def apply(graph: ir.Graph, default: int) -> int:
    """Insert the slice in front of the head; returns 1."""
    head = graph.outputs[0].producer()
    while head is not None and head.op_type not in _PRODUCTS:
        first = head.inputs[0]
        head = first.producer() if first is not None else None
    while head is not None and (before := _prepares(head.inputs[0])) is not None:
        head = before
    hidden = head.inputs[0] if head is not None else None
    if head is None or hidden is None:
        raise CompressError("the graph skeleton has no head in front of its logits")
    keep = _constant(NAME, [default])
    graph.register_initializer(keep)
    graph.inputs.append(keep)
    constants = [
        _constant(f"{NAME}/{name}", value)
        for name, value in (("ends", [np.iinfo(np.int64).max]), ("axes", [_SEQUENCE_AXIS]))
    ]
    for value in constants:
        graph.register_initializer(value)
    start, kept = ir.Value(name=f"{NAME}/start"), ir.Value(name=f"{NAME}/hidden")
    node(graph, head, "Neg", [keep], [start])
    node(graph, head, "Slice", [hidden, start, *constants], [kept])
    head.replace_input_with(0, kept)
    shape = graph.outputs[0].shape
    if shape is not None:
        # onnxruntime-genai allocates the logits itself, and takes a numeric length for "the last position alone".
        graph.outputs[0].shape = ir.Shape(["batch_size", default or "logits_length", shape[2]])
    return 1


def _prepares(value: ir.Value | None) -> ir.Node | None:
    """Return what turns a rotated model's head's inputs, or rounds them; ``None`` of a norm's output."""
    return producer(value, "MatMul") or producer(value, "QuantizeLinear")


def _constant(name: str, value: list[int]) -> ir.Value:
    tensor = ir.tensor(np.asarray(value, dtype=np.int64), name=name)
    return ir.Value(name=name, shape=ir.Shape([len(value)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
