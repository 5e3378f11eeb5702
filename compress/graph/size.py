"""How large the graph file will be, before there is a graph: exact for the tensors, fitted for the nodes.

Tensor entries (names, shapes, offsets as decimal strings) are serialized as the writer will and counted. Node bytes
were measured on the graphs themselves: so much for the boundary, so much a block, so much for each scale that needs a
Cast.
``tests/test_plan.py`` holds the sum to 1 % of what comes out.
"""

from __future__ import annotations

from os.path import commonprefix
from typing import TYPE_CHECKING

from compress.contracts import Decoder, Encoder, FloatType, Structure

if TYPE_CHECKING:
    from compress.planning import Fate, Plan, StoredTensor

_LOCATION = "model.onnx.data"
#: Fixed bytes and bytes a block of the remaining nodes, inputs and outputs: with rotary embedding, and without.
_ROTARY, _ABSOLUTE = (1690, 2762), (1680, 2085)
#: An encoder's block without its linears, and the rest of its graph by task (an embedding's pools and normalises).
_ENCODER_BLOCK = 425
_ENCODER_TASK = {
    "embedding": 1910,
    "text-classification": 1060,
    "token-classification": 985,
    "question-answering": 1300,
    "fill-mask": 1220,
}
#: The nodes of one of its linears, by how it multiplies; with attention, where that is in the same node.
_ENCODER_LINEAR = {"float": 121, "integer": 102, "blocks": 175}
_ENCODER_ATTENTION = {"float": 135, "integer": 412, "blocks": 491}
#: What a quantized table needs more than a float one, and what the table of segments needs.
_ENCODER_LOOKUP, _ENCODER_SEGMENTS = 103, 122
#: A linear without quantization has a MatMul with fewer inputs and no attributes; with a bias it also has an Add.
_FLOAT_LINEAR, _FLOAT_BIAS = -110, 110
#: LongRoPE's positions: nodes and constants once, and an input of every attention node.
_LONG_ROPE = (1167, 22)
#: A sink for every head that adds nothing, and the input that it is of every attention node. What such a node says of a
#: cache of bytes. Each input in front of them that is left out; where they stand.
_SINK, _SINK_INPUT, _BYTES_CACHE, _ABSENT = 27, 19, 91, 2
_SINK_PLACE, _SCALE_PLACE = 11, 12
_CAST = 48
#: What products of integers need more than a MatMulNBits: with a range of their own, a fixed one, one for every token.
_INTEGER = {"tensor": -35, "fixed": 122, "token": 501}
#: A rotation at run time, and what it shares with others of its kind besides its matrix; a tied head's; and what a
#: lookup in a table that is stored as a head multiplies by it needs more than a GatherBlockQuantized.
_ROTATION, _SHARED, _HEAD_TURN, _LOOKUP = 452, 190, 290, 390
#: Where every tensor is of integers: the boundary, and a block with its scales, zero points and names.
_STATIC = (10_050, 15_950)
#: The same of each of a decoder's two graphs.
_STATIC_DECODER = (4_440, 37_780)


