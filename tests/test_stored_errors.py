"""How far stored weights are from their source: against float64 arithmetic on the bytes in the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress import pipeline, store, weights
from compress.errors import CompressError
from compress.package.writer import DataFile
from compress.planning import Fate, Plan, make_plan
from compress.profile import load_profile
from compress.quantize import load_quantizer
from compress.quantize.scheme import scheme_name
from compress.reading import read_rows
from compress.report import tensors
from compress.source import OpenCheckpoint, open_checkpoint
from compress.stored_errors import SAMPLED_ROWS, StoredErrors, sampled
from stored_weights import Stored

VARIANTS = {
    "float": ("llama", "float"),
    "half": ("llama-untied", "cuda-fp16"),
    "int4": ("llama", "arm-int4"),
    "asymmetric": ("gpt2", "x86-int4", "quantize.block_size=16"),
    "padded": ("llama-untied", "arm-int4", "quantize.block_size=128", "quantize.scale_format=float16"),
    "int2": ("gpt2", "arm-int4", "quantize.bits=2", "quantize.roles.embedding.block_size=64"),
    "integer": ("bert:embedding", "x86-int8"),
}


def plan_of(checkpoint: OpenCheckpoint, profile: str, *overrides: str) -> Plan:
    return make_plan(pipeline.describe(checkpoint), load_profile(profile, overrides), checkpoint)


def write(checkpoint: OpenCheckpoint, plan: Plan, path: Path, threads: int = 1) -> tuple[Stored, dict[str, float]]:
    """Write a plan's weights; return what lies in the file, and the errors."""
    errors = StoredErrors()
    with DataFile(path, plan.data_bytes) as data:
        inline = weights.write_weights(
            plan, checkpoint, load_quantizer("rtn"), data, calibrate=None, threads=threads, errors=errors
        )
    return Stored(plan, path.read_bytes(), inline), errors.relative()


def read_back(stored: Stored, fate: Fate) -> np.ndarray:
    """Return a weight ``[rows, columns]`` in float64, from the file, by plain arithmetic."""
    if fate.scheme is None:
        kept = stored[fate.stored[0].name].astype(np.float64)
        return kept.T if fate.kind == "matmul" else kept
    if fate.scheme.activations != "none":
        return (stored[f"{fate.name}.codes"].astype(np.float64) * stored[f"{fate.name}.scales"]).T
    block = np.arange(fate.columns) // (fate.scheme.block_size or fate.columns)
    return (stored.codes(fate) - stored.zero_points(fate)[:, block]) * stored.scales(fate)[:, block]


@pytest.mark.parametrize("variant", VARIANTS)
def test_errors_are_those_of_the_bytes(variant: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    name, *profile = VARIANTS[variant]
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        plan = plan_of(checkpoint, *profile)
        stored, found = write(checkpoint, plan, tmp_path / "data")
        counted = {fate.name for fate in plan.fates if fate.kind != "vector"}
        assert set(found) == counted and len(counted) > 10
        for fate in (plan.by_name[key] for key in counted):
            weight = read_rows(checkpoint, fate, 0, fate.rows).astype(np.float64)
            rows = np.unique(np.linspace(0, fate.rows - 1, min(64, fate.rows)).round().astype(int))
            lost = np.linalg.norm((read_back(stored, fate) - weight)[rows]) / np.linalg.norm(weight[rows])
            assert found[fate.name] == pytest.approx(lost, rel=1e-3, abs=1e-12), fate.name
            least = 0 if fate.scheme is None else 1e-3
            assert least <= found[fate.name] < {"int2": 0.6}.get(variant, 0.2), fate.name
    quantized = [found[fate.name] for fate in plan.fates if fate.scheme is not None]
    assert bool(quantized) == (variant not in ("float", "half"))
    assert variant != "float" or not any(found.values())
    assert variant != "half" or 0 < max(found.values()) < 2**-10


def test_swapped_nibbles_are_an_error(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoint(str(tiny_model("llama"))) as checkpoint:
        plan = plan_of(checkpoint, "arm-int4")
        _, right = write(checkpoint, plan, tmp_path / "right")
        real = store.pack_matmul_weight

        def swapped(codes: np.ndarray, scheme: object) -> np.ndarray:
            packed = real(codes, scheme)  # type: ignore[arg-type]
            return (packed >> 4) | (packed << 4)

        monkeypatch.setattr(store, "pack_matmul_weight", swapped)
        _, wrong = write(checkpoint, plan, tmp_path / "wrong")
    linears = [fate.name for fate in plan.fates if fate.kind == "matmul"]
    assert linears and all(wrong[name] > 5 * right[name] for name in linears)
    assert wrong["model.embed_tokens"] == right["model.embed_tokens"]


def test_threads_and_pieces_do_not_change_a_digit(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoint(str(tiny_model("gpt2"))) as checkpoint:
        plan = plan_of(checkpoint, "arm-int4")
        _, expected = write(checkpoint, plan, tmp_path / "first")
        monkeypatch.setattr(weights, "CHUNK_WEIGHTS", 1000)
        _, found = write(checkpoint, plan, tmp_path / "again", threads=3)
    assert found == expected


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 1000])
def test_pieces_hold_each_sampled_row_once(rows: int) -> None:
    whole = sampled(rows, 0, rows).tolist()
    assert len(whole) == min(rows, SAMPLED_ROWS) and {whole[0], whole[-1]} == {0, rows - 1}
    pieces = [(sampled(rows, start, min(rows, start + 7)) + start).tolist() for start in range(0, rows, 7)]
    assert [row for piece in pieces for row in piece] == whole


def test_a_weight_of_zeros_has_no_relative_error() -> None:
    errors = StoredErrors()
    errors.note("zeros", np.arange(2), np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32))
    errors.note("half", np.arange(1), np.full((1, 4), 2, np.float32), np.full((1, 4), 1, np.float32))
    assert errors.relative() == {"half": 0.5}


