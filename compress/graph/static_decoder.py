"""A decoder's graph for a fixed number of new tokens over a cache of fixed size, in standard operators.

A phone's NPU runs two such graphs over the same weights: *prefill* takes ``new`` tokens at once, *decode* one. Inputs,
every shape a number (H heads, G of them to one of K key/value heads, T = cache + new)::

    input_ids, position_ids    int64 [1, new]
    attention_mask             int64 [1, T]              1: slot of the cache in use, or new token that is no padding
    past_key_values.N.*        float [1, K, cache, D]    a slot that is not in use may hold any finite number
    logits                     float [1, new, vocab]
    present.N.*                float [1, K, new, D]      the new tokens alone: the caller writes them into the cache

No operator writes into the cache: the new keys are put behind it for the product, and handed out. Rewritten are::

    SkipSimplifiedLayerNormalization(x, y, w)   ->  RMSNormalization(Add(x, y), w)
    GroupQueryAttention(qkv, past, cos, sin)    ->  Split, rotary, Concat, MatMul, Add, Softmax, MatMul
        rotary(x) = x * cos[p] + Concat(x2, x1) * [-sin, sin][p]          (x1, x2: the halves of x)
        scores    = MatMul(scale * q [1, K, G * new, D], keys^T [1, K, D, T]) + mask [1, 1, G * new, T]
    the mask  = Min(100 * (attention_mask - 1), 0 or -100 for what comes later)
    MatMulNBits(x, codes, scales, bias)         ->  Add(MatMulNBits(x, codes, scales), bias)

Weights in blocks of 4 bits keep MatMulNBits, the one operator here that is not standard: HTP has it, and multiplies it
in 4 bits. DequantizeLinear of INT4 with a scale a channel and no zero point is taken too, and computed wrongly (QNN
2.51).

-100 and not the lowest number, as in ``graph/npu_mask.py``: integers of 16 bits hold it beside the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as passes

from compress.errors import CompressError, UsageError
from compress.graph import static_shapes
from compress.graph.npu_mask import MASKED
from compress.graph.rules._edit import constant, drop, forget, node, supersede

_FLOAT, _INT64 = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT64)
_PAST, _PRESENT = "past_key_values.", "present."
_BLOCKS = "com.microsoft.MatMulNBits"
_BLOCKS_ZERO_POINTS, _BLOCKS_BIAS = 3, 5


@dataclass(frozen=True)
class _Sizes:
    new: int
    cache: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def total(self) -> int:
        return self.cache + self.new

    @property
    def longest(self) -> int:
        # New tokens have their place in the cache too, unless there is none.
        return max(self.cache, self.new)

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


def make_static(model: ir.Model, new: int, cache: int) -> dict[str, int]:
    """Rewrite a finished decoder in place; returns how often each rule fired.

    Args:
        model: What the rules of ``graph/rules`` made, the rotary tables still inline.
        new: Tokens a run.
        cache: Slots of the cache; 0 for a graph that only ever sees a text's beginning.

    Raises:
        UsageError: The attention or a weight is of a kind that has no such form.
    """
    graph = model.graph
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    if not nodes:
        raise UsageError("the graph has no attention that can be made static", hint="leave out graph.static_length")
    sizes = _sizes(nodes[0], new, cache)
    for attention in nodes:
        _check(attention, sizes)
    norms = _split_norms(graph)
    _split_biases(graph)
    inputs = _inputs(graph, sizes)
    shared = _Shared(graph, nodes[0], inputs, sizes)
    for attention in nodes:
        _Attention(graph, attention, sizes, shared).write_out()
    passes.RemoveUnusedNodesPass()(model)
    if not _declare_blocks(graph, new):
        model.opset_imports.pop("com.microsoft", None)
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in graph if node.domain} - {_BLOCKS})
    if foreign:
        raise UsageError(
            "the graph has operators that are not standard: " + ", ".join(foreign),
            hint="--set quantize.activations=static --set quantize.roles.head.activations=static, with 8 bits",
        )
    logits = graph.outputs[0]
    assert logits.shape is not None
    logits.shape = ir.Shape([1, new, logits.shape[-1]])
    static_shapes.infer_shapes(model)
    return {"static_attention": len(nodes), "static_norm": norms}


def _sizes(attention: ir.Node, new: int, cache: int) -> _Sizes:
    heads, kv_heads = (_integer(attention, name) for name in ("num_heads", "kv_num_heads"))
    past = attention.inputs[3]
    if past is None or past.shape is None or not isinstance(past.shape[3], int):
        raise CompressError("an attention node has no cache of known head size", where=attention.name)
    return _Sizes(new, cache, heads, kv_heads, past.shape[3])


def _integer(attention: ir.Node, name: str, default: int = 0) -> int:
    attribute = attention.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _check(attention: ir.Node, sizes: _Sizes) -> None:
    """Refuse what :class:`_Attention` does not write out.

    Raises:
        UsageError: A sliding window, a soft cap, interleaved or partial rotary embedding, or none.
    """
    window = _integer(attention, "local_window_size", -1)
    cap = attention.attributes.get("softcap")
    reasons = []
    if 0 < window < sizes.longest:
        reasons.append(f"a sliding window of {window} tokens, shorter than {sizes.longest}")
    if cap is not None and cap.as_float():
        reasons.append("a soft cap")
    if not _integer(attention, "do_rotary") or _integer(attention, "rotary_interleaved"):
        reasons.append("another position embedding than rotary halves")
    if any(value is not None for value in attention.inputs[9:]):
        reasons.append("positions or a bias of its own")
    table = attention.inputs[7] if len(attention.inputs) > 7 else None
    if table is not None and table.shape is not None and table.shape[-1] != sizes.head_dim // 2:
        reasons.append("rotary embedding of a part of the head")
    if reasons:
        raise UsageError(
            "the attention has no static form here: " + ", ".join(reasons),
            where=attention.name,
            hint="choose a profile without graph.static_length",
        )


def _split_norms(graph: ir.Graph) -> int:
    """Write residual norms as a sum and a norm; returns how many."""
    found = [node for node in graph if node.op_type == "SkipSimplifiedLayerNormalization"]
    for old in found:
        first, second, weight = old.inputs[:3]
        if any(value is not None for value in old.inputs[3:]):
            raise UsageError("a residual norm with a bias has no static form here", where=old.name)
        normed = old.outputs[0]
        total = ir.Value(name=f"{normed.name}/residual")
        new = ir.Value(name=normed.name)
        epsilon = old.attributes["epsilon"].as_float()
        node(graph, old, "Add", [first, second], [total])
        node(graph, old, "RMSNormalization", [total, weight], [new], axis=-1, epsilon=epsilon)
        ir.convenience.replace_all_uses_with(normed, new)
        if len(old.outputs) > 3:
            ir.convenience.replace_all_uses_with(old.outputs[3], total)
        drop(graph, [old])
    return len(found)


def _products(graph: ir.Graph) -> list[ir.Node]:
    return [found for found in graph if found.op_type == "MatMulNBits"]


def _split_biases(graph: ir.Graph) -> None:
    """Add the biases of products of blocks behind them: HTP leaves a product with one to the CPU."""
    for old in [product for product in _products(graph) if len(product.inputs) > _BLOCKS_BIAS]:
        bias, output = old.inputs[_BLOCKS_BIAS], old.outputs[0]
        used = _BLOCKS_ZERO_POINTS + (old.inputs[_BLOCKS_ZERO_POINTS] is not None)
        product, total = ir.Value(name=f"{output.name}/product"), ir.Value(name=output.name)
        attributes = {name: item.as_int() for name, item in old.attributes.items()}
        node(graph, old, "MatMulNBits", old.inputs[:used], [product], domain="com.microsoft", **attributes)
        node(graph, old, "Add", [product, bias], [total])
        supersede(output, total)
        drop(graph, [old])


def _declare_blocks(graph: ir.Graph, new: int) -> int:
    """Say what products of blocks give, which ONNX's shape inference does not know; returns how many there are.

    Raises:
        UsageError: Their scales are not stored as float32: a runtime would widen them as it loads, an NPU not.
    """
    found = _products(graph)
    for product in found:
        scales = product.inputs[2]
        if scales is None or not scales.is_initializer() or scales.dtype != ir.DataType.FLOAT:
            raise UsageError(
                "blocks of 4 bits in a static graph have float32 scales",
                where=product.name,
                hint="--set quantize.scale_format=float32",
            )
        output = product.outputs[0]
        output.shape, output.type = ir.Shape([1, new, product.attributes["N"].as_int()]), _FLOAT
    return len(found)


def _inputs(graph: ir.Graph, sizes: _Sizes) -> dict[str, ir.Value]:
    """Give the inputs their numbers, and the graph its positions; ``logits_to_keep`` goes: there is one length."""
    inputs = {value.name or "": value for value in graph.inputs}
    if "position_ids" not in inputs:
        inputs["position_ids"] = ir.Value(name="position_ids", type=_INT64)
        graph.inputs.insert(1, inputs["position_ids"])
    for name in ("input_ids", "position_ids"):
        inputs[name].shape = ir.Shape([1, sizes.new])
    inputs["attention_mask"].shape = ir.Shape([1, sizes.total])
    for name, value in inputs.items():
        if name.startswith(_PAST):
            value.shape = ir.Shape([1, sizes.kv_heads, sizes.cache, sizes.head_dim])
    for value in graph.outputs:
        if (value.name or "").startswith(_PRESENT):
            value.shape = ir.Shape([1, sizes.kv_heads, sizes.new, sizes.head_dim])
    return inputs


class _Shared:
    """What all layers read: cosine and sine of the positions ``[1, 1, new, D]``, and the mask."""

    def __init__(self, graph: ir.Graph, first: ir.Node, inputs: dict[str, ir.Value], sizes: _Sizes) -> None:
        self._graph, self._first, self._inputs, self._sizes = graph, first, inputs, sizes
        cos, sin = (_table(value, sizes.longest, first) for value in first.inputs[7:9])
        self.cos = self._positions("cos", np.concatenate([cos, cos], axis=1))
        self.sin = self._positions("sin", np.concatenate([-sin, sin], axis=1))
        self.mask = self._mask()

    def _positions(self, name: str, table: npt.NDArray[np.float32]) -> ir.Value:
        values = self._constant(f"rotary/{name}", table)
        rows = self._made("Gather", f"rotary/{name}_rows", values, "position_ids", axis=0)
        return self._made("Unsqueeze", f"rotary/{name}_at", rows, self._constant("rotary/axis", np.array([1])))

    def _mask(self) -> ir.Value:
        sizes = self._sizes
        real = self._made("Cast", "mask/real", "attention_mask", to=int(ir.DataType.FLOAT))
        column = self._made("Unsqueeze", "mask/column", real, self._constant("mask/axes", np.array([1, 2])))
        less = self._made("Sub", "mask/less", column, self._constant("mask/one", np.array(1, np.float32)))
        finite = self._made("Mul", "mask/finite", less, self._constant("mask/masked", np.array(MASKED, np.float32)))
        if sizes.new == 1:
            return finite
        later = np.zeros((sizes.new, sizes.total), np.float32)
        later[:, sizes.cache :] = np.triu(np.full((sizes.new, sizes.new), -MASKED, np.float32), 1)
        causal = np.tile(later, (sizes.group, 1))[None, None]
        return self._made("Min", "mask/causal", finite, self._constant("mask/later", causal))

    def _constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        return constant(self._graph, name, array)

    def _made(self, op_type: str, name: str, *inputs: ir.Value | str, **attributes: Any) -> ir.Value:  # noqa: ANN401
        output = ir.Value(name=name)
        values = [self._inputs[value] if isinstance(value, str) else value for value in inputs]
        node(self._graph, self._first, op_type, values, [output], **attributes)
        return output


def _table(value: ir.Value | None, rows: int, attention: ir.Node) -> npt.NDArray[np.float32]:
    tensor = None if value is None else value.const_value
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        raise CompressError("the rotary tables of an attention node are not in the graph", where=attention.name)
    return np.asarray(tensor.numpy(), np.float32)[:rows]


class _Attention:
    """One attention node, and what it is written out as."""

    def __init__(self, graph: ir.Graph, old: ir.Node, sizes: _Sizes, shared: _Shared) -> None:
        self._graph, self._old, self._sizes, self._shared = graph, old, sizes, shared
        self._name = old.outputs[0].name

    def write_out(self) -> None:
        """Replace the node."""
        sizes, old = self._sizes, self._old
        query, key, value = self._parts()
        query = self._rotated("query", self._by_head("query", query, sizes.heads))
        scale = old.attributes.get("scale")
        factor = scale.as_float() if scale is not None and scale.as_float() else sizes.head_dim**-0.5
        factor_value = constant(self._graph, f"scale/{factor:g}", np.array(factor, np.float32))
        query = self._made("Mul", "query_scaled", query, factor_value)
        # Query heads of one key head are neighbours: one product for all of them.
        query = self._shaped("query_grouped", query, 1, sizes.kv_heads, sizes.group * sizes.new, sizes.head_dim)
        key = self._rotated("key", self._by_head("key", key, sizes.kv_heads))
        value = self._by_head("value", value, sizes.kv_heads)
        keys = self._made("Concat", "keys", old.inputs[3], key, axis=2)
        values = self._made("Concat", "values", old.inputs[4], value, axis=2)
        turned = self._made("Transpose", "keys_transposed", keys, perm=[0, 1, 3, 2])
        masked = self._made("Add", "masked", self._made("MatMul", "scores", query, turned), self._shared.mask)
        mixed = self._made("MatMul", "mixed", self._made("Softmax", "weights", masked, axis=-1), values)
        mixed = self._shaped("mixed_heads", mixed, 1, sizes.heads, sizes.new, sizes.head_dim)
        mixed = self._made("Transpose", "mixed_tokens", mixed, perm=[0, 2, 1, 3])
        mixed = self._shaped("joined", mixed, 1, sizes.new, sizes.heads * sizes.head_dim)
        _hand_over(self._graph, old, (mixed, key, value))

    def _parts(self) -> list[ir.Value]:
        query, key, value = self._old.inputs[:3]
        if query is None:
            raise CompressError("an attention node has no query", where=self._old.name)
        if key is not None and value is not None:
            return [query, key, value]
        widths = [count * self._sizes.head_dim for count in (self._sizes.heads, *(self._sizes.kv_heads,) * 2)]
        return self._split(query, widths, "query", "key", "value")

    def _by_head(self, part: str, value: ir.Value, count: int) -> ir.Value:
        split = self._shaped(f"{part}_split", value, 1, self._sizes.new, count, self._sizes.head_dim)
        return self._made("Transpose", f"{part}_heads", split, perm=[0, 2, 1, 3])

    def _rotated(self, part: str, value: ir.Value) -> ir.Value:
        half = self._sizes.head_dim // 2
        first, second = self._split(value, [half, half], f"{part}_first", f"{part}_second")
        swapped = self._made("Concat", f"{part}_swapped", second, first, axis=-1)
        along = self._made("Mul", f"{part}_along", value, self._shared.cos)
        across = self._made("Mul", f"{part}_across", swapped, self._shared.sin)
        return self._made("Add", f"{part}_rotated", along, across)

    def _split(self, value: ir.Value, widths: list[int], *parts: str) -> list[ir.Value]:
        outputs = [ir.Value(name=f"{self._name}/{part}") for part in parts]
        widths_value = constant(self._graph, f"widths/{'x'.join(map(str, widths))}", np.array(widths))
        node(self._graph, self._old, "Split", [value, widths_value], outputs, axis=-1)
        return outputs

    def _shaped(self, part: str, value: ir.Value, *shape: int) -> ir.Value:
        wanted = constant(self._graph, f"shape/{'x'.join(map(str, shape))}", np.array(shape))
        return self._made("Reshape", part, value, wanted)

    def _made(self, op_type: str, part: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:  # noqa: ANN401
        output = ir.Value(name=f"{self._name}/{part}")
        node(self._graph, self._old, op_type, inputs, [output], **attributes)
        return output


def _hand_over(graph: ir.Graph, attention: ir.Node, values: tuple[ir.Value, ...]) -> None:
    for old, new in zip(attention.outputs, values, strict=True):
        if old.is_graph_output():
            new.shape, new.type = old.shape, _FLOAT
        supersede(old, new)
    drop(graph, [attention])
    for table in attention.inputs[7:9]:
        if table is not None:
            forget(graph, table)
