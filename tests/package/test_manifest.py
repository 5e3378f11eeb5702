"""The manifest: what it was made from, how, and the digest of every file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.package.manifest import NAME, build_manifest, read_manifest, write_manifest
from compress.package.tree import sha256
from compress.profile import load_profile, parse_profile
from compress.source import open_checkpoint


def test_an_exports_manifest_matches_its_files(
    tiny_artifact: Callable[..., Path], tiny_model: Callable[[str], Path]
) -> None:
    artifact = tiny_artifact("llama", "arm-int4")
    manifest = read_manifest(artifact)
    expected = {
        path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in artifact.iterdir()
        if path.name != NAME
    }
    assert {item["name"]: (item["size"], item["sha256"]) for item in manifest["files"]} == expected
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "config.json", "tokenizer.json"} <= set(expected)
    assert manifest["status"] == "built"
    assert manifest["schema_version"] == 1
    assert manifest["seed"] == 0
    assert manifest["source"]["kind"] == "directory"
    weights = tiny_model("llama") / "model.safetensors"
    of_source = {item["name"]: item["sha256"] for item in manifest["source"]["files"]}
    assert of_source["model.safetensors"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert {"compress", "numpy", "onnx-ir", "mobius-onnx", "onnxruntime"} <= set(manifest["tools"])
    assert parse_profile(manifest["profile"], where="manifest") == load_profile("arm-int4")


def test_it_names_no_local_path(tiny_artifact: Callable[..., Path], tiny_model: Callable[[str], Path]) -> None:
    text = (tiny_artifact("llama", "arm-int4") / NAME).read_text()
    assert str(tiny_model("llama").parent) not in text
    assert json.loads(text)["source"]["id"] == tiny_model("llama").name


def test_round_trip(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"bb")
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / ".c.partial").write_bytes(b"being written")
    with open_checkpoint(str(tiny_model("llama"))) as checkpoint:
        made = build_manifest(
            checkpoint, load_profile("float"), seed=5, files=checkpoint.files(), adapter={"directory": "lora"}
        )
    assert made["source"]["adapter"] == {"directory": "lora"}
    first = write_manifest(tmp_path, made, status="accepted")
    assert read_manifest(tmp_path) == first
    assert first["status"] == "accepted" and first["seed"] == 5
    assert [item["name"] for item in first["files"]] == ["a", "sub/b"]
    # Written again, it does not count itself.
    assert write_manifest(tmp_path, first) == first
    assert not list(tmp_path.glob(".manifest*"))


def test_digest_of_more_than_one_chunk(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "not an artifact"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ('"text"', "damaged: the JSON holds a str"),
        ('{"schema_version": 2}', "another schema version"),
        ('{"schema_version": 1, "status": "built"}', "files is missing"),
        ('{"schema_version": 1, "files": [], "profile": 3}', "profile is missing or malformed"),
    ],
)
def test_damaged_manifests_are_refused(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / NAME).write_text(text)
    with pytest.raises(CompressError, match=reason):
        read_manifest(tmp_path)