def predict_graph_bytes(plan: Plan) -> int:
    """Return the predicted bytes of ``model.onnx``, and of ``decode.onnx`` where there is one."""
    encoder = plan.structure if isinstance(plan.structure, Encoder) else None
    if encoder is not None and plan.activation_bits is not None:
        return _static_bytes(plan, encoder, plan.activation_bits // 8)
    if isinstance(plan.structure, Decoder) and plan.activation_bits is not None:
        return _static_decoder_bytes(plan, plan.structure, plan.activation_bits // 8)
    total = _encoder_nodes(plan, encoder) if encoder is not None else _node_bytes(plan.structure)
    shared = _shared_prefixes(plan.structure)
    for fate in plan.fates:
        uses = (2 if fate.tied else 1) * next(
            (times for name, times in shared.items() if fate.name.startswith(name)), 1
        )
        for stored in fate.stored:
            total += _entry_bytes(stored) + uses * (len(stored.name) + 2)
        total += _scales_extra(fate, plan.float_type)
        if encoder is None and fate.tied and fate.scheme is not None and fate.scheme.activations != "none":
            total += _LOOKUP
        if encoder is None and fate.kind == "matmul" and fate.scheme is None:
            total += _FLOAT_LINEAR + (_FLOAT_BIAS if f"{fate.name}.bias" in plan.by_name else 0)
        if fate.tied and fate.scheme is not None and fate.scheme.activations == "none":
            total += _entry_bytes(fate.stored[0])  # the head's own view of the same bytes
    return total if encoder is not None else total + _attention_bytes(plan) + _integer_bytes(plan)


def _attention_bytes(plan: Plan) -> int:
    """Return what a sink and a cache of bytes add to a decoder's attention nodes."""
    decoder = plan.decoder
    # Without rotary tables, with them, and with positions of their own.
    inputs = 7 if decoder.rope_shape is None else 9 if decoder.rope_switch is None else 10
    shared = each = 0
    if plan.attention == "materialized":
        shared, each = _SINK + 4 * decoder.heads, _SINK_INPUT + _ABSENT * (_SINK_PLACE - inputs)
        inputs = _SCALE_PLACE
    if plan.cache_type == "int8":
        each += _BYTES_CACHE + _ABSENT * (_SCALE_PLACE - inputs)
    return shared + each * decoder.layers


def _integer_bytes(plan: Plan) -> int:
    """Return what a decoder's integer products and rotations add: nodes, and the arrays that they share."""
    total, matrices, units, ranges = 0, set(), set(), set()
    for linear in plan.structure.linears:
        fate = plan.by_name.get(linear.name) or plan.by_name[plan.structure.tables[0].name]
        dynamic = fate.scheme is not None and fate.scheme.activations == "dynamic"
        if dynamic:
            total += _INTEGER["token" if linear.hadamard else "fixed" if linear.input_range else "tensor"]
            units |= {linear.in_features} if linear.hadamard else set()
            ranges |= {linear.input_range} if linear.input_range and not linear.hadamard else set()
        if linear.hadamard:
            total += _ROTATION
            matrices.add(linear.hadamard)
        total += _HEAD_TURN if linear.role == "rotation" else 0
    total += sum(4 * block * block + _SHARED for block in matrices)
    return total + sum(4 * columns + 40 for columns in units) + 90 * len(ranges)


def _static_bytes(plan: Plan, encoder: Encoder, width: int) -> int:
    """Return a graph's bytes where float tensors stay in it as integers of ``width`` bytes, but for weights' scales.

    Of a table of positions the rows of the fixed length are left.
    """
    fixed, block = _STATIC
    total = fixed + block * encoder.layers
    positions = {table.name for table in encoder.tables if table.role == "position"}
    for fate in plan.fates:
        for stored in fate.stored:
            if stored.offset is not None:
                continue
            rows = min(fate.rows, plan.static_length or fate.rows) if fate.name in positions else fate.rows
            whole = fate.kind == "matmul" and stored.dtype == "float32" and fate.scheme is not None
            elements = stored.nbytes // (4 if stored.dtype == "float32" else 1)
            total += stored.nbytes if whole or stored.dtype != "float32" else elements * rows // fate.rows * width
    return total


def _static_decoder_bytes(plan: Plan, decoder: Decoder, width: int) -> int:
    """Return both graphs' bytes: each has the small tensors and the rotary tables, the prefill the causal mask."""
    assert plan.static_length is not None and plan.cache_length is not None
    fixed, block = _STATIC_DECODER
    new, slots = plan.static_length, plan.cache_length
    one = fixed + block * decoder.layers + 2 * max(new, slots) * decoder.head_dim * width
    for fate in plan.fates:
        inline = sum(stored.nbytes for stored in fate.stored if stored.offset is None)
        one += inline // 4 * width if fate.kind == "table" else inline
    return 2 * one + decoder.heads // decoder.kv_heads * new * (slots + new) * width


def _node_bytes(structure: Structure) -> int:
    assert isinstance(structure, Decoder)
    fixed, block = _ROTARY if structure.rope_shape is not None else _ABSOLUTE
    total = fixed + block * structure.layers
    if structure.rope_switch is not None:
        total += _LONG_ROPE[0] + _LONG_ROPE[1] * structure.layers
    return total


def _encoder_nodes(plan: Plan, encoder: Encoder) -> int:
    total = _ENCODER_TASK[encoder.task] + _ENCODER_BLOCK * encoder.layers
    times = _runs(encoder)
    for linear in encoder.linears:
        fate = plan.by_name.get(linear.name) or plan.by_name[encoder.tables[0].name]  # tied
        kind = "float" if fate.scheme is None else "blocks" if fate.scheme.activations == "none" else "integer"
        runs = times if linear.layer is not None else 1
        total += (_ENCODER_ATTENTION if linear.role == "qkv" else _ENCODER_LINEAR)[kind] * runs
        if linear.role == "qkv" and kind == "integer":
            # The weight's zero points, all 0, which the operator wants spelled out.
            total += linear.out_features + (1 + runs) * len(f"{linear.name}.codes/zero_points")
    tables = [plan.by_name[table.name] for table in encoder.tables]
    total += _ENCODER_LOOKUP * sum(fate.scheme is not None for fate in tables)
    return total + (_ENCODER_SEGMENTS if any(table.role == "type" for table in encoder.tables) else 0)


def _runs(structure: Structure) -> int:
    """Return how often a block's weights are used: more than once where layers share them (ALBERT)."""
    blocks = {linear.layer for linear in structure.linears if linear.layer is not None}
    return structure.layers // len(blocks)


def _shared_prefixes(structure: Structure) -> dict[str, int]:
    """Return the blocks whose weights several layers read, by the start of their names, with how many layers do."""
    times = _runs(structure)
    if times == 1:
        return {}
    names: dict[int, list[str]] = {}
    for linear in structure.linears:
        if linear.layer is not None:
            names.setdefault(linear.layer, []).append(linear.name)
    return {commonprefix(group): times for group in names.values()}


def _scales_extra(fate: Fate, floats: FloatType) -> int:
    scales = fate.part("scales")
    if scales is None or scales.dtype == floats or (fate.scheme is not None and fate.scheme.activations != "none"):
        return 0
    if scales.dtype == "float16":
        return _CAST + 3 * len(scales.name)
    return 2 * _CAST + 6 * len(scales.name) if scales.dtype == "int8" else 0


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
