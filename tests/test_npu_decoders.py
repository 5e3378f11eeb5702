"""Decoders through ``npu-qnn-int8``, on the CPU: near the source, integers where they should be, run by the worker."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from compress import checks, pipeline
from compress.errors import CompressError, UsageError
from compress.generation import stream
from compress.planning import make_plan
from compress.profile import load_profile
from compress.progress import Stages
from compress.source import open_checkpoint
from compress.validation.artifact import open_artifact
from compress.validation.protocol import Json, run_worker
from compress.validation.static_decoding import DECODE_NAME
from static_sessions import divergence, open_static, source_logits
from tiny_models import VOCABULARY

NEW, SLOTS, LENGTH = 16, 48, 40
CHANGES = (
    f"graph.static_length={NEW}",
    f"graph.cache_length={SLOTS}",
    "targets=[]",
    "quantize.algorithm=rtn",
    "validation.tokens=32",
    "validation.window=32",
    "validation.prompt_tokens=16",
    "validation.new_tokens=16",
)
#: Observed: 0.0007, nearly all of it the weights; 8 bits of activations: 0.02.
LIMIT = 0.0015

Artifact = Callable[..., Path]


def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCABULARY, (1, LENGTH))


def test_logits_are_near_the_source(tiny_artifact: Artifact, tiny_model: Callable[[str], Path]) -> None:
    found = open_static(tiny_artifact("llama", "npu-qnn-int8", *CHANGES)).feed(ids())[0]
    assert divergence(source_logits(tiny_model("llama"), ids()), found) < LIMIT


def test_eight_bits_of_activations_lose_more(tiny_artifact: Artifact, tiny_model: Callable[[str], Path]) -> None:
    """Negative control: the limit tells 16 bits from 8."""
    eight = tiny_artifact("llama", "npu-qnn-int8", *CHANGES, "quantize.activation_bits=8")
    assert divergence(source_logits(tiny_model("llama"), ids()), open_static(eight).feed(ids())[0]) > 2 * LIMIT


def test_going_through_the_cache_changes_next_to_nothing(tiny_artifact: Artifact) -> None:
    decoder = open_static(tiny_artifact("llama", "npu-qnn-int8", *CHANGES))
    at_once = decoder.feed(ids())[0]
    decoder.reset()
    decoder.feed(ids()[:, :20])
    one_by_one = np.concatenate([decoder.feed(ids()[:, at : at + 1])[0] for at in range(20, LENGTH)])
    assert divergence(at_once[20:], one_by_one) < 1e-5


def test_products_are_of_integers_and_residuals_are_not(tiny_artifact: Artifact) -> None:
    artifact = tiny_artifact("llama", "npu-qnn-int8", *CHANGES)
    for name in ("model.onnx", DECODE_NAME):
        graph = ir.load(artifact / name).graph
        makers = {node: [_made_by(value) for value in node.inputs] for node in graph}
        products = [kinds for node, kinds in makers.items() if node.op_type == "MatMul"]
        assert len(products) == 3 * (4 + 2) + 1
        assert all(kinds == ["DequantizeLinear"] * 2 for kinds in products)
        norms = [kinds[0] for node, kinds in makers.items() if node.op_type == "RMSNormalization"]
        assert norms == ["Mul"] + ["Add"] * 6


def _made_by(value: ir.Value | None) -> str | None:
    made = value.producer() if value is not None else None
    return None if made is None else made.op_type


def test_threads_change_no_byte(
    tiny_model: Callable[[str], Path], tiny_artifact: Artifact, fast_skeletons: None, tmp_path: Path
) -> None:
    pipeline.export(
        pipeline.ModelReference(str(tiny_model("llama"))),
        load_profile("npu-qnn-int8", CHANGES),
        tmp_path / "two",
        pipeline.ExportOptions(validate=False, threads=2),
        Stages(),
    )
    one = tiny_artifact("llama", "npu-qnn-int8", *CHANGES)
    for name in ("model.onnx", DECODE_NAME, "model.onnx.data"):
        assert (tmp_path / "two" / name).read_bytes() == (one / name).read_bytes(), name


def ask(artifact: Path, place: Path, **more: Any) -> Json:
    np.save(place / "windows.npy", ids())
    jobs = [
        {"kind": "logits", "windows": str(place / "windows.npy"), "output": str(place / "logits.npy")},
        {
            "kind": "cached_logits",
            "windows": str(place / "windows.npy"),
            "output": str(place / "cached.npy"),
            "prefill": 30,
        },
        {"kind": "greedy", "prompt": ids()[0, :20].tolist(), "new_tokens": 4},
    ]
    request = {"model": str(artifact / "model.onnx"), "provider": "cpu", "threads": 1, "jobs": jobs, **more}
    return run_worker("worker", request, timeout=120)


def test_the_worker_runs_both_graphs(tiny_artifact: Artifact, tmp_path: Path) -> None:
    artifact = tiny_artifact("llama", "npu-qnn-int8", *CHANGES)
    answer = ask(artifact, tmp_path)
    decoder = open_static(artifact)
    wanted = decoder.feed(ids())[0]
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), wanted, atol=1e-5)
    assert divergence(wanted[30:], np.load(tmp_path / "cached.npy")) < 1e-5
    decoder.reset()
    first = int(decoder.feed(ids()[:, :20])[0, -1].argmax())
    assert answer["results"][2]["tokens"][0] == first
    # Nodes of both graphs, some of which ONNX Runtime writes out.
    nodes = [len(list(ir.load(artifact / name).graph)) for name in ("model.onnx", DECODE_NAME)]
    assert answer["placement"]["nodes_total"] >= sum(nodes)
    assert answer["placement"]["fallback_nodes"] == []


def test_a_missing_decode_graph_is_told(tiny_artifact: Artifact, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(tiny_artifact("llama", "npu-qnn-int8", *CHANGES), alone)
    (alone / DECODE_NAME).unlink()
    with pytest.raises(CompressError, match="needs decode.onnx beside model.onnx"):
        ask(alone, tmp_path)


def test_the_artifact_counts_both_graphs(tiny_artifact: Artifact) -> None:
    artifact = tiny_artifact("llama", "npu-qnn-int8", *CHANGES)
    files = ("model.onnx", DECODE_NAME, "model.onnx.data")
    assert open_artifact(artifact).bytes == sum((artifact / name).stat().st_size for name in files)


def test_a_text_is_generated(tiny_artifact: Artifact) -> None:
    """To the end of the cache, and no further."""
    artifact = tiny_artifact("llama", "npu-qnn-int8", *CHANGES)
    pieces = list(stream(artifact, "a function", new_tokens=1000, chat=False, threads=1))
    assert pieces
    with pytest.raises(CompressError, match=f"the model's context {SLOTS}"):
        list(stream(artifact, "a function " * 40, new_tokens=4, chat=False, threads=1))


def test_a_cache_too_short_for_validation_is_refused(tiny_model: Callable[[str], Path]) -> None:
    profile = load_profile("npu-qnn-int8", [*CHANGES, f"validation.prompt_tokens={SLOTS}"])
    with open_checkpoint(str(tiny_model("llama"))) as checkpoint:
        plan = make_plan(pipeline.describe(checkpoint), profile, checkpoint)
    with pytest.raises(UsageError, match=f"runs {SLOTS + 16} tokens, a cache of {SLOTS} does not"):
        checks.check_plan(plan, profile)


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_predicted_bytes_come_true(name: str, tiny_model: Callable[[str], Path], tiny_artifact: Artifact) -> None:
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        plan = make_plan(pipeline.describe(checkpoint), load_profile("npu-qnn-int8", CHANGES), checkpoint)
    artifact = tiny_artifact(name, "npu-qnn-int8", *CHANGES)
    prefill, decode, data = (
        (artifact / file).stat().st_size for file in ("model.onnx", DECODE_NAME, "model.onnx.data")
    )
    assert data == plan.data_bytes
    assert plan.graph_bytes == pytest.approx(prefill + decode, rel=0.05)
