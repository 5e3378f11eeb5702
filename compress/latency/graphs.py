"""Small graphs of the operators that the rewrite rules of :mod:`compress.graph` emit: a part, several times in a row.

Weights are noise; they are handed to the session as arrays, so that they never pass through a protobuf. Norms keep the
values of any chain near one. Each copy has weights of its own unless the model's blocks share theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from compress.graph.rules import integer_cache
from compress.graph.rules.materialized import NOTHING
from compress.latency.parts import Attention, Empty, Ends, FeedForward, Point, Product, Stored, Style, Workload
from compress.rotation.matrices import hadamard

_MICROSOFT = "com.microsoft"
_NOISE, _STRIDE = 1 << 20, 4099
_TYPES: Mapping[str, int] = {
    "float32": TensorProto.FLOAT,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}
#: Rows of a stand-in for an embedding table, of which as many are read as there are tokens.
_TABLE_ROWS = 4096
_ROTARY_ROWS = 4096
#: Outputs of one product up to here are the graph's own; larger ones are cut to a number, as a real graph reuses
#: the memory of its intermediate results.
_DIRECT_OUTPUT_BYTES = 1 << 20

Array = npt.NDArray[Any]


@dataclass
class Graph:
    """A graph under construction.

    Attributes:
        feeds: What to run it with, by input name.
        weights: Arrays of the initializers that are not inside the graph.
    """

    opset: int
    feeds: dict[str, Array] = field(default_factory=dict)
    weights: dict[str, Array] = field(default_factory=dict)
    _nodes: list[onnx.NodeProto] = field(default_factory=list)
    _initializers: list[onnx.TensorProto] = field(default_factory=list)
    _inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    _outputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    _count: int = 0

    def name(self, stem: str) -> str:
        """Return a new name."""
        self._count += 1
        return f"{stem}_{self._count}"

    def node(self, kind: str, inputs: list[str], domain: str = "", outputs: int = 1, **attributes: Any) -> list[str]:
        """Add a node and return the names of its outputs."""
        names = [self.name(kind) for _ in range(outputs)]
        self._nodes.append(helper.make_node(kind, inputs, names, name=names[0], domain=domain, **attributes))
        return names

    def input(self, name: str, array: Array, free: tuple[int, ...] = ()) -> str:
        """Add an input that is fed with ``array``; its axes ``free`` have no fixed size."""
        shape = [f"{name}_{axis}" if axis in free else size for axis, size in enumerate(array.shape)]
        self._inputs.append(helper.make_tensor_value_info(name, _TYPES[array.dtype.name], shape))
        self.feeds[name] = array
        return name

    def output(self, name: str, kind: int = TensorProto.FLOAT) -> None:
        """Make a value, float32 or of another ONNX element type, an output."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, None))

    def constant(self, array: Array, stem: str = "constant") -> str:
        """Add a small array inside the graph."""
        name = self.name(stem)
        self._initializers.append(onnx.numpy_helper.from_array(array, name))
        return name

    def weight(self, array: Array, name: str | None = None) -> str:
        """Add an array outside the graph; one of a name that is there already is the same."""
        given = name or self.name("weight")
        if given in self.weights:
            return given
        tensor = TensorProto(
            name=given,
            data_type=_TYPES[array.dtype.name],
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", "given"), ("offset", "0"), ("length", str(array.nbytes))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        self._initializers.append(tensor)
        self.weights[given] = array
        return given

    def serialized(self) -> bytes:
        """Return the model without its weights."""
        graph = helper.make_graph(self._nodes, "part", self._inputs, self._outputs, self._initializers)
        domains = [helper.make_opsetid("", self.opset), helper.make_opsetid(_MICROSOFT, 1)]
        data: bytes = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
        return data


class Noise:
    """Values of no meaning: seeded, cheap, and never the same twice.

    A session stores weights of equal bytes once: copies of a part would share them, and find them in the caches.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._floats = rng.uniform(-0.06, 0.06, _NOISE).astype(np.float32)
        self._bytes = rng.integers(0, 256, _NOISE, dtype=np.uint8)
        self._others = np.ones(0, np.float32)
        self._drawn = 0

    def others(self, nbytes: int) -> Array:
        """Return memory of that size, the same for all who ask."""
        if self._others.nbytes < nbytes:
            self._others = np.ones(-(-nbytes // 4), np.float32)
        return self._others[: nbytes // 4]

    def floats(self, *shape: int) -> Array:
        """Return float32 values around 0."""
        return self._next(self._floats, shape)

    def codes(self, *shape: int) -> Array:
        """Return any uint8 values."""
        return self._next(self._bytes, shape)

    def _next(self, values: Array, shape: tuple[int, ...]) -> Array:
        self._drawn += 1
        start = self._drawn * _STRIDE % _NOISE
        return np.resize(np.concatenate([values[start:], values[:start]]), shape)


def build(point: Point, noise: Noise) -> Graph:
    """Return the graph of a point: its part, as often as the point says."""
    part, workload = point.part, point.workload
    if isinstance(part, FeedForward | Attention):
        return _Blocks(part.style, part.hidden, workload, noise, point.copies).graph_of(part)
    if isinstance(part, Product):
        return _products(part, workload, noise, point.copies)
    graph = Graph(18 if isinstance(part, Ends) and not part.decoder else 23)
    if isinstance(part, Empty):
        value = graph.input("x", np.ones((1, 16), np.float32), (0,))
        graph.output(graph.node("Identity", [value])[0])
        return graph
    from compress.latency.ends import add_ends

    add_ends(graph, part, workload, noise)
    return graph


def linear(
    graph: Graph,
    noise: Noise,
    value: str,
    outputs: int,
    inputs: int,
    stored: Stored,
    *,
    bias: bool,
    name: str | None = None,
    transposed: bool = False,
) -> str:
    """Add a linear as ``graph/rules/linear.py`` writes it, and return its output."""
    stem = name or graph.name("linear")
    if stored.hadamard:
        matrix = graph.weight(np.array(hadamard(stored.hadamard)), f"hadamard_{stored.hadamard}")
        blocks_of = graph.constant(np.array([0, 0, -1, stored.hadamard], np.int64))
        mixed = graph.node("MatMul", [graph.node("Reshape", [value, blocks_of])[0], matrix])[0]
        value = graph.node("Reshape", [mixed, graph.constant(np.array([0, 0, -1], np.int64))])[0]
    added = [graph.weight(noise.floats(outputs), f"{stem}.bias")] if bias else []
    if stored.bits == 32:
        if transposed:
            table = graph.weight(noise.floats(outputs, inputs), f"{stem}.weight")
            weight = graph.node("Transpose", [table], perm=[1, 0])[0]
        else:
            weight = graph.weight(noise.floats(inputs, outputs), f"{stem}.weight")
        product = graph.node("MatMul", [value, weight])[0]
        return graph.node("Add", [product, *added])[0] if bias else product
    if stored.dynamic:
        codes = graph.weight(noise.codes(inputs, outputs).view(np.int8), f"{stem}.codes")
        scales = graph.weight(np.full(outputs, 5e-4, np.float32), f"{stem}.scales")
        if stored.fixed:
            scale, zero = graph.constant(np.array(4 / 127, np.float32)), graph.constant(np.array(128, np.uint8))
            rounded = graph.node("QuantizeLinear", [value, scale, zero])[0]
            given = [rounded, codes, scale, scales, zero, *(["", *added] if bias else [])]
            return graph.node("MatMulIntegerToFloat", given, _MICROSOFT)[0]
        if stored.hadamard:
            one = graph.weight(np.ones(inputs, np.float32), f"unit_{inputs}")
            unit, size = graph.node(
                "SimplifiedLayerNormalization", [value, one], outputs=2, axis=-1, epsilon=1e-30, stash_type=1
            )
            product = graph.node("DynamicQuantizeMatMul", [unit, codes, scales], _MICROSOFT)[0]
            result = graph.node("Div", [product, size])[0]
            return graph.node("Add", [result, *added])[0] if bias else result
        given = [value, codes, scales, *(["", *added] if bias else [])]
        return graph.node("DynamicQuantizeMatMul", given, _MICROSOFT)[0]
    blocks = -(-inputs // stored.block_size)
    row = stored.block_size * stored.bits // 8
    given = [
        value,
        graph.weight(noise.codes(outputs, blocks, row), f"{stem}.codes"),
        graph.weight(np.abs(noise.floats(outputs, blocks)) / 2 ** (stored.bits - 2), f"{stem}.scales"),
        ""
        if stored.symmetric
        else graph.weight(noise.codes(outputs, -(-blocks * stored.bits // 8)), f"{stem}.zero_points"),
        "",
        *added,
    ]
    while not given[-1]:
        given.pop()
    return graph.node(
        "MatMulNBits",
        given,
        _MICROSOFT,
        K=inputs,
        N=outputs,
        bits=stored.bits,
        block_size=stored.block_size,
        accuracy_level=stored.accuracy_level,
    )[0]


class _Blocks:
    """Halves of blocks in a row; each reads what the one before it gave."""

    def __init__(self, style: Style, hidden: int, workload: Workload, noise: Noise, copies: int) -> None:
        self.style, self.hidden, self.noise, self.copies = style, hidden, noise, copies
        self.workload = workload
        self.graph = Graph(23 if style.decoder else 18)

    def graph_of(self, part: FeedForward | Attention) -> Graph:
        """Return the graph of a part."""
        shape = (self.workload.batch, self.workload.tokens, self.hidden)
        value = self.graph.input("x", self.noise.floats(*shape), (0, 1))
        residual = self.graph.input("residual", self.noise.floats(*shape), (0, 1)) if self.style.decoder else ""
        shared = self._attention_inputs(part) if isinstance(part, Attention) else []
        for copy in range(self.copies):
            name = "block" if self.style.shared else f"block{copy}"
            if self.style.decoder:
                normed, residual = self._skip_norm(residual, value, name)
                value = self._half(part, normed, shared, name, copy)
            else:
                value = self._after(value, self._half(part, value, shared, name, copy), part, name)
        if self.style.decoder:
            value = self.graph.node("Add", [value, residual])[0]
        self.graph.output(value)
        return self.graph

    def _half(self, part: FeedForward | Attention, value: str, shared: list[str], name: str, copy: int) -> str:
        if isinstance(part, FeedForward):
            return self._feed_forward(part, value, name)
        attend = self._cached if self.style.decoder else self._masked
        context = attend(part, value, shared, name, copy)
        sizes = (self.hidden, part.heads * part.head_dim)
        return self._linear(context, *sizes, part.output, f"{name}.output")

    def _linear(self, value: str, outputs: int, inputs: int, stored: Stored, name: str) -> str:
        return linear(self.graph, self.noise, value, outputs, inputs, stored, bias=self.style.bias, name=name)

    def _ones(self, size: int, name: str) -> str:
        return self.graph.weight(np.ones(size, np.float32), name)

    def _skip_norm(self, residual: str, value: str, name: str) -> tuple[str, str]:
        kind = "SkipSimplifiedLayerNormalization" if self.style.rms else "SkipLayerNormalization"
        inputs = [residual, value, self._ones(self.hidden, f"{name}.norm")]
        inputs += [] if self.style.rms else [self.graph.weight(np.zeros(self.hidden, np.float32), f"{name}.shift")]
        normed, _, _, total = self.graph.node(kind, inputs, _MICROSOFT, outputs=4, epsilon=1e-5)
        return normed, total

    def _after(self, before: str, value: str, part: FeedForward | Attention, name: str) -> str:
        """Add an encoder's residual sum and norm."""
        first = part.up if isinstance(part, FeedForward) else part.qkv
        if self.style.smoothed and first.dynamic:
            before = self.graph.node("Mul", [before, self._ones(self.hidden, f"{name}.rescale")])[0]
        total = self.graph.node("Add", [value, before])[0]
        return norm(self.graph, total, self.hidden, rms=False, name=name)

    def _feed_forward(self, part: FeedForward, value: str, name: str) -> str:
        graph, style = self.graph, self.style
        width = part.inner * (2 if style.gated else 1)
        first = self._linear(value, width, part.hidden, part.up, f"{name}.up")
        if style.gated:
            gate, up = graph.node("Split", [first], outputs=2, axis=-1, num_outputs=2)
            silu = graph.node("Mul", [gate, graph.node("Sigmoid", [gate])[0]])[0]
            active = graph.node("Mul", [silu, up])[0]
        elif style.decoder:
            active = graph.node("Gelu", [first], approximate="tanh")[0]
        else:
            active = graph.node("FastGelu" if style.tanh else "Gelu", [first], _MICROSOFT)[0]
        if style.smoothed and part.down.dynamic:
            active = graph.node("Mul", [active, self._ones(part.inner, f"{name}.scale")])[0]
        return self._linear(active, part.hidden, part.inner, part.down, f"{name}.down")

    def _attention_inputs(self, part: Attention) -> list[str]:
        graph, workload = self.graph, self.workload
        total = workload.past + workload.tokens
        if not self.style.decoder:
            return [graph.input("mask", np.ones((workload.batch, total), np.int32), (0, 1))]
        shared = [
            graph.input("lengths", np.full(workload.batch, total - 1, np.int32), (0,)),
            graph.input("total", np.array(total, np.int32)),
        ]
        if self.style.rotary:
            rows = max(_ROTARY_ROWS, total)
            angles = np.arange(rows * (part.head_dim // 2), dtype=np.float32).reshape(rows, -1)
            shared += [graph.weight(np.cos(angles), "cos"), graph.weight(np.sin(angles), "sin")]
        return shared

    def _cached(self, part: Attention, value: str, shared: list[str], name: str, copy: int) -> str:
        graph, workload = self.graph, self.workload
        packed = self._linear(value, part.packed_size, part.hidden, part.qkv, f"{name}.qkv")
        shape = (workload.batch, part.kv_heads, workload.past, part.head_dim)
        integers = self.style.int8_cache
        held = [self.noise.codes(*shape).view(np.int8) if integers else self.noise.floats(*shape) for _ in range(2)]
        past = [graph.input(f"past.{copy}.{i}", array, (0, 2)) for i, array in zip(("key", "value"), held, strict=True)]
        output, key, values = graph.node(
            "GroupQueryAttention",
            [packed, "", "", *past, *shared, *self._further(part)],
            _MICROSOFT,
            outputs=3,
            num_heads=part.heads,
            kv_num_heads=part.kv_heads,
            scale=float(part.head_dim**-0.5),
            do_rotary=int(self.style.rotary),
            **(integer_cache.ATTRIBUTES if integers else {}),
        )
        for kept in (key, values):
            graph.output(kept, TensorProto.INT8 if integers else TensorProto.FLOAT)
        return output

    def _further(self, part: Attention) -> list[str]:
        """Return the inputs behind the rotary tables: a sink, and what keys and values are rounded by."""
        style, graph = self.style, self.graph
        if not (style.materialized or style.int8_cache):
            return []
        # Without rotary tables their two inputs are left out as well.
        given = ["", ""] if style.rotary else ["", "", "", ""]
        held = style.materialized
        given.append(graph.weight(np.full(part.heads, NOTHING, np.float32), "attention/no_sink") if held else "")
        if style.int8_cache:
            scales = np.full((part.kv_heads, 1, part.head_dim), 1 / 127, np.float32)
            given += [graph.weight(scales, "cache/scales")] * 2
        return given

    def _masked(self, part: Attention, value: str, shared: list[str], name: str, copy: int) -> str:
        graph, width = self.graph, part.heads * part.head_dim
        plain = part.qkv.bits == 32 or part.qkv.dynamic
        if not (self.style.packed and self.style.bias and plain):
            packed = self._linear(value, 3 * width, part.hidden, part.qkv, f"{name}.qkv")
            parts = graph.node("Split", [packed], outputs=3, axis=-1, num_outputs=3)
            return graph.node(
                "MultiHeadAttention",
                [*parts, "", *shared],
                _MICROSOFT,
                num_heads=part.heads,
                scale=float(part.head_dim**-0.5),
            )[0]
        bias = graph.weight(self.noise.floats(3 * width), f"{name}.qkv.bias")
        if not part.qkv.dynamic:
            weight = graph.weight(self.noise.floats(part.hidden, 3 * width), f"{name}.qkv.weight")
            given = [value, weight, bias, *shared]
            return graph.node("Attention", given, _MICROSOFT, num_heads=part.heads)[0]
        codes, scale, zero = graph.node("DynamicQuantizeLinear", [value], outputs=3)
        weight = graph.weight(self.noise.codes(part.hidden, 3 * width).view(np.int8), f"{name}.qkv.codes")
        scales = graph.weight(np.full(3 * width, 5e-4, np.float32), f"{name}.qkv.scales")
        zeros = graph.weight(np.zeros(3 * width, np.int8), f"{name}.qkv.zeros")
        given = [codes, weight, bias, scale, scales, *shared, zero, zeros]
        return graph.node("QAttention", given, _MICROSOFT, num_heads=part.heads)[0]


def norm(graph: Graph, value: str, width: int, *, rms: bool, name: str) -> str:
    """Add a norm without a residual sum, and return its output."""
    weight = graph.weight(np.ones(width, np.float32), f"{name}.norm")
    if rms:
        return graph.node("RMSNormalization", [value, weight], axis=-1, epsilon=1e-5)[0]
    shift = graph.weight(np.zeros(width, np.float32), f"{name}.shift")
    return graph.node("LayerNormalization", [value, weight, shift], axis=-1, epsilon=1e-5)[0]


def _products(part: Product, workload: Workload, noise: Noise, copies: int) -> Graph:
    """Return a graph of products that all read the same input."""
    graph = Graph(18)
    rows = workload.tokens if part.every else 1
    value = graph.input("x", noise.floats(workload.batch, rows, part.inputs), (0, 1))
    cut = 4 * workload.batch * rows * part.outputs > _DIRECT_OUTPUT_BYTES and copies > 1
    first = [graph.constant(np.array(values, np.int64)) for values in ([0, 0], [1, 1], [1, 2])] if cut else []
    for copy in range(copies):
        output = linear(
            graph,
            noise,
            value,
            part.outputs,
            part.inputs,
            part.stored,
            bias=part.bias,
            name=f"product{copy}",
            transposed=part.transposed,
        )
        graph.output(graph.node("Slice", [output, *first])[0] if cut else output)
    return graph
