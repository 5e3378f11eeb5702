"""Time ONNX Runtime's fused attention: tiled or with its scores held whole, over a cache of floats or of bytes.

    python tools/benchmark_attention.py [--threads 2] [--heads 9,3,64 ...] [--rounds 5] [--append docs/performance.md]

A model here is a few GroupQueryAttention nodes with rotary embedding, as our graphs and the onnxruntime-genai builder's
have them, each with a key/value cache of its own. Held whole: `graph.attention = "materialized"`, a sink that adds
nothing. Bytes: `graph.cache_type = "int8"`. Past and present are one buffer, as onnxruntime-genai binds them; copied:
every run makes a new cache.

Every way runs alone - of two sessions in a process, the one that waits keeps its threads spinning - and the ways take
turns in every round. Reported are medians over the rounds, microseconds a node, and the ratio within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measured_export import machine, publish
from onnx import TensorProto, helper, numpy_helper

from compress.graph.rules import integer_cache
from compress.graph.rules.materialized import NOTHING

#: Query heads, key/value heads and head size: SmolLM2-135M, TinyLlama, Phi-3, Zephyr.
MODELS = ((9, 3, 64), (32, 4, 64), (32, 32, 96), (32, 8, 128))
#: New tokens behind so many others: a prompt, one in pieces, and a token.
RUNS = ((128, 0), (256, 0), (512, 0), (256, 256), (256, 1792), (1, 128), (1, 512), (1, 2048))
NODES = 4
LONGEST = 4096
#: A shape is run again until this has gone by.
SECONDS = 0.3


@dataclass(frozen=True)
class Way:
    """How attention is asked for, and how its cache is bound."""

    materialized: bool = False
    shared: bool = True
    integers: bool = False


WAYS = {
    "tiled": Way(),
    "held whole": Way(materialized=True),
    "cache copied": Way(shared=False),
    "bytes": Way(integers=True),
    "bytes, held whole": Way(materialized=True, integers=True),
}


def model(heads: int, kv_heads: int, size: int, way: Way) -> bytes:
    """Return a graph of ``NODES`` attention nodes; inputs end with their pasts, outputs begin with their presents."""
    angles = np.outer(np.arange(LONGEST), 10_000.0 ** -(np.arange(size // 2) / (size // 2)))
    arrays = {
        "cosines": np.cos(angles).astype(np.float32),
        "sines": np.sin(angles).astype(np.float32),
        "sink": np.full(heads, NOTHING, np.float32),
        # Of the bytes that are drawn below, the largest is 1.
        "scales": np.full((kv_heads, 1, size), 1 / 127, np.float32),
    }
    width = (heads + 2 * kv_heads) * size

    def value(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    kept = TensorProto.INT8 if way.integers else TensorProto.FLOAT

    inputs = [
        value("x", "batch", "new", width),
        helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]),
        helper.make_tensor_value_info("total", TensorProto.INT32, []),
    ]
    outputs, nodes = [], []
    further = ["", "", "sink" if way.materialized else "", *(["scales", "scales"] if way.integers else [])]
    for index in range(NODES):
        past, present = ([f"{when}.{index}.{kind}" for kind in "kv"] for when in ("past", "present"))
        inputs += [value(name, "batch", kv_heads, "past", size, kind=kept) for name in past]
        outputs += [value(name, "batch", kv_heads, "present", size, kind=kept) for name in present]
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                ["x", "", "", *past, "lengths", "total", "cosines", "sines", *further],
                [f"y{index}", *present],
                domain="com.microsoft",
                num_heads=heads,
                kv_num_heads=kv_heads,
                scale=size**-0.5,
                do_rotary=1,
                **(integer_cache.ATTRIBUTES if way.integers else {}),
            )
        )
    outputs.append(value(f"y{NODES - 1}", "batch", "new", heads * size))
    used = {name for node in nodes for name in node.input}
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, constants)
    domains = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    serialized: bytes = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
    return serialized


def times(shape: tuple[int, int, int], way: Way, threads: int) -> list[float]:
    """Return the median seconds a node of every run of ``RUNS``."""
    import onnxruntime as ort
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtValueVector

    heads, kv_heads, size = shape
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(model(*shape, way), options, providers=["CPUExecutionProvider"])
    inputs, names = ([item.name for item in items] for items in (session.get_inputs(), session.get_outputs()))
    host = ort.OrtDevice.make("cpu", 0)._get_c_device()
    random = np.random.default_rng(0)

    def handed(array: np.ndarray) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(array)

    found = []
    for new, past in RUNS:
        held = past + new if way.shared else past
        drawn = [random.uniform(-1, 1, (1, kv_heads, held, size)).astype(np.float32) for _ in range(2 * NODES)]
        cache = [handed((array * 127).astype(np.int8) if way.integers else array) for array in drawn]
        given = {
            "x": handed(random.standard_normal((1, new, (heads + 2 * kv_heads) * size), np.float32)),
            "lengths": handed(np.array([past + new - 1], np.int32)),
            "total": handed(np.array(past + new, np.int32)),
        }
        output = ort.OrtValue.ortvalue_from_shape_and_type([1, new, heads * size], np.float32)
        measured: list[float] = []
        while len(measured) < 3 or sum(measured) < SECONDS:
            feeds, fetches = OrtValueVector(), OrtValueVector()
            for item in (*given.values(), *cache):
                feeds.push_back(item._ortvalue)
            for item in (*cache, output) if way.shared else ():
                fetches.push_back(item._ortvalue)
            started = time.perf_counter()
            session.run_with_ortvaluevector(ort.RunOptions(), inputs, feeds, names, fetches, [host] * len(names))
            measured.append(time.perf_counter() - started)
        found.append(statistics.median(measured[1:]) / NODES)
    return found


def table(results: dict[tuple[int, int, int], list[dict[str, list[float]]]]) -> list[str]:
    """Return a row for every shape and run."""
    names = list(WAYS)
    lines = [
        f"| {' | '.join(['heads, of keys, size', 'new + past', *names, *(f'{name} / tiled' for name in names[1:])])} |",
        "|---|---|" + "---|" * (2 * len(names) - 1),
    ]
    for shape, rounds in results.items():
        for index, (new, past) in enumerate(RUNS):
            medians = [statistics.median(each[name][index] for each in rounds) * 1e6 for name in names]
            ratios = [
                statistics.median(each[over][index] / each["tiled"][index] for each in rounds) for over in names[1:]
            ]
            cells = [", ".join(map(str, shape)), f"{new} + {past}", *(f"{value:.0f}" for value in medians)]
            lines.append(f"| {' | '.join([*cells, *(f'{ratio:.2f}' for ratio in ratios)])} |")
    return lines


def shape_of(text: str) -> tuple[int, int, int]:
    """Read ``HEADS,KV_HEADS,SIZE``.

    Raises:
        ValueError: It is none.
    """
    heads, kv_heads, size = (int(part) for part in text.split(","))
    if min(heads, kv_heads, size) < 1 or heads % kv_heads or size % 2:
        raise ValueError(text)
    return heads, kv_heads, size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heads", action="append", metavar="HEADS,KV_HEADS,SIZE")
    parser.add_argument("--append", type=Path, help="add the result to this Markdown file")
    options = parser.parse_args()
    try:
        shapes = [shape_of(text) for text in options.heads or ()] or list(MODELS)
    except ValueError:
        parser.error("--heads: three numbers, heads a multiple of key/value heads, an even size")
    where = machine()
    results = {
        shape: [{name: times(shape, way, options.threads) for name, way in WAYS.items()} for _ in range(options.rounds)]
        for shape in shapes
    }
    import onnxruntime

    lines = [
        *table(results),
        "",
        f"Microseconds a node, {options.threads} threads, medians of {options.rounds} rounds; ratios within a round. "
        f"{where}; onnxruntime {onnxruntime.__version__}.",
    ]
    publish("\n".join(lines) + "\n", options.append)


if __name__ == "__main__":
    main()
