"""Floats of half the width: the graph's own type becomes float16 from the tokens to the logits.

Before: ``past_key_values.N.*``, ``present.N.*``, ``logits`` and every float constant are float32.
After:  the same nodes between float16 values; planned weights are float16 already.

No Cast is inserted: the fused operators have kernels of both types, and sum and normalise in float32 inside. The
skeleton is not asked for in float16, because its builder then leaves attention unfused. Positions, lengths and masks
are integers and stay so.
"""

from __future__ import annotations

import onnx_ir as ir

from compress.errors import CompressError
from compress.graph.rules._edit import constant, forget

_FLOAT, _HALF = ir.DataType.FLOAT, ir.TensorType(ir.DataType.FLOAT16)


def apply(graph: ir.Graph) -> int:
    """Retype the graph's inputs, outputs and float constants; returns of how many inputs and outputs.

    Raises:
        CompressError: A weight was not planned in float16, or a node makes float32 whatever it is given.
    """
    for name, value in list(graph.initializers.items()):
        if value.dtype == _FLOAT:
            _narrow(graph, name, value)
    for node in graph:
        wanted = node.attributes.get("to")
        if node.op_type == "Cast" and wanted is not None and wanted.as_int() == _FLOAT:
            raise CompressError("a node makes float32, which a float16 graph does not have", where=node.name)
    boundary = [value for value in (*graph.inputs, *graph.outputs) if value.dtype == _FLOAT]
    for value in boundary:
        value.type = _HALF
    return len(boundary)


def _narrow(graph: ir.Graph, name: str, value: ir.Value) -> None:
    tensor = value.const_value
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        raise CompressError("a weight is float32 in a float16 graph", where=name)
    narrow = constant(graph, f"{name}/float16", tensor.numpy().astype("float16"))
    ir.convenience.replace_all_uses_with(value, narrow)
    forget(graph, value)
