"""Bugs to plant into a quantized decoder's graph: what an exporter could get wrong, as changes of an ``onnx_ir`` model.

Bugs of :data:`WEIGHTS` and :data:`GRAPH` change what prefill computes, those of :data:`CACHE` only what decoding does.
Names are those of this project's decoders: fused qkv and gate_up, GroupQueryAttention, a tied table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
Bug = Callable[[ir.Model], None]


def change(model: ir.Model, ending: str, edit: Callable[[Array], Array]) -> None:
    """Edit the initializers whose name ends so; each must become another array of the same shape and type."""
    found = [value for name, value in model.graph.initializers.items() if name.endswith(ending)]
    assert found, ending
    for value in found:
        assert value.const_value is not None
        before = value.const_value.numpy().copy()
        after = edit(before.copy())
        assert after.shape == before.shape and after.dtype == before.dtype and (after != before).any()
        value.const_value = ir.tensor(after, name=value.name)


def constant(model: ir.Model, name: str, array: Array) -> ir.Value:
    """Add an initializer."""
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    model.graph.register_initializer(value)
    return value


def middle(model: ir.Model, part: str) -> str:
    """Return a part's name in the middle block: ``layers.15.PART`` of 30."""
    count = sum(node.op_type == "GroupQueryAttention" for node in model.graph)
    return f"layers.{count // 2}.{part}"


# ---------------------------------------------------------------------------------------------------------- weights


def nibble_order(model: ir.Model) -> None:
    """Low and high four bits of one matrix change places."""
    change(model, "layers.0.mlp.gate_up_proj.codes", lambda codes: (codes >> 4) | (codes << 4))


