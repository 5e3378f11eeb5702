"""Whole exports of x86-int8: fixed ranges in standard operators, the user's own text, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from planted import Built, answers, build, difference, in_process, plant, texts_of, torch_model

from compress import pipeline
from compress.calibrate.encoder import Calibrated
from compress.calibrate.ranges import choose_range, scale_and_zero_point
from compress.errors import CompressError, UsageError
from compress.planning import INPUT_RANGE
from compress.profile import load_profile
from compress.progress import Stages
from plain_encoder import PlainEncoder, example
from tiny_models import VOCABULARY, Skeletons

BATCH = ((13, 9, -20, 4), 33)
STATIC = ("quantize.activations=static", "quantize.max_layer_loss=1e9")


@pytest.fixture(scope="module")
def planted_bert(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tiny_model("bert:embedding"), tmp_path_factory.mktemp("planted") / "bert", norm=4.0, shift=3.0)


# ------------------------------------------------------------------------------------------------------ fixed ranges


@pytest.fixture(scope="module", params=["percentile", "entropy", "minmax"])
def static(
    request: pytest.FixtureRequest, planted_bert: Path, skeletons: Skeletons, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Built]:
    directory = tmp_path_factory.mktemp("static")
    overrides = (*STATIC, f"quantize.input_range={request.param}")
    return request.param, build(planted_bert, directory, skeletons, "x86-int8", *overrides)


def test_products_are_written_in_standard_operators(static: tuple[str, Built]) -> None:
    """``Q -> DQ -> MatMul <- DQ``: what providers with fixed ranges fuse to their own."""
    built = static[1]
    model = onnx.load(built.directory / "model.onnx")
    onnx.checker.check_model(str(built.directory / "model.onnx"))
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    made = {output: node for node in model.graph.node for output in node.output}
    linears = built.before.structure.linears
    products = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in made]
    products = [node for node in products if made[node.input[1]].op_type == "DequantizeLinear"]
    kinds = [node.op_type for node in model.graph.node]
    assert len(products) == len(linears) == 12
    assert kinds.count("QuantizeLinear") == 12 and kinds.count("DequantizeLinear") == 24
    assert not {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QAttention"} & set(kinds)
    for product, linear in zip(products, linears, strict=True):
        rounded, weight = (made[name] for name in product.input)
        quantize = made[rounded.input[0]]
        assert (rounded.op_type, quantize.op_type, weight.op_type) == (
            "DequantizeLinear",
            "QuantizeLinear",
            "DequantizeLinear",
        )
        assert rounded.input[1:] == quantize.input[1:] == [f"{linear.name}.{part}" for part in INPUT_RANGE]
        scale, zero = (stored[name] for name in quantize.input[1:])
        assert scale.shape == zero.shape == () and scale.dtype == np.float32 and zero.dtype == np.uint8 and scale > 0
        assert [attribute.i for attribute in weight.attribute if attribute.name == "axis"] == [1]
        codes = stored[weight.input[0]]
        planned = built.found.plan.by_name[linear.name]
        assert codes.dtype == np.int8 and codes.shape == (planned.columns, planned.rows)


def test_fixed_ranges_lose_little(static: tuple[str, Built], planted_bert: Path) -> None:
    assert difference(static[1].directory, answers(torch_model(planted_bert), *BATCH), *BATCH) < 0.1
    cosine = cosines(static[1].directory, planted_bert)
    assert cosine.mean() > 0.9998 and cosine.min() > 0.9995, (static[0], cosine)


def cosines(directory: Path, model: Path) -> np.ndarray:
    wanted = answers(torch_model(model), *BATCH)["sentence_embedding"]
    found = PlainEncoder(directory)(*example(*BATCH, vocabulary=VOCABULARY))["sentence_embedding"]
    return np.sum(found * wanted, axis=1)


def test_wrong_ranges_lose_much(planted_bert: Path, skeletons: Skeletons, tmp_path: Path) -> None:
    """The control: each range cut to a quarter."""

    def quarter(found: Calibrated) -> Calibrated:
        constants: dict[str, Any] = dict(found.smoothing.constants)
        for name in constants:
            if name.endswith(INPUT_RANGE[0]):
                constants[name] = constants[name] * np.float32(0.25)
        return replace(found, smoothing=replace(found.smoothing, constants=constants))

    built = build(planted_bert, tmp_path, skeletons, "x86-int8", *STATIC, change=quarter)
    assert cosines(built.directory, planted_bert).mean() < 0.99


@pytest.fixture(scope="module")
def multiplied(
    planted_bert: Path, skeletons: Skeletons, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """Return what every linear reads on the calibration texts, taken from the running smoothed float artifact."""
    directory = tmp_path_factory.mktemp("float")
    smooth = build(planted_bert, directory, skeletons, "float", "quantize.smoothing=calibrated", "graph.fusions=[]")
    model = onnx.load(smooth.directory / "model.onnx")
    names = {}
    for linear in smooth.before.structure.linears:
        (product,) = [node for node in model.graph.node if f"{linear.name}.weight" in node.input]
        names[linear.name] = product.input[0]
    for name in sorted(set(names.values())):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    encoder, texts = PlainEncoder(model.SerializeToString()), texts_of(planted_bert)
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for start, length in zip(texts.starts, texts.lengths, strict=True):
        ids, types = (array[None, start : start + length] for array in (texts.ids, texts.types))
        found = encoder(ids, np.ones_like(ids), types)
        for name, value in names.items():
            seen[name].append(found[value].reshape(-1))
    return {name: np.concatenate(parts) for name, parts in seen.items()}


def test_ranges_are_those_of_what_the_graph_multiplies(
    static: tuple[str, Built], multiplied: dict[str, np.ndarray]
) -> None:
    """The smoothed values, histogrammed here."""
    method, built = static
    assert len(multiplied) == 12
    for name, values in multiplied.items():
        low, high = float(values.min()), float(values.max())
        wanted = choose_range(np.histogram(values, 2048, (low, high))[0], low, high, method)  # type: ignore[arg-type]
        scale, zero = scale_and_zero_point(*wanted)
        stored = built.found.smoothing.constants
        assert stored[f"{name}.{INPUT_RANGE[0]}"] == pytest.approx(scale, rel=0.02), name
        assert abs(int(stored[f"{name}.{INPUT_RANGE[1]}"]) - int(zero)) <= 2, name


def test_smoothing_is_worth_it(planted_bert: Path, skeletons: Skeletons, tmp_path: Path) -> None:
    """What it is all for: with ranges found at run time, a fifth of the loss at most."""
    kept = "quantize.max_layer_loss=1e9"
    smooth = build(planted_bert, tmp_path / "with", skeletons, "x86-int8", kept)
    plain = build(planted_bert, tmp_path / "without", skeletons, "x86-int8", kept, "quantize.smoothing=none")
    lost = [1 - float(cosines(built.directory, planted_bert).mean()) for built in (smooth, plain)]
    assert lost[0] < 0.2 * lost[1] and lost[0] < 1e-4, lost


# --------------------------------------------------------------------------------------------------------- an export


def export(model: Path, output: Path, skeletons: Skeletons, *overrides: str, **options: Any) -> dict[str, Any]:
    """Export as the command line does; the calibration runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.graph.skeleton.build_skeleton", skeletons.build)
        patch.setattr("compress.calibrate.encoder.run_worker", in_process)
        given = pipeline.ExportOptions(**{"validate": False, "threads": 1, **options})
        pipeline.export(
            pipeline.ModelReference(str(model)), load_profile("x86-int8", overrides), output, given, Stages()
        )
    manifest: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return manifest


