"""The same model, profile and versions give the same bytes, whatever the number of threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compress import pipeline
from compress.profile import load_profile
from compress.progress import Stages
from tiny_models import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("real_workers")]

FILES = ("model.onnx", "model.onnx.data", "config.json", "tokenizer.json")


def export(model: Path, output: Path, threads: int, *overrides: str, profile: str = "arm-int4") -> dict[str, bytes]:
    pipeline.export(
        pipeline.ModelReference(str(model)),
        load_profile(profile, overrides),
        output,
        pipeline.ExportOptions(validate=False, threads=threads),
        Stages(),
    )
    files = (*FILES, "genai_config.json") if profile == "arm-int4" else FILES
    return {name: (output / name).read_bytes() for name in files}


@pytest.mark.usefixtures("fast_skeletons")
@pytest.mark.parametrize("name", FAMILIES)
def test_exports_are_byte_identical(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many small tasks, so that threads finish them out of order.
    monkeypatch.setattr("compress.weights.CHUNK_WEIGHTS", 4096)
    first = export(tiny_model(name), tmp_path / "first", 1)
    for threads in (1, 2, 5):
        again = export(tiny_model(name), tmp_path / f"again-{threads}", threads)
        assert [file for file in first if again[file] != first[file]] == [], threads


@pytest.mark.usefixtures("fast_skeletons")
def test_encoders_under_the_shipped_int8_profile_are_byte_identical(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibrated: what the source model showed of its inputs, in a process of its own, decides bytes, too."""
    monkeypatch.setattr("compress.weights.CHUNK_WEIGHTS", 4096)
    first = export(tiny_model("bert:embedding"), tmp_path / "first", 1, profile="x86-int8")
    for threads in (2, 3):
        again = export(tiny_model("bert:embedding"), tmp_path / f"again-{threads}", threads, profile="x86-int8")
        assert [file for file in FILES if again[file] != first[file]] == [], threads


@pytest.mark.usefixtures("fast_skeletons")
@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_rotated_decoders_are_byte_identical(
    effort: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.weights.CHUNK_WEIGHTS", 4096)
    options = (f"quantize.effort={effort}", "calibration.tokens=256", "calibration.window=64")
    first = export(tiny_model("llama"), tmp_path / "first", 1, *options, profile="x86-int8-hybrid")
    again = export(tiny_model("llama"), tmp_path / "again", 3, *options, profile="x86-int8-hybrid")
    assert [file for file in FILES if again[file] != first[file]] == []


@pytest.mark.usefixtures("fast_skeletons")
def test_another_scheme_gives_other_bytes(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    first = export(tiny_model("llama"), tmp_path / "first", 1)
    other = export(tiny_model("llama"), tmp_path / "other", 1, "quantize.symmetric=false")
    assert {file for file in first if other[file] != first[file]} == {"model.onnx", "model.onnx.data"}


def test_two_real_runs_agree(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """With the skeleton's worker, whose process has another hash seed each time."""
    first = export(tiny_model("phi3-longrope"), tmp_path / "first", 1)
    again = export(tiny_model("phi3-longrope"), tmp_path / "again", 2)
    assert first == again