def zero_point(model: ir.Model) -> None:
    """Zero points of the down projections are one too low: the old GPTQ convention."""

    def lower(packed: Array) -> Array:
        low, high = (packed & 15) - np.uint8(1), (packed >> 4) - np.uint8(1)
        return (low & 15) | ((high & 15) << 4)

    if any(name.endswith("down_proj.zero_points") for name in model.graph.initializers):
        change(model, "down_proj.zero_points", lower)
        return
    for node in list(model.graph):  # symmetric: none are stored, 8 is meant
        codes = node.inputs[1] if node.op_type == "MatMulNBits" else None
        if codes is None or codes.name is None or not codes.name.endswith("down_proj.codes"):
            continue
        assert codes.const_value is not None
        rows, blocks, _ = codes.const_value.shape.numpy()
        wrong = constant(model, f"{codes.name}.wrong", np.full((rows, (blocks + 1) // 2), 0x77, np.uint8))
        node.resize_inputs(4)
        node.replace_input_with(3, wrong)


def scale_block(model: ir.Model) -> None:
    """Scales of one matrix belong to the row before."""
    change(model, "layers.0.mlp.gate_up_proj.scales", lambda scales: np.roll(scales, 1, axis=0))


def scale_neighbour(model: ir.Model) -> None:
    """Scales of every down projection belong to the neighbouring block of the same row."""
    change(model, "down_proj.scales", lambda scales: np.roll(scales, 1, axis=1))


def scale_size(model: ir.Model) -> None:
    """Scales of the down projections spread a block over 7 steps where it has 15."""
    name = "row_scales" if any(name.endswith("row_scales") for name in model.graph.initializers) else "scales"
    change(model, f"down_proj.{name}", lambda scales: scales * np.float32(15 / 7))


def block_order(model: ir.Model) -> None:
    """The blocks of one matrix are stored from the last to the first."""
    change(model, middle(model, "self_attn.o_proj.codes"), lambda codes: codes[:, ::-1])


def wrong_table(model: ir.Model) -> None:
    """The head reads the table one row off: the id after."""
    change(model, "embed_tokens.blocked_codes", lambda codes: np.roll(codes, 1, axis=0))


def dropped_down(model: ir.Model) -> None:
    """The down projection of the middle block gives zeros."""
    for ending in ("mlp.down_proj.row_scales", "mlp.down_proj.scales"):
        name = middle(model, ending)
        if any(known.endswith(name) for known in model.graph.initializers):
            change(model, name, np.zeros_like)
            return
    raise AssertionError("no scales of the down projection")


def missing_norm(model: ir.Model) -> None:
    """The norm before the middle block's MLP lacks its weight."""
    change(model, middle(model, "post_attention_layernorm.weight"), np.ones_like)


# ------------------------------------------------------------------------------------------------------------ graph


def rope_sign(model: ir.Model) -> None:
    """The rotation turns the other way, so keys behind look like keys ahead."""
    change(model, "sin_cache", np.negative)


def rope_base(model: ir.Model) -> None:
    """The rotation's base is ten times too small."""
    angles = np.arctan2(*(_initializer(model, name)[1].astype(np.float64) for name in ("sin_cache", "cos_cache")))
    half = len(angles)
    wrong = angles * 10.0 ** (np.arange(half) / half)
    for name, wave in (("cos_cache", np.cos), ("sin_cache", np.sin)):
        change(model, name, lambda cache, wave=wave: wave(np.arange(len(cache))[:, None] * wrong).astype(cache.dtype))  # type: ignore[misc]


def rope_interleaved(model: ir.Model) -> None:
    """Pairs of neighbours are rotated instead of halves."""
    for node in _attention(model):
        node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)


def attention_window(model: ir.Model) -> None:
    """Attention sees the last 64 tokens alone: the mask of another model."""
    for node in _attention(model):
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 64)


def mask_short(model: ir.Model) -> None:
    """The mask's length is one token short."""
    for node in _attention(model):
        lengths = node.inputs[5]
        assert lengths is not None
        one = constant(model, f"{node.name}/one", np.ones(1, np.int32))
        wrong = ir.Node("", "Sub", [lengths, one], name=f"{node.name}/short")
        model.graph.insert_before(node, wrong)
        node.replace_input_with(5, wrong.outputs[0])


def kv_heads(model: ir.Model) -> None:
    """Query heads attend to the next group's keys and values."""
    for node in _attention(model):
        groups, heads = node.attributes["kv_num_heads"].as_int(), node.attributes["num_heads"].as_int()
        fused = node.inputs[0]
        projection = None if fused is None else fused.producer()
        codes = None if projection is None else projection.inputs[1]
        assert codes is not None and codes.name is not None and codes.const_value is not None
        start = codes.name.removesuffix(".codes")
        size = int(codes.const_value.shape.numpy()[0]) // (heads + 2 * groups)
        order = _next_group(heads, groups, size)
        for part in ("codes", "scales", "row_scales", "zero_points"):
            if f"{start}.{part}" in model.graph.initializers:
                _reorder(model, f"{start}.{part}", order)


def missing_residual(model: ir.Model) -> None:
    """What the middle block's attention adds to is dropped."""
    name = middle(model, "post_attention_layernorm.weight")
    (node,) = [node for node in model.graph if any(str(v.name).endswith(name) for v in node.inputs if v is not None)]
    zero = constant(model, "wrong/zero", np.zeros(1, np.float32))
    skipped = ir.Node("", "Mul", [node.inputs[0], zero], name="wrong/residual")
    model.graph.insert_before(node, skipped)
    node.replace_input_with(0, skipped.outputs[0])


def _attention(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


def _initializer(model: ir.Model, name: str) -> Array:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def _reorder(model: ir.Model, name: str, order: Array) -> None:
    change(model, name, lambda array: array[order])


def _next_group(heads: int, groups: int, size: int) -> Array:
    """Return the rows of a fused qkv ``[(heads + 2 groups) size]`` with keys and values of the next group."""
    rows = np.arange((heads + 2 * groups) * size).reshape(-1, size)
    turned = [np.roll(rows[start : start + groups], -1, axis=0) for start in (heads, heads + groups)]
    return np.concatenate([rows[:heads], *turned]).ravel()


# ------------------------------------------------------------------------------------------------------------ cache


def past(model: ir.Model, which: str, op_type: str, constants: dict[str, Array], axis: int | None) -> None:
    """Put an operator between the cache inputs and attention."""
    for node in _attention(model):
        for index in (3, 4):
            source = node.inputs[index]
            assert source is not None and source.name is not None
            if not source.name.endswith(which):
                continue
            inputs = [source, *(constant(model, f"{source.name}/{name}", array) for name, array in constants.items())]
            attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
            wrong = ir.Node("", op_type, inputs, attributes, name=f"{source.name}/wrong")
            model.graph.insert_before(node, wrong)
            node.replace_input_with(index, wrong.outputs[0])


def cache_heads(model: ir.Model) -> None:
    """Heads of the cached keys change places."""
    size = _attention(model)[0].attributes["kv_num_heads"].as_int()
    past(model, "key", "Gather", {"order": np.roll(np.arange(size), 1)}, 1)


def cache_sequence(model: ir.Model) -> None:
    """Cached values come in the wrong order of time."""
    limits = {"starts": [-1], "ends": [-(1 << 31)], "axes": [2], "steps": [-1]}
    past(model, "value", "Slice", {name: np.array(value) for name, value in limits.items()}, None)


def cache_dropped(model: ir.Model) -> None:
    """The cache is all zeros."""
    past(model, "", "Mul", {"zero": np.zeros(1, np.float32)}, None)


def cache_transposed(model: ir.Model) -> None:
    """Cached keys were stored as [batch, seq, heads, size] and are read as [batch, heads, seq, size]."""
    for node in _attention(model):
        source = node.inputs[3]
        assert source is not None
        shape = ir.Node("", "Shape", [source])
        turned = ir.Node("", "Transpose", [source], [ir.AttrInt64s("perm", [0, 2, 1, 3])])
        wrong = ir.Node("", "Reshape", [turned.outputs[0], shape.outputs[0]], [ir.AttrInt64("allowzero", 1)])
        model.graph.insert_before(node, [shape, turned, wrong])
        node.replace_input_with(3, wrong.outputs[0])


#: Ten in weights and graph, each of a kind of its own; four in the cache; and relatives, milder or coarser.
WEIGHTS: tuple[Bug, ...] = (nibble_order, zero_point, scale_neighbour, block_order, wrong_table, dropped_down)
GRAPH: tuple[Bug, ...] = (rope_base, mask_short, kv_heads, missing_residual)
CACHE: tuple[Bug, ...] = (cache_heads, cache_sequence, cache_dropped, cache_transposed)
RELATIVES: tuple[Bug, ...] = (missing_norm, scale_block, scale_size, attention_window, rope_sign, rope_interleaved)