@pytest.fixture(scope="module")
def default(planted_bert: Path, skeletons: Skeletons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the artifact of x86-int8 as it is; read only."""
    output = tmp_path_factory.mktemp("default") / "artifact"
    export(planted_bert, output, skeletons)
    return output


def test_manifest_says_what_was_found(default: Path) -> None:
    record = json.loads((default / "manifest.json").read_text())["calibration"]
    assert record["text"]["name"].endswith("language-reference/calibration") and len(record["text"]["sha256"]) == 64
    assert record["texts"] == 120 and len(record["losses"]) == 12 and record["kept_float"] == []
    assert all(0 < loss < 0.005 for loss in record["losses"].values())
    assert not [path.name for path in default.rglob("*") if path.name.startswith(".")]


def test_the_users_text_is_used_and_recorded(
    planted_bert: Path, default: Path, skeletons: Skeletons, tmp_path: Path
) -> None:
    own = tmp_path / "own.txt"
    own.write_text("\n\n".join(f"Ticket {number} was closed by the second team." for number in range(30)))
    record = export(planted_bert, tmp_path / "own", skeletons, calibration_text=own)["calibration"]
    assert record["text"] == {"name": "own.txt", "sha256": hashlib.sha256(own.read_bytes()).hexdigest()}
    assert record["texts"] == 30 + 40
    scales = [scale_vector(artifact) for artifact in (tmp_path / "own", default)]
    assert not np.array_equal(*scales), "it is what was calibrated on"


def scale_vector(artifact: Path) -> np.ndarray:
    graph = onnx.load(artifact / "model.onnx").graph
    found = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    return found["encoder.layer.1.intermediate.dense.input_scale"]


def test_seed_decides_the_random_texts(planted_bert: Path, default: Path, skeletons: Skeletons, tmp_path: Path) -> None:
    export(planted_bert, tmp_path / "other", skeletons, seed=5)
    assert not np.array_equal(scale_vector(default), scale_vector(tmp_path / "other"))


def test_nothing_is_left_of_an_export_that_fails(
    planted_bert: Path, skeletons: Skeletons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Two words.")
    with pytest.raises(UsageError, match="no sentence of three words"):
        export(planted_bert, tmp_path / "out", skeletons, calibration_text=short)

    def fails(*_: Any, **__: Any) -> None:
        raise CompressError("the disk is on fire")

    monkeypatch.setattr("compress.weights._Stream.run", fails)  # the statistics are on the disk by then
    with pytest.raises(CompressError, match="on fire"):
        export(planted_bert, tmp_path / "out", skeletons)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_the_real_worker_gives_the_same_bytes(
    planted_bert: Path, default: Path, skeletons: Skeletons, tmp_path: Path
) -> None:
    """Another process, two threads that quantize: nothing that was found here may depend on this one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.graph.skeleton.build_skeleton", skeletons.build)
        given = pipeline.ExportOptions(validate=False, threads=2)
        pipeline.export(
            pipeline.ModelReference(str(planted_bert)), load_profile("x86-int8"), tmp_path / "there", given, Stages()
        )
    for name in ("model.onnx", "model.onnx.data"):
        assert (default / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    assert not [path.name for path in (tmp_path / "there").rglob("*") if path.name.startswith(".")]
