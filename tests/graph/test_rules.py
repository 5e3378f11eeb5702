"""Each rule on a decoder's real skeleton: it fires where it should, and refuses a skeleton that lacks a piece."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from prepared import Prepare, operators

from compress.errors import CompressError
from compress.graph.decoder import OPSET
from compress.graph.rules import logits_to_keep, long_rope
from tiny_models import FAMILIES, LONG_ROPE_SWITCH

LAYERS, HEAD = 3, 1


# ------------------------------------------------------------------------------------------------ the whole sequence


@pytest.mark.parametrize("profile", ["float", "arm-int4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_rule_fires_once_a_place(name: str, profile: str, prepare: Prepare) -> None:
    built = prepare(name, profile).build()
    gpt2 = name == "gpt2"
    expected = {
        "linear": 4 * LAYERS + HEAD,
        "table": 2 if gpt2 else 1,
        "vector": 2 * (2 * LAYERS + 1) if gpt2 else 2 * LAYERS + 1,
        "logits_to_keep": 1,
    }
    if name == "phi3-longrope":
        expected["long_rope"] = LAYERS
    assert built.fired == expected
    assert set(built.constants) == (set() if gpt2 else {"cos_cache", "sin_cache"})


@pytest.mark.parametrize("name", FAMILIES)
def test_int4_graph_is_fused(name: str, prepare: Prepare) -> None:
    model = prepare(name).build().model
    found = operators(model.graph)
    biases = sum(1 for node in model.graph if node.op_type == "MatMulNBits" and len(node.inputs) == 6)
    assert found["MatMulNBits"] == 4 * LAYERS + HEAD, "queries, keys and values are one product; so are gate and up"
    assert found["GroupQueryAttention"] == LAYERS
    assert found["SkipSimplifiedLayerNormalization"] + found["SkipLayerNormalization"] == 2 * LAYERS + (name == "gpt2")
    assert found["Split"] == (0 if name == "gpt2" else LAYERS), "gate and up"
    assert found["GatherBlockQuantized"] == 1
    assert not found.keys() & {"Transpose", "MatMul", "Concat", "DequantizeLinear"}
    assert found["Add"] == (2 if name == "phi3-longrope" else 0), "biases are inputs of the product"
    assert biases == {"gpt2": 4 * LAYERS, "llama-untied": 2 * LAYERS}.get(name, 0)
    assert not model.functions
    assert model.opset_imports == {"": OPSET, "com.microsoft": 1}


@pytest.mark.parametrize("name", FAMILIES)
def test_float_graph_keeps_one_transpose_for_a_tied_table(name: str, prepare: Prepare) -> None:
    found = operators(prepare(name, "float").build().model.graph)
    assert found["MatMul"] == 4 * LAYERS + HEAD
    assert found["Transpose"] == (1 if name in ("llama", "gpt2") else 0)
    assert not found.keys() & {"MatMulNBits", "GatherBlockQuantized", "Concat"}


@pytest.mark.parametrize("name", FAMILIES)
def test_boundary_has_the_names_that_runtimes_expect(name: str, prepare: Prepare) -> None:
    graph = prepare(name).build().model.graph
    shapes = {value.name: [str(dim) for dim in value.shape or ()] for value in (*graph.inputs, *graph.outputs)}
    heads, size = ("4" if name == "gpt2" else "2"), ("32" if name == "llama-untied" else "16")
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert shapes["logits"] == ["batch_size", "logits_length", "384"]
    assert shapes["logits_to_keep"] == ["1"]
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            cache = ["batch_size", heads, "past_sequence_length", size]
            assert shapes[f"past_key_values.{layer}.{kind}"] == cache
            assert shapes[f"present.{layer}.{kind}"] == [*cache[:2], "total_sequence_length", size]
    assert all(isinstance(value.shape[1], int) for value in graph.inputs if (value.name or "").startswith("past"))
    assert len(shapes) == 4 + 4 * LAYERS + (name == "gpt2")


def test_every_initializer_has_a_value_and_a_user(prepare: Prepare) -> None:
    for name in FAMILIES:
        prepared = prepare(name)
        graph = prepared.build().model.graph
        places = {
            (stored.offset, stored.nbytes)
            for fate in prepared.plan.fates
            for stored in fate.stored
            if stored.offset is not None
        }
        for value in graph.initializers.values():
            assert value.const_value is not None and value.uses(), value.name
            if isinstance(value.const_value, ir.ExternalTensor):
                assert value.const_value.location == "model.onnx.data"
                assert (value.const_value.offset, value.const_value.length) in places


# ------------------------------------------------------------------------------------------------------- one by one


def test_tied_table_is_one_run_of_bytes_under_two_shapes(prepare: Prepare) -> None:
    for name in ("llama", "gpt2"):
        prepared = prepare(name)
        graph = prepared.build().model.graph
        embedding = next(node for node in graph if node.op_type == "GatherBlockQuantized")
        head = graph.outputs[0].producer()
        assert head is not None and head.op_type == "MatMulNBits"
        table, blocked = embedding.inputs[0], head.inputs[1]
        assert table is not None and blocked is not None and table is not blocked
        assert embedding.inputs[2] is head.inputs[2], "the scales are one initializer"
        assert embedding.inputs[3] is head.inputs[3], "so are the zero points"
        first, second = table.const_value, blocked.const_value
        assert isinstance(first, ir.ExternalTensor) and isinstance(second, ir.ExternalTensor)
        assert (first.offset, first.length) == (second.offset, second.length)
        assert list(table.shape or ()) == [384, 32]
        assert list(blocked.shape or ()) == [384, 4, 8], "blocks of 16 columns, 8 bytes each"


def test_untied_head_has_its_own_bytes(prepare: Prepare) -> None:
    graph = prepare("mistral").build().model.graph
    head = graph.outputs[0].producer()
    embedding = next(node for node in graph if node.op_type == "GatherBlockQuantized")
    offsets = [node.inputs[index].const_value.offset for node, index in ((head, 1), (embedding, 0))]  # type: ignore[union-attr]
    assert offsets[0] != offsets[1]


def test_quantized_nodes_say_how_they_are_stored(prepare: Prepare) -> None:
    prepared = prepare("mistral", "arm-int4", "quantize.roles.down.bits=8", "quantize.symmetric=false")
    nodes = [node for node in prepared.build().model.graph if node.op_type == "MatMulNBits"]
    for node in nodes:
        down = "down_proj" in (node.inputs[1].name or "")
        assert {key: node.attributes[key].as_int() for key in ("bits", "block_size", "accuracy_level")} == {
            "bits": 8 if down else 4,
            "block_size": 32,
            "accuracy_level": 4,
        }
        assert len(node.inputs) == 4 and node.inputs[3].dtype == ir.DataType.UINT8, "packed zero points"
        assert node.domain == "com.microsoft"
        size, columns = node.attributes["N"].as_int(), node.attributes["K"].as_int()
        assert list(node.inputs[1].shape or ()) == [size, -(-columns // 32), 32 if down else 16]
        assert list(node.inputs[2].shape or ()) == [size, -(-columns // 32)]
    assert sum("down_proj" in (node.inputs[1].name or "") for node in nodes) == LAYERS


def test_gate_and_up_split_in_the_order_of_the_stack(prepare: Prepare) -> None:
    graph = prepare("llama").build().model.graph
    for split in (node for node in graph if node.op_type == "Split"):
        gate, up = split.outputs
        assert {user.op_type for user, _ in gate.uses()} == {"Sigmoid", "Mul"}
        assert {user.op_type for user, _ in up.uses()} == {"Mul"}


def test_rotary_tables_are_the_skeletons_and_shared_by_all_layers(prepare: Prepare) -> None:
    built = prepare("llama").build()
    angles = np.arange(256)[:, None] * (10000.0 ** -(np.arange(8) / 8))[None]
    np.testing.assert_allclose(built.constants["cos_cache"], np.cos(angles), rtol=0, atol=2e-5)
    np.testing.assert_allclose(built.constants["sin_cache"], np.sin(angles), rtol=0, atol=2e-5)
    attention = [node for node in built.model.graph if node.op_type == "GroupQueryAttention"]
    assert len({id(node.inputs[7]) for node in attention}) == len({id(node.inputs[8]) for node in attention}) == 1
    assert {(node.inputs[7].name, node.inputs[8].name) for node in attention} == {("cos_cache", "sin_cache")}


def test_long_rope_gives_every_attention_the_same_positions(prepare: Prepare) -> None:
    graph = prepare("phi3-longrope").build().model.graph
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    assert {node.inputs[9].name for node in attention} == {"long_rope/positions"}
    assert graph.initializers["long_rope/switch"].const_value.numpy() == LONG_ROPE_SWITCH
    plain = [node for node in prepare("phi3").build().model.graph if node.op_type == "GroupQueryAttention"]
    assert all(len(node.inputs) <= 9 or node.inputs[9] is None for node in plain)
    assert long_rope.apply(ir.Graph([], [], nodes=[]), 32) == 0


@pytest.mark.parametrize("default", [0, 1, 3])
def test_logits_to_keep_has_a_default_and_stays_an_input(default: int, prepare: Prepare) -> None:
    graph = prepare("gpt2", "arm-int4", f"graph.logits_to_keep={default}").build().model.graph
    keep = graph.inputs[-1]
    assert keep.name == logits_to_keep.NAME
    assert graph.initializers[keep.name].const_value.numpy().tolist() == [default]
    head = graph.outputs[0].producer()
    cut = head.inputs[0].producer()
    assert cut.op_type == "Slice" and cut.inputs[1].producer().op_type == "Neg"
    assert cut.inputs[1].producer().inputs[0] is keep
    assert [str(dim) for dim in graph.outputs[0].shape] == ["batch_size", str(default or "logits_length"), "384"]


# ------------------------------------------------------------------------------------------------ what is not there


def rename(name: str) -> Callable[[ir.Graph], object]:
    def edit(graph: ir.Graph) -> None:
        graph.initializers[name].name = "renamed"

    return edit


def retype(op_type: str, into: str) -> Callable[[ir.Graph], object]:
    def edit(graph: ir.Graph) -> None:
        next(node for node in graph if node.op_type == op_type).op_type = into

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "reason"),
    [
        ("llama", rename("model.layers.1.self_attn.o_proj.weight"), r"lacks a linear layer(?s:.*)layers\.1.*o_proj"),
        ("phi3", rename("model.layers.0.mlp.gate_up_proj.weight"), r"lacks a linear layer(?s:.*)gate_up_proj"),
        ("mistral", rename("lm_head.weight"), r"lacks a linear layer(?s:.*)lm_head"),
        ("gpt2", retype("Add", "Mul"), r"lacks the bias(?s:.*)transformer\.h\.0"),
        ("mistral", rename("model.embed_tokens.weight"), r"lacks an embedding(?s:.*)model\.embed_tokens"),
        ("gpt2", rename("transformer.wpe.weight"), r"lacks an embedding(?s:.*)wpe"),
        ("llama", rename("model.norm.weight"), r"vector 6 of 7, renamed has no value"),
        ("llama", retype("GroupQueryAttention", "MultiHeadAttention"), r"fused attention 2 of 3"),
        ("llama", retype("SkipSimplifiedLayerNormalization", "Add"), r"fused residual norms 5 of 6"),
    ],
)
def test_a_skeleton_that_lacks_a_piece_is_refused(
    name: str, edit: Callable[[ir.Graph], object], reason: str, prepare: Prepare
) -> None:
    prepared = prepare(name)
    prepared.build()
    with pytest.raises(CompressError, match=reason):
        prepared.edited(edit).build()


def test_rotary_tables_must_be_there_and_fit(prepare: Prepare) -> None:
    def cosine(graph: ir.Graph) -> ir.Value:
        return next(value for name, value in graph.initializers.items() if name.endswith("cos_cache"))

    def cut(graph: ir.Graph) -> None:
        value = cosine(graph)
        value.const_value = ir.tensor(value.const_value.numpy()[:100], name=value.name)
        value.shape = ir.Shape([100, 8])

    prepared = prepare("llama")
    with pytest.raises(CompressError, match=r"the rotary table is \[100, 8\], planned was \[256, 8\]"):
        prepared.edited(cut).build()
    with pytest.raises(CompressError, match="0 rotary tables named cos_cache"):
        prepared.edited(lambda graph: setattr(cosine(graph), "name", "elsewhere")).build()


def test_logits_without_a_head_are_refused() -> None:
    hidden = ir.Value(name="hidden", shape=ir.Shape([1, 2, 3]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [hidden])
    graph = ir.Graph([hidden], node.outputs, nodes=[node])
    with pytest.raises(CompressError, match="no head in front of its logits"):
        logits_to_keep.apply(graph, 0)