# ------------------------------------------------------------------------------------------------------------ records


@pytest.mark.parametrize(
    ("name", "profile"), [("llama", "arm-int4"), ("gpt2", "x86-int4"), ("bert:embedding", "float")]
)
def test_the_manifest_has_a_record_of_each_weight(name: str, profile: str, tiny_artifact: Callable[..., Path]) -> None:
    artifact = tiny_artifact(name, profile)
    record = json.loads((artifact / "manifest.json").read_text())
    found = {item.name: item for item in tensors.of_manifest(record, "here")}
    assert len(found) == len(record["tensors"])
    for item in found.values():
        assert item.relative_error is not None and item.role
        assert (item.layer is None) == (f".{item.layer}." not in item.name)
        assert item.storage == "float32" if profile == "float" else item.bits <= 32
    sizes = sum(item.bytes for item in found.values())
    data = (artifact / "model.onnx.data").stat().st_size
    graph = (artifact / "model.onnx").stat().st_size
    assert 0.5 * (data + graph) < sizes < data + graph
    if name == "llama":
        table = found["model.embed_tokens"]
        scheme = load_profile(profile).quantize.scheme("embedding")
        assert scheme is not None and (table.storage, table.layer) == (scheme_name(scheme), None)
        assert (table.bits, table.bytes) == (5.25, 384 * 64 * 5.25 / 8)


def test_calibration_block_by_block_measures_them_too(tiny_artifact: Callable[..., Path]) -> None:
    overrides = ("quantize.effort=balanced", "calibration.tokens=512", "calibration.window=64")
    record = json.loads((tiny_artifact("llama", "arm-int4", *overrides) / "manifest.json").read_text())
    fast = json.loads((tiny_artifact("llama") / "manifest.json").read_text())
    found, plain = ({item["name"]: item["relative_error"] for item in each["tensors"]} for each in (record, fast))
    assert set(found) == set(plain) and all(0.01 < error < 0.2 for error in found.values())
    assert found != plain
    # What GPTQ makes up for by its neighbours it loses in the weight itself.
    assert np.mean(list(found.values())) > np.mean(list(plain.values()))


def test_an_older_manifest_has_none_and_a_damaged_one_is_refused() -> None:
    assert tensors.of_manifest({}, "here") == ()
    good = {"name": "a", "role": "qkv", "storage": "int4 b32 sym", "bits": 4.5, "bytes": 9, "layer": 0}
    assert tensors.of_manifest({"tensors": [good]}, "here")[0].relative_error is None
    for damaged in ([{**good, "colour": 1}], [3], 3, None):
        with pytest.raises(CompressError, match="manifest.json is damaged: tensors"):
            tensors.of_manifest({"tensors": damaged}, "here")
