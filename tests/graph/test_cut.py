"""A decoder's graph cut at its blocks: every node is in one piece, and hidden states alone go from piece to piece."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from compress.errors import CompressError
from compress.graph.cut import cut, extract
from compress.package.external import load_graph

FAMILIES = ("llama", "llama-untied", "mistral", "phi3", "phi3-longrope", "gpt2")
LAYERS = 3


#: Not of models whose norms take off the mean.
ROTATED = ("x86-int8-hybrid", "quantize.effort=fast")


@pytest.mark.parametrize(
    ("family", "recipe"),
    [*((family, ()) for family in FAMILIES), ("llama", ROTATED), ("phi3", ROTATED)],
)
def test_a_piece_is_a_block_and_hands_on_hidden_states(
    family: str, recipe: tuple[str, ...], tiny_artifact: Callable[..., Path]
) -> None:
    whole = load_graph(tiny_artifact(family, *recipe) / "model.onnx")
    pieces = cut(whole)
    assert len(pieces) == LAYERS + 2
    for number, piece in enumerate(pieces):
        names = {name for name in piece.inputs if name.startswith("past_key_values.")}
        block = number - 1
        assert names == {f"past_key_values.{block}.{part}" for part in ("key", "value") if 0 <= block < LAYERS}
        # The sum of the residual stream, and what a norm made of it.
        assert len(piece.given) <= 2 and len(piece.handed) <= 2 and not piece.passed
        previous = pieces[number - 1].handed if number else ()
        assert piece.given == previous
    assert pieces[-1].outputs == ("logits",) and not pieces[-1].handed
    own = [index for piece in pieces for index in piece.nodes if index not in piece.copies]
    assert sorted(own) == list(range(len(whole.graph.node)))
    copied = {whole.graph.node[index].op_type for piece in pieces for index in piece.copies}
    assert copied.isdisjoint({"MatMulNBits", "GroupQueryAttention", "GatherBlockQuantized"})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_piece_has_only_the_weights_that_it_reads(family: str, tiny_artifact: Callable[..., Path]) -> None:
    whole = load_graph(tiny_artifact(family) / "model.onnx")
    names = {tensor.name for tensor in whole.graph.initializer}
    seen: set[str] = set()
    for piece in cut(whole):
        made = extract(whole, piece, dict.fromkeys(piece.given, TensorProto.FLOAT))
        read = {name for node in made.graph.node for name in node.input}
        kept = {tensor.name for tensor in made.graph.initializer}
        assert kept == names & read
        seen |= kept
    assert seen == names


def _graph(nodes: list[onnx.NodeProto], inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in inputs]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [0.5] * 16)
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in outputs]
    return helper.make_model(helper.make_graph(nodes, "g", values, made, [weight]))


PAST = [f"past_key_values.{layer}.key" for layer in (0, 1)]


def test_what_a_subgraph_takes_from_outside_goes_across() -> None:
    """A cut before a node whose branches read a value of the piece before."""
    branch = helper.make_graph(
        [helper.make_node("Add", ["h", "h"], ["b"])],
        "b",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["e"]),
        helper.make_node("MatMul", ["e", "w"], ["q"]),
        helper.make_node("Add", ["q", PAST[0]], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["m"]),
        helper.make_node("If", ["yes"], ["c"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["c", PAST[1]], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["logits"]),
    ]
    model = _graph(nodes, ["x", "yes", *PAST], ["logits"])
    pieces = cut(model)
    assert [piece.given for piece in pieces] == [(), ("e",), ("h",), ("d",)]
    assert {node.op_type for node in extract(model, pieces[2], {"h": 1}).graph.node} == {"MatMul", "If", "Add"}


def test_a_value_that_skips_a_block_passes_through() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["first"]),
        helper.make_node("MatMul", ["first", "w"], ["q"]),
        helper.make_node("Add", ["q", PAST[0]], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["k"]),
        helper.make_node("Add", ["k", PAST[1]], ["b"]),
        helper.make_node("Add", ["b", "first"], ["c"]),
        helper.make_node("MatMul", ["c", "w"], ["logits"]),
    ]
    pieces = cut(_graph(nodes, ["x", *PAST], ["logits"]))
    assert [(piece.given, piece.passed) for piece in pieces] == [
        ((), ()),
        (("first",), ("first",)),
        (("first", "a"), ()),
        (("c",), ()),
    ]


def test_what_cannot_be_cut_is_refused() -> None:
    plain = helper.make_node("MatMul", ["x", "w"], ["logits"])
    with pytest.raises(CompressError, match="it reads no key/value cache"):
        cut(_graph([plain], ["x"], ["logits"]))
    turns = [
        helper.make_node("MatMul", ["x", "w"], ["e"]),
        helper.make_node("Add", ["e", PAST[0]], ["a"]),
        helper.make_node("Add", ["a", PAST[1]], ["b"]),
        helper.make_node("Add", ["b", PAST[0]], ["logits"]),
    ]
    with pytest.raises(CompressError, match="two blocks read their caches in turn"):
        cut(_graph(turns, ["x", *PAST], ["logits"]))
    bare = [
        helper.make_node("MatMul", ["x", "w"], ["e"]),
        helper.make_node("MatMul", ["e", "w"], ["f"]),
        helper.make_node("Add", ["f", PAST[0]], ["a"]),
        helper.make_node("Add", ["a", PAST[1]], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["logits"]),
    ]
    with pytest.raises(CompressError, match="nothing between two blocks reads a matrix"):
        cut(_graph(bare, ["x", *PAST], ["logits"]))
