"""What a graph holds: its weights, how each is stored, and what that takes - read from the graph alone.

Requires an ``onnx_ir`` model from anywhere: this package, optimum, onnxruntime-genai's builder. Ensures one entry a
weight, with its scales and zero points counted in, bytes that two initializers share counted once. No weight is read:
shapes, types and the operators' attributes say it all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import onnx_ir as ir

Kind = Literal["matmul", "table", "vector", "constant"]

#: Operator -> inputs that are its weight, the weight's scales and the weight's zero points. Sources: the operator
#: specifications of ONNX and of ONNX Runtime's ``com.microsoft`` domain.
_OPERATORS: Mapping[str, tuple[int, int | None, int | None]] = {
    "MatMulNBits": (1, 2, 3),
    "GatherBlockQuantized": (0, 2, 3),
    "DynamicQuantizeMatMul": (1, 2, 3),
    "MatMulIntegerToFloat": (1, 3, 5),
    "MatMulInteger": (1, None, 3),
    "QAttention": (1, 4, 7),
    "QLinearMatMul": (3, 4, 5),
    "DequantizeLinear": (0, 1, 2),
}
#: Products whose inputs are rounded at run time; their weights lie as ``[K, N]``.
_DYNAMIC = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger", "QAttention"}
_PRODUCTS = {"MatMul": 1, "Gemm": 1, "FusedMatMul": 1, "Attention": 1}
#: What may stand between a stored tensor and the operator that it is a weight of.
_BETWEEN = {"Cast", "Mul", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity", "DequantizeLinear"}
_COSINES = {("GroupQueryAttention", 7), ("GroupQueryAttention", 8), ("RotaryEmbedding", 2), ("RotaryEmbedding", 3)}
_SUFFIX = re.compile(r"[._](?:blocked_codes|codes|weight|quantized|qweight|weight_quantized|weight_Q[248](?:G\d+)?)$")
_PART = re.compile(r"\.(?:scales|row_scales|zero_points)(?:/codes)?$")
_OWN_TABLES = re.compile(r"^(?:rotary|mask)/")
_LAYER = re.compile(r"(?:^|[./])(?:layers?|h|blocks?)[./](\d+)(?=[./])")
_DEPTH = 6


@dataclass(frozen=True)
class Weight:
    """A weight as the graph stores it.

    Attributes:
        name: Its initializer's name without the ending that says how it is stored.
        kind: ``matmul`` (a product reads it), ``table`` (rows are looked up), ``vector`` (norms, biases), ``constant``.
        shape: Its logical shape, ``[N, K]`` of a product's.
        storage: ``int4 b32 sym``, ``int8 row dynamic``, ``float16``; ``sym`` is said where there are no zero points.
        bytes: Bytes of all its parts, scales and zero points included.
        operators: The operators that read it, sorted.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    storage: str
    bytes: int
    operators: tuple[str, ...]

    @property
    def values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Bits a value, scales and zero points included."""
        return 8 * self.bytes / self.values if self.values else 0.0

    @property
    def layer(self) -> int | None:
        """The block's number as the name has it, ``None`` outside the blocks."""
        found = _LAYER.search(self.name)
        return int(found[1]) if found else None

    @property
    def place(self) -> str:
        """The name inside its block: ``self_attn.qkv_proj``; outside the blocks, the whole name."""
        found = _LAYER.search(self.name)
        return self.name[found.end() + 1 :] if found else self.name


@dataclass
class _Found:
    """A weight while it is put together; ``parts`` are stored tensors by where their bytes lie."""

    value: ir.Value
    kind: Kind
    shape: tuple[int, ...]
    storage: str
    operators: set[str]
    parts: dict[Any, ir.TensorProtocol] = field(default_factory=dict)


def weights(model: ir.Model) -> list[Weight]:
    """Return the weights and constants of a graph and its subgraphs, in the graph's order."""
    stored = dict(_stored(model))
    readers: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for index, value in enumerate(node.inputs):
            if value is not None:
                readers.setdefault(value, []).append((node, index))
    found = list(_quantized(stored, readers))
    own = {_key(item.value, stored[item.value]) for item in found}
    # A dequantized scale is a part of its weight, not a weight.
    parts = {key for item in found for key in item.parts} - own
    nested = {key for item in found for key in item.parts if key != _key(item.value, stored[item.value])}
    found = _merged([item for item in found if _key(item.value, stored[item.value]) not in nested], stored)
    parts |= {key for item in found for key in item.parts}
    for value, tensor in stored.items():
        if _key(value, tensor) not in parts:
            parts.add(_key(value, tensor))
            found.append(_plain(value, tensor, readers.get(value, [])))
    order = {value: index for index, value in enumerate(stored)}
    found.sort(key=lambda item: order[item.value])
    return _with_named_parts([_weight(item) for item in found])


