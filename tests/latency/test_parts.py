"""Parts have the very operators that artifacts have, and run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from compress import pipeline
from compress.contracts import Scheme, Structure
from compress.errors import UsageError
from compress.latency import Geometry, Workload, geometry_of, standard_workloads
from compress.latency.graphs import Graph, Noise, build
from compress.latency.parts import Attention, FeedForward, Part, Point, Product, Stored, point_from
from compress.latency.worker import Run
from compress.profile import load_profile
from compress.source import open_checkpoint
from tiny_models import INT8_CACHE, PLAIN_INT8

CASES = [
    ("llama", "float"),
    ("llama", "x86-int4"),
    ("llama", "x86-int8-hybrid"),
    ("phi3", "x86-int8-hybrid"),
    ("gpt2", "float"),
    ("gpt2", "x86-int4-speed"),
    ("llama", "float", *INT8_CACHE),
    ("gpt2", "float", "graph.attention=materialized", *INT8_CACHE),
    ("bert:embedding", "float"),
    ("bert:embedding", PLAIN_INT8),
    ("bert:embedding", "x86-int4"),
    ("distilbert:text-classification", "float"),
    ("albert:token-classification", PLAIN_INT8),
]
#: Nodes of a part's graph, or of an artifact, that are not counted: shapes, masks, and what only constants go into.
UNCOUNTED = {"Shape", "Cast", "Unsqueeze", "Squeeze", "Range", "Constant", "Neg", "Slice", "Gather", "Sub", "ReduceSum"}
UNCOUNTED |= {"GatherBlockQuantized", "Expand", "Reshape", "Transpose", "Concat", "Equal", "Where", "ReduceL2"}
# What a pooler is activated by: one token's.
UNCOUNTED |= {"Tanh", "Relu"}
#: What an attention reads that holds its scores whole.
SINK = "attention/no_sink"


def structure_of(directory: Path) -> Structure:
    with open_checkpoint(str(directory)) as checkpoint:
        return pipeline.describe(checkpoint)


def operators(model: onnx.ModelProto) -> Counter[str]:
    """Return how often each operator works on something that is not constant."""
    live = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    found: Counter[str] = Counter()
    for node in model.graph.node:
        if live & set(node.input):
            live |= set(node.output)
            name = f"{node.op_type} with a sink" if SINK in node.input else node.op_type
            kept = [item.i for item in node.attribute if item.name == "kv_cache_bit_width"]
            name += f", {kept[0]} bits kept" if kept else ""
            found[name] += node.op_type not in UNCOUNTED
    return +found


def of_graph(graph: Graph) -> Counter[str]:
    return operators(onnx.load_model_from_string(graph.serialized()))


def of_part(part: Part, workload: Workload) -> Counter[str]:
    """Return the operators of one copy: what two have more than one."""
    noise = Noise()
    one, two = (of_graph(build(Point(part, workload, copies, 0), noise)) for copies in (1, 2))
    return two - one if two != one else one


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case[:3]))
def test_parts_have_the_operators_of_the_artifact(
    case: tuple[str, ...], tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path]
) -> None:
    name, profile, *overrides = case
    recipe = load_profile(profile, overrides)
    geometry = geometry_of(structure_of(tiny_model(name)), recipe)
    workload = standard_workloads(decoder=geometry.style.decoder)
    expected: Counter[str] = Counter()
    for part, count in geometry.parts().items():
        for kind, often in of_part(part, next(iter(workload.values()))).items():
            expected[kind] += count * often
    path = tiny_artifact(*case) / "model.onnx"
    assert expected == operators(onnx.load(path, load_external_data=False))


def geometry(directory: Path, profile: str = "float", *overrides: str) -> Geometry:
    return geometry_of(structure_of(directory), load_profile(profile, overrides))


def test_the_sizes_are_the_models(tiny_model: Callable[[str], Path]) -> None:
    llama = geometry(tiny_model("llama"))
    assert (llama.hidden, llama.inner, llama.heads, llama.kv_heads, llama.head_dim, llama.layers) == (
        (64, 160, 4, 2, 16, 3)
    )  # fmt: skip
    assert llama.style.gated and llama.style.rms and llama.style.rotary and not llama.style.bias
    # 3 blocks of q, k, v, o, gate, up, down, and the head: the footprint is all of them in float32.
    block = 64 * (64 + 64) + 64 * 64 + 3 * 64 * 160
    assert llama.footprint == 4 * (3 * block + 64 * 384)
    bert = geometry(tiny_model("bert:embedding"))
    assert (bert.kv_heads, bert.heads, bert.head) == (4, 4, None)
    albert = geometry(tiny_model("albert:embedding"))
    assert albert.style.shared and albert.layers == 3
    assert not bert.style.shared


def test_resized_as_pruning_does(tiny_model: Callable[[str], Path]) -> None:
    llama = geometry(tiny_model("llama"))
    small = llama.resized(inner=96, heads=2, kv_heads=1, layers=2, vocabulary=100)
    assert (small.inner, small.heads, small.kv_heads, small.layers) == (96, 2, 1, 2)
    assert small.head is not None and small.head.outputs == 100
    assert small.footprint == llama.footprint  # caches are as full as the model's that is being pruned
    assert llama.resized(heads=2).kv_heads == 1
    assert llama.resized(kv_heads=2, heads=2).group == 1
    assert llama.resized() == llama
    with pytest.raises(UsageError, match="3 query heads are not shared evenly by 2"):
        llama.resized(heads=3, kv_heads=2)
    with pytest.raises(UsageError, match="must leave"):
        llama.resized(layers=0)


def test_ways_of_storage_keep_their_shares_when_layers_go(tiny_model: Callable[[str], Path]) -> None:
    structure = structure_of(tiny_model("bert:embedding"))
    float_down = [linear.name for linear in structure.linears if linear.role == "down"][:1]
    mixed = geometry_of(structure, load_profile(PLAIN_INT8), keep_float=float_down)
    assert sorted(count for _, count in mixed.storage) == [1, 2]
    assert {kind.down.dynamic for kind, _ in mixed.storage} == {True, False}
    assert mixed.resized(layers=2).layers == 2
    assert mixed.resized(layers=1).storage == mixed.storage[:1][:0] + ((mixed.storage[0][0], 1),)


def test_an_assignment_goes_before_the_profile(tiny_model: Callable[[str], Path]) -> None:
    structure, profile = structure_of(tiny_model("llama")), load_profile("x86-int4")
    down = [linear.name for linear in structure.linears if linear.role == "down"][0]
    table = next(table.name for table in structure.tables)
    eight = Scheme(8, 64, symmetric=True)
    chosen = geometry_of(structure, profile, schemes={down: eight, table: eight})
    assert sorted((kind.down.bits, count) for kind, count in chosen.storage) == [(4, 2), (8, 1)]
    # A tied head multiplies by the table's bytes, whatever the head's own scheme would be.
    assert chosen.head is not None and (chosen.head.stored.bits, chosen.head.stored.block_size) == (8, 64)
    assert chosen.ends.tables[0][1] == 8
    plain = geometry_of(structure, profile)
    assert plain.head is not None and (plain.head.stored.bits, plain.ends.tables[0][1]) == (4, 4)


def test_a_profile_for_another_processor_is_refused(tiny_model: Callable[[str], Path]) -> None:
    for profile in ("npu-qnn-int8", "cuda-int4", "web-int4-fp16"):
        with pytest.raises(UsageError, match="not for this machine's processor"):
            geometry(tiny_model("bert:embedding"), profile)
    with pytest.raises(UsageError, match="fixed input ranges"):
        geometry(tiny_model("bert:embedding"), PLAIN_INT8, "quantize.activations=static")


def test_a_large_head_is_measured_in_pieces(tiny_model: Callable[[str], Path]) -> None:
    llama = geometry(tiny_model("llama"))
    assert llama.pieces == 1
    whole = llama.resized(vocabulary=4_000_000)
    assert whole.head is not None
    assert whole.pieces * whole.head.outputs == pytest.approx(4_000_000, abs=whole.pieces)
    assert whole.head.nbytes <= 192 << 20
    assert whole.parts()[whole.head] == whole.pieces == 6


def test_points_survive_the_way_to_the_worker(tiny_model: Callable[[str], Path]) -> None:
    for name, *recipe in CASES:
        for part in geometry(tiny_model(name), *recipe).parts():
            point = Point(part, Workload(2, 3, 4), 5, 6)
            assert point_from(point.as_request()) == point
            assert point_from(point.as_request()).key == point.key


def test_everything_that_matters_is_in_the_key(tiny_model: Callable[[str], Path]) -> None:
    parts = list(geometry(tiny_model("llama"), "x86-int4").parts())
    ff = next(part for part in parts if isinstance(part, FeedForward))
    point = Point(ff, Workload(1, 1, 128), 6, 100)
    ways = ({"bits": 8}, {"block_size": 64}, {"symmetric": True}, {"dynamic": True}, {"accuracy_level": 0})
    others = [
        replace(point, copies=7),
        replace(point, others=101),
        *(replace(point, workload=Workload(*sizes)) for sizes in ((2, 1, 128), (1, 2, 128), (1, 1, 129))),
        *(replace(point, part=replace(ff, **change)) for change in ({"hidden": 65}, {"inner": 161})),
        *(replace(point, part=replace(ff, up=replace(ff.up, **way))) for way in ways),
        replace(point, part=replace(ff, style=replace(ff.style, tanh=True))),
    ]
    assert len({other.key for other in [point, *others]}) == len(others) + 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case[:3]))
def test_parts_run_and_give_numbers(case: tuple[str, ...], tiny_model: Callable[[str], Path]) -> None:
    name, *recipe = case
    found = geometry(tiny_model(name), *recipe)
    noise = Noise()
    for workload in standard_workloads(decoder=found.style.decoder).values():
        for part in found.parts():
            graph = build(Point(part, workload, 2, 0), noise)
            run = Run(Point(part, workload, 2, 64), noise, 1)
            run.run()
            run.evict()
            assert all(np.isfinite(array).all() for array in graph.feeds.values())


def test_copies_have_weights_of_their_own_unless_blocks_are_shared(tiny_model: Callable[[str], Path]) -> None:
    """A session keeps equal weights once: copies of equal bytes would be measured in a warm cache."""
    for name, distinct in (("bert:embedding", True), ("albert:embedding", False)):
        part = next(p for p in geometry(tiny_model(name)).parts() if isinstance(p, Attention))
        graph = build(Point(part, Workload(), 3, 0), Noise())
        weights = [array.tobytes() for array in graph.weights.values() if array.ndim == 2]
        assert len(weights) == len(set(weights)) == (6 if distinct else 2)


def test_bytes_are_those_of_the_weights() -> None:
    noise = Noise()
    for stored in (Stored(), Stored(4, 32), Stored(8, 32), Stored(8, dynamic=True)):
        product = Product(64, 128, stored)
        graph = build(Point(product, Workload(1, 1), 1, 0), noise)
        assert sum(array.nbytes for array in graph.weights.values()) == product.nbytes
