"""Context binaries: what is written, what is refused, and on the simulator that they answer what the graph answers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from compress.errors import CompressError, ProviderError, UsageError
from compress.package import qnn_context, qnn_samples
from compress.package.qnn_context import Graph
from compress.package.qnn_metadata import add_metadata
from compress.validation.protocol import run_worker
from compress.validation.worker import placement
from tiny_models import VOCABULARY

#: Not 16: HTP's simulator (QNN 2.51) gives wrong products of 16 rows after a LayerNormalization of 64 columns.
LENGTH = 32
STATIC = (
    f"graph.static_length={LENGTH}",
    f"validation.max_length={LENGTH}",
    f"validation.lengths=[{LENGTH}]",
    "quantize.algorithm=rtn",
    "targets=[]",
)
needs_qnn = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_qnn") is None, reason="onnxruntime-qnn is not installed here"
)


@pytest.fixture
def artifact(tiny_artifact: Callable[..., Path]) -> Path:
    return tiny_artifact("bert:embedding", "npu-qnn-int8", *STATIC)


def samples(model: Path) -> dict[str, np.ndarray]:
    return qnn_samples.encoder_samples(qnn_samples.input_shapes(model), VOCABULARY)


# ------------------------------------------------------------------------------------------------------ without QNN


def test_metadata_is_appended_to_a_graph_file(artifact: Path, tmp_path: Path) -> None:
    """Read back by onnx itself; nothing else of the graph changes."""
    path = tmp_path / "model.onnx"
    path.write_bytes((artifact / "model.onnx").read_bytes())
    before = onnx.load(path, load_external_data=False)
    add_metadata(path, "soc_model", "SM8750")
    add_metadata(path, "note", "x" * 300)  # a length of two bytes
    after = onnx.load(path, load_external_data=False)
    assert {item.key: item.value for item in after.metadata_props} == {"soc_model": "SM8750", "note": "x" * 300}
    del after.metadata_props[:]
    assert after == before


def test_samples_are_whole_and_half_padded(artifact: Path) -> None:
    found = samples(artifact / "model.onnx")
    assert set(found) == {"input_ids", "attention_mask", "token_type_ids"}
    assert found["attention_mask"].shape == (2, 1, LENGTH)
    assert found["attention_mask"].sum(axis=(1, 2)).tolist() == [LENGTH, LENGTH // 2]
    assert found["input_ids"].min() >= 0 and found["input_ids"].max() < VOCABULARY


def test_a_graph_of_free_dimensions_is_refused(tiny_artifact: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="free dimension"):
        qnn_samples.input_shapes(tiny_artifact("bert:embedding", "float") / "model.onnx")


def test_other_answers_are_an_error(tmp_path: Path) -> None:
    own, same, other = (tmp_path / f"{name}.npz" for name in ("own", "same", "other"))
    array = np.ones((2, 3), np.float32)
    np.savez(own, y=array)
    np.savez(same, y=array)
    np.savez(other, y=array + np.float32(1e-6))
    qnn_context._compare(own, same, "SM8750")
    with pytest.raises(CompressError, match="y differs by"):
        qnn_context._compare(own, other, "SM8750")


def test_a_wrong_kernel_is_told_from_other_rounding(tmp_path: Path) -> None:
    """Rows in another order, which is what QNN 2.51 makes of 16 rows; and the last bits of 16."""
    cpu, near, wrong = (tmp_path / f"{name}.npz" for name in ("cpu", "near", "wrong"))
    array = np.random.default_rng(0).normal(size=(1, 16, 64)).astype(np.float32)
    np.savez(cpu, y=array)
    np.savez(near, y=np.round(array * 1000) / 1000)
    np.savez(wrong, y=array[:, ::-1])
    qnn_context._agree(cpu, near, tmp_path)
    with pytest.raises(ProviderError, match="HTP computes something else"):
        qnn_context._agree(cpu, wrong, tmp_path)


def test_an_unknown_chip_is_refused_before_work(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="SM9999"):
        qnn_context.compile_context([Graph(artifact / "model.onnx", {})], tmp_path / "qnn", "SM9999")
    assert not (tmp_path / "qnn").exists()


# ---------------------------------------------------------------------------------------------------- on the simulator


@needs_qnn
def test_a_context_binary_answers_what_the_graph_answers(artifact: Path, tmp_path: Path) -> None:
    model = artifact / "model.onnx"
    made = qnn_context.compile_context([Graph(model, samples(model))], tmp_path / "qnn", "SM8750")
    folder = tmp_path / "qnn" / "SM8750"
    assert sorted(path.name for path in folder.iterdir()) == ["context.json", "model_ctx.onnx", "model_ctx_qnn.bin"]
    assert made.models == (folder / "model_ctx.onnx",)
    assert made.nbytes == sum(path.stat().st_size for path in folder.iterdir())
    record = json.loads((folder / "context.json").read_text())
    assert (record["soc_model"], record["compared"]) == ("SM8750", {"outputs": "equal", "samples": 2})
    (node,) = onnx.load(made.models[0], load_external_data=False).graph.node
    names = {item.name: item.s for item in node.attribute}
    assert node.op_type == "EPContext"
    assert names["ep_cache_context"] == b"model_ctx_qnn.bin"  # relative: the folder may be moved
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    request = {"model": str(moved / "model_ctx.onnx"), "provider": "qnn", "threads": 1, "jobs": []}
    run_worker("worker", {**request, "provider_options": {"soc_model": "SM8750"}}, timeout=120)
    with pytest.raises(ProviderError, match="compiled for SM8750, asked to run on SM8650"):
        run_worker("worker", {**request, "provider_options": {"soc_model": "SM8650"}}, timeout=120)
    with pytest.raises(CompressError, match="for this chip already"):
        (tmp_path / "qnn" / "SM8750").mkdir()
        qnn_context.compile_context([Graph(model, {})], tmp_path / "qnn", "SM8750")


@needs_qnn
def test_a_graph_that_htp_refuses_leaves_nothing(tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_artifact("bert:embedding", "float") / "model.onnx"
    with pytest.raises(ProviderError, match="HTP cannot compile"):
        qnn_context.compile_context([Graph(model, {"input_ids": np.zeros((1, 1))})], tmp_path / "qnn", "SM8750")
    assert list((tmp_path / "qnn").iterdir()) == []


@needs_qnn
def test_every_node_runs_on_htp(artifact: Path) -> None:
    """The placement of a run that may fall back: it does not."""
    from compress.providers.qnn import PROVIDER

    model = artifact / "model.onnx"
    options = {"soc_model": "SM8750", "offload_graph_io_quantization": "0"}
    session = PROVIDER.session(model, {}, 1, options)
    found = placement(session, PROVIDER)
    assert found["fallback_nodes"] == []
    assert found["nodes_total"] > 100
    given = {name: array[1] for name, array in samples(model).items()}
    import onnxruntime as ort

    cpu = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    (here,), (there,) = (part.run(["sentence_embedding"], given)[0] for part in (cpu, session))
    assert here @ there / np.linalg.norm(here) / np.linalg.norm(there) > 0.9999
