"""Each rule on an encoder's real skeleton: it fires where it should, and a profile that expects more is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir
import pytest
from prepared import Prepare, operators

from compress.errors import CompressError, UsageError
from compress.graph.rules import attention
from compress.profile import load_profile
from tiny_models import ENCODER_STEMS, ENCODERS, PLAIN_INT8

LAYERS = 3
#: Operators that multiply bytes, and those a fused graph has no use for.
INTEGER = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QAttention")
UNFUSED = {"Softmax", "Erf", "Pow", "Gemm", "Where", "Expand", "Concat", "Transpose", "Reshape"}


@pytest.fixture(params=ENCODERS)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def gelus(name: str) -> int:
    """Return how many GELUs a model has: one a layer, and those of heads that have a dense layer with one."""
    family, _, task = name.partition(":")
    return LAYERS + (task == "fill-mask" or (family, task) == ("electra", "text-classification"))


def readers(graph: ir.Graph, name: str) -> list[str]:
    value = next(item for item in graph.inputs if item.name == name)
    return sorted(user.op_type for user, _ in value.uses())


# ------------------------------------------------------------------------------------------------ the whole sequence


@pytest.mark.parametrize("profile", ["float", PLAIN_INT8], ids=["float", "int8"])
def test_every_rule_fires_once_a_place(name: str, profile: str, prepare: Prepare) -> None:
    ready = prepare(name, profile, 'graph.fusions=["attention", "gelu", "skip_norm"]')
    built, structure = ready.build(), ready.plan.structure
    runs = LAYERS // len({linear.layer for linear in structure.linears if linear.layer is not None})
    assert runs == (3 if name.startswith("albert") else 1)
    expected = {
        "attention": LAYERS,
        "gelu": gelus(name),
        "skip_norm": 2 * LAYERS,
        "linear": sum(runs if linear.layer is not None else 1 for linear in structure.linears),
        "table": len(structure.tables),
        "vector": len(structure.vectors),
    }
    if name.endswith(":embedding"):
        expected["pooling"] = 1
    if profile == PLAIN_INT8:
        expected["padding"] = 1
    assert {rule: built.fired[rule] for rule in expected} == expected
    assert {rule: count for rule, count in built.fired.items() if rule not in expected and count} == {}


def test_float_graph_is_fused(name: str, prepare: Prepare) -> None:
    fusions = 'graph.fusions=["attention", "gelu", "skip_norm"]'
    graph = prepare(name, "float", fusions, "graph.pooling=none").build().model.graph
    found = operators(graph)
    assert found["MultiHeadAttention"] == LAYERS
    assert found["Gelu"] + found["FastGelu"] == gelus(name)
    assert found["FastGelu"] == (gelus(name) if name.startswith("albert") else 0), "ALBERT's is the tanh form"
    assert found["SkipLayerNormalization"] == 2 * LAYERS
    assert found["LayerNormalization"] == 1 + name.endswith("fill-mask"), "the embedding's has a sum of three"
    # A tied head reads the table transposed; everything else is stored as it is multiplied.
    assert {kind: count for kind, count in found.items() if kind in UNFUSED} == (
        {"Transpose": 1} if name.endswith("fill-mask") else {}
    )
    mask = [kind for kind in readers(graph, "attention_mask") if kind != "Shape"]
    assert mask == ["Cast"], "it is prepared once, not once a layer"
    narrow = next(node for node in graph if node.op_type == "Cast").outputs[0]
    assert [user.op_type for user, _ in narrow.uses()] == ["MultiHeadAttention"] * LAYERS


def test_packed_attention_reads_its_product_itself(name: str, prepare: Prepare) -> None:
    overrides = ('graph.fusions=["attention", "packed_attention"]', "graph.minimum_fusions={}")
    for profile, kind in (("float", "Attention"), (PLAIN_INT8, "QAttention")):
        built = prepare(name, profile, *overrides).build()
        found = operators(built.model.graph)
        assert built.fired["packed_attention"] == found[kind] == LAYERS
        assert found["MultiHeadAttention"] == 0
        assert found["Split"] == name.endswith("question-answering"), "start and end"


def test_int8_graph_multiplies_integers(name: str, prepare: Prepare) -> None:
    ready = prepare(name, PLAIN_INT8)
    graph = ready.build().model.graph
    stored = {item.name: item for item in graph.initializers.values()}
    codes = {key for key, value in stored.items() if value.dtype == ir.DataType.INT8 and key.endswith(".codes")}
    linears = [linear for linear in ready.plan.structure.linears if linear.role != "head"]
    assert codes == {f"{linear.name}.codes" for linear in linears}
    products = [node for node in graph if node.op_type in INTEGER]
    assert len(products) >= LAYERS * 4
    for node in products:
        assert len([value for value in node.inputs if value is not None and value.name in codes]) == 1
    tables = [node for node in graph if node.op_type == "GatherBlockQuantized"]
    assert len(tables) == 2, "words and positions; two segments cost nothing"
    assert operators(graph)["MatMulNBits"] == name.endswith("fill-mask")
    floats = [node for node in graph if node.op_type == "MatMul" and any(v.is_initializer() for v in node.inputs)]
    assert floats == []


def test_every_initializer_has_a_value_and_a_user(name: str, prepare: Prepare) -> None:
    for profile in ("float", PLAIN_INT8):
        ready = prepare(name, profile)
        graph = ready.build().model.graph
        places = {(item.offset, item.nbytes) for fate in ready.plan.fates for item in fate.stored}
        external = []
        for value in graph.initializers.values():
            assert value.const_value is not None and value.uses(), value.name
            if isinstance(value.const_value, ir.ExternalTensor):
                assert value.const_value.location == "model.onnx.data"
                external.append((value.const_value.offset, value.const_value.length))
        assert set(external) <= places
        # The same bytes twice only where a head reads the words' table.
        shared = len(external) - len(set(external))
        assert shared == (profile == PLAIN_INT8 and name.endswith("fill-mask"))


def test_shared_layers_are_stored_once(prepare: Prepare) -> None:
    """ALBERT's three layers, and six of them, have the same weights."""
    ready = prepare("albert:embedding", "float")
    graph = ready.build().model.graph
    weights = [key for key in graph.initializers if key.endswith(".weight")]
    assert len(weights) == len(set(weights)) and sum("ffn_output" in key for key in weights) == 1
    down = next(value for key, value in graph.initializers.items() if key.endswith("ffn_output.weight"))
    assert len(down.uses()) == LAYERS
    bert = prepare("bert:embedding", "float")
    block = sum(fate.nbytes for fate in bert.plan.fates if fate.name.startswith("encoder.layer.0."))
    assert ready.plan.data_bytes < bert.plan.data_bytes - block, "BERT has each of its layers"


