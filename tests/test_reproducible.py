"""Two exports of the same inputs: equal to the byte, but for what holds measurements, and those files are named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress import pipeline
from compress.package.manifest import NAME
from compress.profile import load_profile
from compress.progress import Stages

pytestmark = pytest.mark.usefixtures("fast_skeletons")

QUICK = (
    "validation.baselines=[]", "validation.repeats=1", "validation.tokens=64", "validation.window=32",
    "validation.prompt_tokens=8", "validation.new_tokens=2",
)  # fmt: skip


def export(model: Path, output: Path, *, validate: bool) -> dict[str, bytes]:
    """Export and return every file's bytes by its name."""
    pipeline.export(
        pipeline.ModelReference(str(model)),
        load_profile("arm-int4", QUICK),
        output,
        pipeline.ExportOptions(validate=validate, threads=1),
        Stages(),
    )
    return {
        path.relative_to(output).as_posix(): path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()
    }


def without_measured(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest without the sizes and digests of measured files."""
    measured = manifest["measured_files"]
    kept = [{"name": item["name"]} if item["name"] in measured else item for item in manifest["files"]]
    return manifest | {"files": kept}


def test_only_measured_files_differ_between_two_validated_exports(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    first = export(tiny_model("llama"), tmp_path / "first", validate=True)
    second = export(tiny_model("llama"), tmp_path / "second", validate=True)
    manifests = [json.loads(files[NAME]) for files in (first, second)]
    assert "report.json" in manifests[0]["measured_files"]
    assert first.keys() == second.keys()
    # One machine, one number of threads: the losses that comparisons pair are the same to the bit.
    positions = json.loads(first["report.json"])["drift"]["positions"]
    assert positions["sha256"] == hashlib.sha256(first[positions["file"]]).hexdigest()
    assert positions["file"] in manifests[0]["measured_files"] and first["drift.npz"] == second["drift.npz"]
    differing = {name for name in first if first[name] != second[name]}
    assert differing <= {NAME, *manifests[0]["measured_files"]}
    assert without_measured(manifests[0]) == without_measured(manifests[1])
    # The control: times were measured, so the reports do differ.
    assert "report.json" in differing and manifests[0] != manifests[1]


def test_exports_without_measurements_are_the_same_in_every_file(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first = export(tiny_model("llama"), tmp_path / "first", validate=False)
    second = export(tiny_model("llama"), tmp_path / "second", validate=False)
    assert first == second
    assert {NAME, "sbom.cdx.json", "model.onnx.data"} <= first.keys()
