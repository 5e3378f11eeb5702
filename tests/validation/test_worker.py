"""The artifact worker against transformers: logits, cached decoding, greedy tokens, speed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch

from compress.errors import CompressError
from compress.validation.logits import LogitsFile
from compress.validation.protocol import run_worker

FAMILIES = ("llama", "mistral", "phi3", "gpt2")
PREFILL = 15


def run(model: Path, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    request = {"model": str(model), "provider": "cpu", "session_options": {}, "threads": 1, "jobs": jobs}
    return run_worker("worker", request, timeout=60)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_job_against_transformers(
    family: str,
    tiny_directories: dict[str, Path],
    float_graphs: dict[str, Path],
    windows: npt.NDArray[np.int64],
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(tiny_directories[family]).eval()
    np.save(tmp_path / "w.npy", windows)
    prompt, count = [5, 9, 11, 200], 12
    jobs: list[dict[str, Any]] = [
        {"kind": "logits", "windows": str(tmp_path / "w.npy"), "output": str(tmp_path / "all.npy")},
        {
            "kind": "cached_logits",
            "windows": str(tmp_path / "w.npy"),
            "output": str(tmp_path / "cached.npy"),
            "prefill": PREFILL,
        },
        {"kind": "greedy", "prompt": prompt, "new_tokens": count},
        {"kind": "speed", "vocab_size": 257, "prompt_tokens": 8, "new_tokens": 3, "repeats": 2},
    ]
    response = run(float_graphs[family], jobs)
    with torch.no_grad():
        expected = source(torch.from_numpy(windows)).logits.numpy()
        sequence = source.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    np.testing.assert_allclose(np.load(tmp_path / "all.npy"), expected.reshape(-1, 257), rtol=0, atol=1e-4)
    tail = expected[:, PREFILL:].reshape(-1, 257)
    np.testing.assert_allclose(np.load(tmp_path / "cached.npy"), tail, rtol=0, atol=1e-4)
    assert np.abs(tail[1:] - tail[:-1]).max() > 0.1  # a shift by one position would be seen
    assert response["results"][2]["tokens"] == sequence[0, len(prompt) :].tolist()
    speed = response["results"][3]
    assert len(speed["prefill_seconds"]) == 2 and [len(steps) for steps in speed["decode_seconds"]] == [3, 3]
    placed = response["placement"]
    assert placed["nodes_total"] == placed["nodes_on_provider"] > 20 and placed["fallback_nodes"] == []
    assert response["load_seconds"] > 0 and response["peak_rss_bytes"] > 10 << 20
    assert response["evidence"] == "measured" and "onnxruntime" in response["versions"]


def test_logits_to_keep_is_used_where_the_graph_has_it(
    float_graphs: dict[str, Path], windows: npt.NDArray[np.int64], tmp_path: Path
) -> None:
    """A graph that keeps the last k positions gives all for 0 and one for 1, and the jobs ask for what they need."""
    model = ir.load(float_graphs["llama"])
    graph = model.graph
    keep = ir.Value(name="logits_to_keep", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    keep.const_value = ir.tensor(np.zeros(1, np.int64), name="logits_to_keep")
    graph.inputs.append(keep)
    graph.register_initializer(keep)
    logits = graph.outputs[0]
    axes, end = (
        ir.Value(name=name, const_value=ir.tensor(np.array([value]), name=name))
        for name, value in (("keep_axis", 1), ("keep_end", 1 << 60))
    )
    graph.register_initializer(axes)
    graph.register_initializer(end)
    negative = ir.Node("", "Neg", [keep], name="keep_negative")
    trimmed = ir.Node("", "Slice", [logits, negative.outputs[0], end, axes], name="keep_slice")
    logits.name, trimmed.outputs[0].name = "logits_all", "logits"
    trimmed.outputs[0].type, trimmed.outputs[0].shape = logits.type, ir.Shape(["batch", "kept", 257])
    graph.extend([negative, trimmed])
    graph.outputs[0] = trimmed.outputs[0]
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    shutil.copy(float_graphs["llama"].with_name("model.onnx.data"), tmp_path)
    np.save(tmp_path / "w.npy", windows)
    jobs: list[dict[str, Any]] = [
        {"kind": "logits", "windows": str(tmp_path / "w.npy"), "output": str(tmp_path / "all.npy")},
        {"kind": "greedy", "prompt": [5, 9, 11], "new_tokens": 4},
    ]
    results = run(path, jobs)["results"]
    plain = run(float_graphs["llama"], [{**jobs[0], "output": str(tmp_path / "plain.npy")}, jobs[1]])["results"]
    assert results == plain
    np.testing.assert_array_equal(np.load(tmp_path / "all.npy"), np.load(tmp_path / "plain.npy"))


def test_a_graph_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    node = ir.Node("", "Add", [x, x], name="twice", version=17)
    y = node.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([2])
    ir.save(ir.Model(ir.Graph([x], [y], nodes=[node], opset_imports={"": 17}), ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(CompressError, match="not a decoder") as caught:
        run(tmp_path / "m.onnx", [{"kind": "greedy", "prompt": [1], "new_tokens": 1}])
    assert "unknown inputs ['x']" in str(caught.value.where)
    assert run(tmp_path / "m.onnx", [])["results"] == []  # placement alone asks for no decoder


def test_a_missing_model_and_an_unknown_job_are_named(tmp_path: Path, float_graphs: dict[str, Path]) -> None:
    with pytest.raises(CompressError, match="no such model file"):
        run(tmp_path / "absent.onnx", [])
    with pytest.raises(CompressError, match="unknown job 'dance'"):
        run(float_graphs["llama"], [{"kind": "dance"}])


def test_a_logits_file_is_read_by_slices(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    np.save(tmp_path / "l.npy", values)
    np.testing.assert_array_equal(LogitsFile(tmp_path / "l.npy")[2:7], values[2:7])
    chosen = np.array([8, 0, 3])
    np.testing.assert_array_equal(LogitsFile(tmp_path / "l.npy", chosen)[1:3], values[chosen][1:3])
    with (tmp_path / "l.npy").open("rb+") as stream:
        stream.truncate(200)
    with pytest.raises(CompressError, match="end too early"):
        LogitsFile(tmp_path / "l.npy")[0:9]
    np.save(tmp_path / "i.npy", values.astype(np.float64))
    with pytest.raises(CompressError, match="not logits"):
        LogitsFile(tmp_path / "i.npy")