# ------------------------------------------------------------------------------------------------- what is expected


@pytest.mark.parametrize("family", ENCODER_STEMS)
def test_a_profile_that_expects_more_fusions_fails(family: str, prepare: Prepare) -> None:
    name = f"{family}:token-classification"
    prepare(name, "float", "graph.minimum_fusions.gelu=1", "graph.minimum_fusions.attention=1").build()
    with pytest.raises(CompressError, match="gelu fired 3 times, 2 a layer make 6") as caught:
        prepare(name, "float", "graph.minimum_fusions.gelu=2").build()
    assert "graph.minimum_fusions" in (caught.value.hint or "")
    with pytest.raises(CompressError, match="attention fired 0 times, 1 a layer make 3"):
        prepare(name, "float", "graph.minimum_fusions.attention=1", 'graph.fusions=["gelu"]').build()


@pytest.mark.parametrize("key", ["graph.minimum_fusions.gelus=1", 'graph.fusions=["gelus"]'])
def test_a_rule_that_is_not_there_is_refused(key: str) -> None:
    with pytest.raises(UsageError, match="gelus") as caught:
        load_profile("float", [key])
    assert "skip_norm" in str(caught.value), "the rules there are"


def test_the_shipped_integer_profiles_expect_fusions() -> None:
    assert {"attention", "gelu"} <= set(load_profile("x86-int8").graph.minimum_fusions)


# ------------------------------------------------------------------------------------------------ what is not there


def masked_by(other: str) -> Callable[[ir.Graph], object]:
    """Let a skeleton's mask come from another input, or from that too."""

    def edit(graph: ir.Graph) -> None:
        inputs = {value.name: value for value in graph.inputs}
        mask, wrong = inputs["attention_mask"], inputs["token_type_ids"]
        if other == "instead":
            ir.convenience.replace_all_uses_with(mask, wrong)
            return
        first = next(node for node, _ in mask.uses())
        both = ir.node("Mul", [mask, wrong], name="both")
        both.outputs[0].name = "both"
        graph.insert_before(first, both)
        for node, index in list(mask.uses()):
            if node is not both:
                node.replace_input_with(index, both.outputs[0])

    return edit


@pytest.mark.parametrize("other", ["instead", "too"])
def test_attention_with_another_mask_is_left_alone(other: str, prepare: Prepare) -> None:
    ready = prepare("bert:token-classification", "float").edited(masked_by(other))
    model = ir.load(ready.skeleton)
    before = [node.op_type for node in model.graph]
    assert attention.apply(model.graph, 4) == 0
    assert [node.op_type for node in model.graph] == before
    assert ready.build().fired["attention"] == 0
    with pytest.raises(CompressError, match="attention fired 0 times"):
        prepare("bert:token-classification", PLAIN_INT8).edited(masked_by(other)).build()


def rename(name: str) -> Callable[[ir.Graph], object]:
    def edit(graph: ir.Graph) -> None:
        graph.initializers[name].name = "renamed"

    return edit


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("bert:embedding", "encoder.layer.1.attention.output.dense.weight", r"lacks a linear layer(?s:.*)layer\.1"),
        ("albert:fill-mask", "predictions.dense.weight", r"lacks a linear layer(?s:.*)predictions\.dense"),
        ("electra:embedding", "embeddings.word_embeddings.weight", r"lacks an embedding(?s:.*)word_embeddings"),
        ("distilbert:embedding", "embeddings.LayerNorm.weight", r"vector 13 of 14, renamed has no value"),
    ],
)
def test_a_skeleton_that_lacks_a_piece_is_refused(name: str, tensor: str, reason: str, prepare: Prepare) -> None:
    ready = prepare(name, "float")
    ready.build()
    with pytest.raises(CompressError, match=reason):
        ready.edited(rename(tensor)).build()
