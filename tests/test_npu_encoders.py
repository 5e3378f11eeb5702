"""Encoders through the NPU profiles, on the CPU: near their float graph, integers throughout, sizes as predicted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from compress import checks, pipeline
from compress.errors import CompressError, UsageError
from compress.planning import make_plan
from compress.profile import load_profile
from compress.progress import Stages
from compress.source import open_checkpoint
from compress.validation.encoded import Batch
from compress.validation.encoding import Encoder
from tiny_models import POSITIONS, VOCABULARY

LENGTH = 32
CHANGES = (f"graph.static_length={LENGTH}", "targets=[]", "quantize.algorithm=rtn")
#: 16 bits give 0.9997 and more, 8 bits 0.9988.
LIMIT = 0.9994
NAMES = ("bert:embedding", "distilbert:question-answering", "albert:text-classification", "electra:fill-mask")


def batch(lengths: tuple[int, ...]) -> Batch:
    width = max(lengths)
    real = np.arange(width) < np.array(lengths)[:, None]
    ids = np.where(real, np.random.default_rng(0).integers(5, VOCABULARY, real.shape), 0)
    return Batch(np.arange(len(lengths)), ids, real.astype(np.int64), np.zeros_like(ids), real)


def answers(model: Path, texts: Batch) -> dict[str, np.ndarray]:
    encoder = Encoder(ort.InferenceSession(str(model), providers=["CPUExecutionProvider"]))
    return dict(zip(encoder.outputs, encoder.run(texts, encoder.outputs), strict=True))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_near_those_of_the_float_graph(name: str, tiny_artifact: Callable[..., Path]) -> None:
    """Texts of several lengths in one batch, which the static graph is given one by one."""
    texts = batch((19, 7, 2))
    wanted = answers(tiny_artifact(name, "float") / "model.onnx", texts)
    found = answers(tiny_artifact(name, "npu-qnn-int8", *CHANGES) / "model.onnx", texts)
    assert set(found) == set(wanted)
    for output, array in wanted.items():
        assert found[output].shape == array.shape
        rows = texts.keep if array.shape[:2] == texts.ids.shape else slice(None)
        assert cosine(found[output][rows], array[rows]) > LIMIT, output


def test_eight_bits_of_activations_lose_more(tiny_artifact: Callable[..., Path]) -> None:
    """Negative control: the limit above tells 16 bits from 8."""
    texts = batch((19, 7, 2))
    wanted = answers(tiny_artifact("bert:embedding", "float") / "model.onnx", texts)["sentence_embedding"]
    eight = tiny_artifact("bert:embedding", "npu-qnn-int8", *CHANGES, "quantize.activation_bits=8")
    assert cosine(answers(eight / "model.onnx", texts)["sentence_embedding"], wanted) < LIMIT


def test_every_tensor_is_of_integers(tiny_artifact: Callable[..., Path]) -> None:
    model = ir.load(tiny_artifact("bert:embedding", "npu-qnn-int8", *CHANGES) / "model.onnx")
    assert model.opset_imports == {"": 21}
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for value in node.inputs:
            if value is None or value.dtype not in (ir.DataType.FLOAT, None) or value.is_graph_input():
                continue
            made = value.producer()
            if made is not None and made.op_type != "Cast":
                assert made.op_type == "DequantizeLinear", f"{node.name} reads {value.name}"


def test_a_sequence_longer_than_the_graph_is_an_error(tiny_artifact: Callable[..., Path]) -> None:
    model = tiny_artifact("bert:embedding", "npu-qnn-int8", *CHANGES) / "model.onnx"
    with pytest.raises(CompressError, match="longer than the graph's 32"):
        answers(model, batch((LENGTH + 1,)))


def test_threads_change_no_byte(
    tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path], fast_skeletons: None, tmp_path: Path
) -> None:
    pipeline.export(
        pipeline.ModelReference(str(tiny_model("bert:embedding"))),
        load_profile("npu-qnn-int8", CHANGES),
        tmp_path / "two",
        pipeline.ExportOptions(validate=False, threads=2),
        Stages(),
    )
    one = tiny_artifact("bert:embedding", "npu-qnn-int8", *CHANGES)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "two" / name).read_bytes() == (one / name).read_bytes(), name


@pytest.mark.parametrize("name", ["bert:embedding", "bert:fill-mask"])
def test_predicted_bytes_come_true(
    name: str, tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path]
) -> None:
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        plan = make_plan(pipeline.describe(checkpoint), load_profile("npu-qnn-int8", CHANGES), checkpoint)
    artifact = tiny_artifact(name, "npu-qnn-int8", *CHANGES)
    graph, data = ((artifact / file).stat().st_size for file in ("model.onnx", "model.onnx.data"))
    assert data == plan.data_bytes
    assert plan.graph_bytes == pytest.approx(graph, rel=0.07)


def test_a_graph_longer_than_the_positions_is_refused(tiny_model: Callable[[str], Path]) -> None:
    profile = load_profile("npu-qnn-int8", (f"graph.static_length={POSITIONS + 1}",))
    with open_checkpoint(str(tiny_model("bert:embedding"))) as checkpoint:
        plan = make_plan(pipeline.describe(checkpoint), profile, checkpoint)
    with pytest.raises(UsageError, match=f"table of {POSITIONS} positions"):
        checks.check_plan(plan, profile)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("quantize.activations=dynamic", "activation_bits needs fixed ranges"),
        ('graph.fusions=["attention"]', "standard operators"),
        ("graph.static_length=4", "greater than or equal to 8"),
    ],
)
def test_profiles_that_cannot_be_are_refused(override: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        load_profile("npu-qnn-int8", (override,))