def _stored(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Yield every initializer and every Constant's tensor."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value
        for node in graph:
            attribute = node.attributes.get("value") if node.op_type == "Constant" else None
            if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
                yield node.outputs[0], attribute.as_tensor()


def _key(value: ir.Value, tensor: ir.TensorProtocol) -> Any:
    """Return where the bytes lie: two initializers may be views of the same external ones."""
    if isinstance(tensor, ir.ExternalTensor):
        return (str(tensor.location), tensor.offset, tensor.length or _bytes(tensor))
    return id(value)


def _bytes(tensor: ir.TensorProtocol) -> int:
    """Return the bytes that shape and type say; strings have none."""
    if tensor.dtype == ir.DataType.STRING:
        return 0
    return math.ceil(_count(tensor) * tensor.dtype.bitwidth / 8)


def _dims(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape if isinstance(size, int))


def _count(tensor: ir.TensorProtocol) -> int:
    return math.prod(_dims(tensor))


def _behind(value: ir.Value | None, stored: Mapping[ir.Value, ir.TensorProtocol], depth: int = 0) -> list[ir.Value]:
    """Return the stored tensors that a value is computed from, if nothing else goes into it."""
    if value is None or depth > _DEPTH:
        return []
    if value in stored:
        return [value]
    node = value.producer()
    if node is None or node.op_type not in _BETWEEN:
        return []
    return [item for one in node.inputs for item in _behind(one, stored, depth + 1)]


def _quantized(
    stored: Mapping[ir.Value, ir.TensorProtocol], readers: Mapping[ir.Value, list[tuple[ir.Node, int]]]
) -> Iterator[_Found]:
    """Yield an entry for every use of a quantized weight."""
    for value, tensor in stored.items():
        for node, index in readers.get(value, []):
            inputs = _OPERATORS.get(node.op_type)
            if inputs is None or inputs[0] != index:
                continue
            read = [_input(node, position) for position in inputs[1:]]
            scales, zeros = (_behind(one, stored) for one in read)
            uses = list(_uses(node, readers)) if node.op_type == "DequantizeLinear" else []
            columns_first = node.op_type in _DYNAMIC | {"QLinearMatMul"} or any(
                user.op_type in ("MatMul", "FusedMatMul") and not turned for user, _, turned in uses
            )
            looked_up = node.op_type == "GatherBlockQuantized" or any(user.op_type == "Gather" for user, *_ in uses)
            kind: Kind = "table" if looked_up else "matmul"
            if node.op_type == "DequantizeLinear" and not looked_up and not columns_first:
                kind = "matmul" if any(user.op_type in _PRODUCTS for user, *_ in uses) else "vector"
            entry = _Found(
                value,
                kind,
                _logical_shape(node, tensor, columns_first),
                _storage(node, tensor, [stored[one] for one in scales], bool(zeros), uses),
                {user.op_type for user, *_ in uses} or {node.op_type},
            )
            for one in (value, *scales, *zeros):
                entry.parts[_key(one, stored[one])] = stored[one]
            yield entry


def _input(node: ir.Node, index: int | None) -> ir.Value | None:
    return node.inputs[index] if index is not None and index < len(node.inputs) else None


def _uses(
    node: ir.Node, readers: Mapping[ir.Value, list[tuple[ir.Node, int]]], turned: bool = False, depth: int = 0
) -> Iterator[tuple[ir.Node, int, bool]]:
    """Yield who reads a node's output, which input it is, and whether it was transposed on the way."""
    for user, index in readers.get(node.outputs[0], []):
        if user.op_type in ("Transpose", "Reshape", "Cast", "Identity") and depth < _DEPTH:
            yield from _uses(user, readers, turned != (user.op_type == "Transpose"), depth + 1)
        else:
            yield user, index, turned


def _logical_shape(node: ir.Node, tensor: ir.TensorProtocol, columns_first: bool) -> tuple[int, ...]:
    shape = _dims(tensor)
    if node.op_type == "MatMulNBits":
        return (_number(node, "N", 0), _number(node, "K", 0))
    if node.op_type == "GatherBlockQuantized" and tensor.dtype == ir.DataType.UINT8 and shape:
        return (*shape[:-1], shape[-1] * 8 // max(1, _number(node, "bits", 4)))
    return shape[::-1] if columns_first and len(shape) == 2 else shape


def _number(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None and attribute.type == ir.AttributeType.INT else default


def _storage(
    node: ir.Node,
    tensor: ir.TensorProtocol,
    scales: list[ir.TensorProtocol],
    zeros: bool,
    uses: list[tuple[ir.Node, int, bool]],
) -> str:
    if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
        default = (4, 32) if node.op_type == "MatMulNBits" else (tensor.dtype.bitwidth, 128)
        if tensor.dtype == ir.DataType.UINT8 and node.op_type == "GatherBlockQuantized":
            default = (4, 128)
        bits, block = _number(node, "bits", default[0]), _number(node, "block_size", default[1])
        return f"int{bits} b{block} {'asym' if zeros else 'sym'}"
    block = _number(node, "block_size", 0)
    most = max((_count(scale) for scale in scales), default=0)
    spread = f"b{block}" if block else "row" if most > 1 else "tensor"
    kind = "asym" if zeros else "sym"
    if node.op_type in _DYNAMIC:
        kind = "dynamic"
    elif node.op_type == "QLinearMatMul" or any(_fixed_input(user, index) for user, index, _ in uses):
        kind = "static"
    return f"int{tensor.dtype.bitwidth} {spread} {kind}"


def _fixed_input(node: ir.Node, index: int) -> bool:
    """Tell whether a product's other input was rounded to a fixed range."""
    other = _input(node, 1 - index) if node.op_type in _PRODUCTS else None
    producer = other.producer() if other is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _merged(found: list[_Found], stored: Mapping[ir.Value, ir.TensorProtocol]) -> list[_Found]:
    """Make one entry of those over the same bytes: a tied table, a layer that runs several times."""
    kept: dict[Any, _Found] = {}
    for item in found:
        first = kept.setdefault(_key(item.value, stored[item.value]), item)
        if first is item:
            continue
        first.parts |= item.parts
        first.operators |= item.operators
        if item.kind == "table" and first.kind != "table":
            first.kind, first.shape, first.storage = item.kind, item.shape, item.storage
    return list(kept.values())


def _plain(value: ir.Value, tensor: ir.TensorProtocol, users: list[tuple[ir.Node, int]]) -> _Found:
    """Describe a tensor that no operator dequantizes."""
    shape = _dims(tensor)
    floating = tensor.dtype.is_floating_point()
    kind: Kind = "vector"
    if not floating and len(shape) < 2 or len(shape) == 0 or any((u.op_type, i) in _COSINES for u, i in users):
        kind = "constant"
    elif any(user.op_type == "Gather" and index == 0 for user, index in users) and len(shape) == 2:
        kind = "table"
    elif len(shape) >= 2 and any(_PRODUCTS.get(user.op_type) == index for user, index in users):
        kind = "matmul"
        turned = any(user.op_type == "Gemm" and _number(user, "transB", 0) for user, _ in users)
        shape = shape if turned or len(shape) != 2 else shape[::-1]
    elif len(shape) > 2:
        kind = "constant"
    storage = {"float": "float32", "double": "float64"}.get(tensor.dtype.name.lower(), tensor.dtype.name.lower())
    found = _Found(value, kind, shape, storage, {user.op_type for user, _ in users})
    found.parts[_key(value, tensor)] = tensor
    return found


def _weight(item: _Found) -> Weight:
    name = item.value.name or ""
    kind: Kind = "constant" if _OWN_TABLES.match(name) or not item.shape else item.kind
    total = sum(map(_bytes, item.parts.values()))
    return Weight(_SUFFIX.sub("", name), kind, item.shape, item.storage, total, tuple(sorted(item.operators)))


def _with_named_parts(found: list[Weight]) -> list[Weight]:
    """Count scales that are multiplied in after a lookup to the weight whose name they have."""
    owners = {item.name: index for index, item in enumerate(found) if not _PART.search(item.name)}
    whole, gone = list(found), set()
    for index, item in enumerate(found):
        owner = owners.get(_PART.sub("", item.name)) if _PART.search(item.name) else None
        if owner is not None:
            first = whole[owner]
            storage = first.storage.replace(" tensor ", " row ") if item.values > 1 else first.storage
            whole[owner] = replace(first, bytes=first.bytes + item.bytes, storage=storage)
            gone.add(index)
    return [item for index, item in enumerate(whole) if index not in gone]
