"""How large the graph file will be, before there is a graph: exact for the tensors, fitted for the nodes.

Tensor entries (names, shapes, offsets as decimal strings) are serialized as the writer will and counted. Node bytes
were measured on the graphs themselves: so much for the boundary, so much a block, so much for each scale that needs a
Cast.
``tests/test_plan.py`` holds the sum to 1 % of what comes out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.contracts import Decoder, Structure

if TYPE_CHECKING:
    from compress.plan import Fate, Plan, StoredTensor

_LOCATION = "model.onnx.data"
#: Fixed bytes and bytes a block of the remaining nodes, inputs and outputs: with rotary embedding, and without.
_ROTARY, _ABSOLUTE = (1690, 2762), (1680, 2085)
_ENCODER = (2500, 1900)
#: A linear without quantization has a MatMul with fewer inputs and no attributes; with a bias it also has an Add.
_FLOAT_LINEAR, _FLOAT_BIAS = -110, 110
#: LongRoPE's positions: nodes and constants once, and an input of every attention node.
_LONG_ROPE = (1167, 22)
_CAST = 48


def predict_graph_bytes(plan: Plan) -> int:
    """Return the predicted bytes of ``model.onnx``."""
    total = _node_bytes(plan.structure)
    for fate in plan.fates:
        uses = 2 if fate.tied else 1
        for stored in fate.stored:
            total += _entry_bytes(stored) + uses * (len(stored.name) + 2)
        total += _node_extra(fate, biased=f"{fate.name}.bias" in plan.by_name)
        if fate.tied and fate.scheme is not None:
            total += _entry_bytes(fate.stored[0])  # the head's own view of the same bytes
    return total


def _node_bytes(structure: Structure) -> int:
    if not isinstance(structure, Decoder):
        fixed, block = _ENCODER
        return fixed + block * structure.layers
    fixed, block = _ROTARY if structure.rope_shape is not None else _ABSOLUTE
    total = fixed + block * structure.layers
    if structure.rope_switch is not None:
        total += _LONG_ROPE[0] + _LONG_ROPE[1] * structure.layers
    return total


def _node_extra(fate: Fate, *, biased: bool) -> int:
    if fate.kind == "matmul" and fate.scheme is None:
        return _FLOAT_LINEAR + (_FLOAT_BIAS if biased else 0)
    scales = fate.part("scales")
    if scales is not None and scales.dtype == "float16":
        return _CAST + 3 * len(scales.name)
    if scales is not None and scales.dtype == "int8":
        return 2 * _CAST + 6 * len(scales.name)
    return 0


def _entry_bytes(stored: StoredTensor) -> int:
    import onnx

    types = {
        "float32": onnx.TensorProto.FLOAT,
        "float16": onnx.TensorProto.FLOAT16,
        "int8": onnx.TensorProto.INT8,
        "uint8": onnx.TensorProto.UINT8,
    }
    entry = onnx.TensorProto(name=stored.name, dims=stored.shape, data_type=types[stored.dtype])
    if stored.offset is None:
        entry.raw_data = bytes(stored.nbytes)
    else:
        entry.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", _LOCATION), ("offset", stored.offset), ("length", stored.nbytes)):
            entry.external_data.add(key=key, value=str(value))
    size = int(entry.ByteSize())
    return size + 1 + (1 if size < 128 else 2 if size < 16384 else 3)
