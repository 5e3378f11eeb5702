"""Context binaries of a decoder: both graphs compiled, packaged by an export, and run by the worker as a pair."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from compress.errors import CompressError
from compress.package import qnn_context, qnn_samples
from compress.validation.protocol import Json, run_worker
from static_sessions import open_static
from tiny_models import VOCABULARY

NEW, SLOTS = 16, 48
CHANGES = (
    f"graph.static_length={NEW}",
    f"graph.cache_length={SLOTS}",
    "quantize.algorithm=rtn",
    "validation.tokens=32",
    "validation.window=32",
    "validation.prompt_tokens=16",
    "validation.new_tokens=16",
)
needs_qnn = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed here"
)


def shapes(artifact: Path) -> tuple[dict[str, tuple[int, ...]], ...]:
    return tuple(qnn_samples.input_shapes(artifact / name) for name in ("model.onnx", "decode.onnx"))


def test_samples_are_behind_a_cache_that_was_filled(tiny_artifact: Callable[..., Path]) -> None:
    """What a caller of the graphs would feed, of which the samples know nothing."""
    artifact = tiny_artifact("llama", "npu-qnn-int8", *CHANGES, "targets=[]")
    decoder = open_static(artifact)
    session = decoder._sessions[0]
    names = [output.name for output in session.get_outputs()]
    begun: list[dict[str, np.ndarray]] = []

    def run(samples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        begun.append(samples)
        found = session.run(names, {name: array[0] for name, array in samples.items()})
        return {name: array[None] for name, array in zip(names, found, strict=True)}

    several, one = qnn_samples.decoder_samples(*shapes(artifact), VOCABULARY, run)
    tokens = [sample["input_ids"][0, :, :count] for sample, count in ((begun[0], NEW), (several, NEW // 2))]
    assert several["attention_mask"].sum() == NEW + NEW // 2
    assert one["attention_mask"].sum() == NEW + 1 and one["position_ids"].item() == NEW
    decoder.feed(tokens[0])
    wanted = decoder.feed(tokens[1])
    np.testing.assert_array_equal(run(several)["logits"][0][:, : NEW // 2], wanted)
    decoder.reset()
    decoder.feed(tokens[0])
    wanted = decoder.feed(tokens[1][:, :1])
    found = decoder._sessions[1].run(["logits"], {name: array[0] for name, array in one.items()})[0]
    np.testing.assert_array_equal(found, wanted)


def ask(model: Path) -> Json:
    request = {
        "model": str(model),
        "provider": "qnn",
        "provider_options": {"soc_model": "SM8750"},
        "session_options": {"session.disable_cpu_ep_fallback": "1"},
        "threads": 1,
        "jobs": [{"kind": "greedy", "prompt": list(range(5, 25)), "new_tokens": 4}],
    }
    return run_worker("worker", request, timeout=120)


@needs_qnn
def test_an_export_packages_both_graphs_and_the_worker_runs_them(
    tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    artifact = tiny_artifact("llama", "npu-qnn-int8", *CHANGES)
    folder = artifact / "qnn" / "SM8750"
    names = ("decode_ctx.onnx", "decode_ctx_qnn.bin", "model_ctx.onnx", "model_ctx_qnn.bin")
    assert sorted(path.name for path in folder.iterdir()) == ["context.json", *names]
    record = json.loads((folder / "context.json").read_text())
    assert [graph["name"] for graph in record["graphs"]] == ["model.onnx", "decode.onnx"]
    assert record["compared"] == {"outputs": "equal", "samples": 2}
    listed = {item["name"] for item in json.loads((artifact / "manifest.json").read_text())["files"]}
    assert {f"qnn/SM8750/{name}" for name in names} <= listed
    for name in ("model_ctx.onnx", "decode_ctx.onnx"):
        (node,) = onnx.load(folder / name, load_external_data=False).graph.node
        assert node.op_type == "EPContext"
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    compiled, plain = ask(moved / "model_ctx.onnx"), ask(artifact / "model.onnx")
    assert compiled["results"] == plain["results"]
    assert compiled["placement"]["fallback_nodes"] == [] and compiled["placement"]["nodes_total"] == 2
    (moved / "decode_ctx.onnx").unlink()
    with pytest.raises(CompressError, match="needs decode_ctx.onnx beside model_ctx.onnx"):
        ask(moved / "model_ctx.onnx")


@needs_qnn
def test_a_decode_graph_that_answers_something_else_leaves_nothing(
    tiny_artifact: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the second graph is compared too, and what the first one left goes with it."""
    artifact = tiny_artifact("llama", "npu-qnn-int8", *CHANGES, "targets=[]")
    runtime = qnn_context.providers.load("qnn").runtime()
    model = artifact / "model.onnx"
    several, one = qnn_samples.decoder_samples(
        *shapes(artifact),
        VOCABULARY,
        lambda samples: qnn_context.run_on_cpu(model, "SM8750", samples, runtime=runtime),
    )
    graphs = [qnn_context.Graph(model, several), qnn_context.Graph(artifact / "decode.onnx", one)]
    compare, seen = qnn_context._compare, []

    def spoilt(own: Path, back: Path, soc: str) -> None:
        seen.append(back)
        if len(seen) == 2:
            with np.load(back) as stored:
                wrong = {name: stored[name] for name in stored.files}
            wrong["present.1.key"][..., 0] += np.float32(1e-3)
            np.savez(back, **wrong)
        compare(own, back, soc)

    monkeypatch.setattr(qnn_context, "_compare", spoilt)
    with pytest.raises(CompressError, match=r"present\.1\.key differs by"):
        qnn_context.compile_context(graphs, tmp_path / "qnn", "SM8750")
    assert len(seen) == 2 and list((tmp_path / "qnn").iterdir()) == []
