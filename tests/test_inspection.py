"""What inspect reads of whole artifacts, of other tools' directories, and of reports alone."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compress.errors import CompressError
from compress.inspection import inspect_document
from compress.inspection_text import show_inspection


def shown(document: dict[str, Any], *, tensors: bool = False) -> str:
    file = io.StringIO()
    show_inspection(document, Console(file=file, width=200), tensors=tensors)
    return file.getvalue()


@pytest.fixture
def copied(tiny_artifact: Callable[..., Path], tmp_path: Path) -> Path:
    shutil.copytree(tiny_artifact("llama", "arm-int4"), tmp_path / "artifact")
    return tmp_path / "artifact"


OLD_REPORT = {
    "schema_version": 1,
    "verdict": {"status": "fail", "reasons": ["kl is 0.5"]},
    "source": {"identifier": "owner/model", "kind": "hub"},
    "size": {"artifact_bytes": 1000},
    "environment": {
        "versions": {}, "cpu": "a cpu", "cores": 2, "instruction_sets": [], "os": "Linux", "architecture": "x86_64",
    },
}  # fmt: skip


def test_tensors_by_block_and_role(copied: Path) -> None:
    document = inspect_document(copied)
    roles = {(item["layer"], item["role"]) for item in document["tensors"]}
    assert {(None, "embedding"), (0, "qkv"), (2, "down"), (1, "norms and biases")} <= roles
    assert document["totals"]["bytes"] == sum(item["bytes"] for item in document["tensors"])
    page = shown(document)
    assert "blocks 0 to 2, each as" in page and "qkv                int4 b32 sym" in page
    assert "model.layers.1.mlp.down_proj" not in page
    assert "model.layers.1.mlp.down_proj [64 x 160]" in shown(document, tensors=True)


def test_blocks_that_differ_are_shown_apart(copied: Path) -> None:
    document = inspect_document(copied)
    changed = next(item for item in document["tensors"] if item["name"] == "model.layers.1.mlp.down_proj")
    changed["storage"] = "int8 b32 sym"
    page = shown(document)
    assert "each as" not in page and all(f"block {index}  (" in page for index in range(3))


def test_files_that_the_manifest_does_not_know(copied: Path) -> None:
    assert {item["state"] for item in inspect_document(copied)["files"]} == {None}
    (copied / "tokenizer.json").unlink()
    (copied / "config.json").write_text((copied / "config.json").read_text() + " ")
    (copied / "notes.txt").write_text("mine")
    states = {item["name"]: item["state"] for item in inspect_document(copied)["files"] if item["state"]}
    assert states == {
        "tokenizer.json": "missing", "config.json": "another size", "notes.txt": "not in the manifest"
    }  # fmt: skip
    assert "tokenizer.json (missing)" in shown(inspect_document(copied)).replace("  (", " (")


def test_without_a_manifest(copied: Path) -> None:
    (copied / "manifest.json").unlink()
    (copied / "onnx").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        (copied / name).rename(copied / "onnx" / name)
    document = inspect_document(copied)
    assert (document["status"], document["graph"]) == (None, "onnx/model.onnx")
    assert document["totals"]["tensors"] == 20
    assert "there is no manifest.json" in shown(document)


def test_a_report_of_an_older_version_alone(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(OLD_REPORT))
    document = inspect_document(tmp_path)
    assert document["report"]["schema_version"] == 1 and document["tensors"] == []
    page = shown(document)
    assert "report    fail, schema version 1" in page and "- kl is 0.5" in page
    (tmp_path / "report.json").write_text(json.dumps({**OLD_REPORT, "schema_version": 99}))
    with pytest.raises(CompressError, match="schema version 99"):
        inspect_document(tmp_path)


def test_what_is_no_artifact(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"no manifest\.json"):
        inspect_document(tmp_path)
    (copied / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(CompressError, match=r"model\.onnx cannot be read"):
        inspect_document(copied)
    (copied / "model.onnx").unlink()
    with pytest.raises(CompressError, match="it is missing"):
        inspect_document(copied)
