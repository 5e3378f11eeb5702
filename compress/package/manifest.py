"""``manifest.json``: where the artifact came from, how it was made, and the digest of every file in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from compress import __version__
from compress.contracts import Checkpoint, SourceFile
from compress.errors import CompressError, SourceError
from compress.package.staging import write_file
from compress.package.tree import sha256
from compress.profile import Profile
from compress.source.files import read_json_object

SCHEMA_VERSION = 1
NAME = "manifest.json"
#: More is no manifest.
MAX_BYTES = 64 << 20
#: A signature covers the manifest, so the manifest cannot hold its digest.
SIGNATURE_NAME = "model.sig"
MEASURED_NAMES = frozenset({"README.md", "drift.npz", "report.html", "report.json"})
#: Packages whose version can change the bytes or the numbers.
TOOLS = ("mobius-onnx", "numpy", "onnx", "onnx-ir", "onnxruntime", "safetensors", "tokenizers", "torch", "transformers")
_SHAPE: Mapping[str, type] = {"files": list, "profile": dict, "seed": int, "source": dict, "status": str, "tools": dict}


def measured(name: str) -> bool:
    """Return whether a file of an artifact holds numbers that were measured, or the time when they were.

    Every other file is decided by the model, profile, texts, seed and tool versions alone.
    """
    return name in MEASURED_NAMES or name.endswith(".svg")


def tool_versions() -> dict[str, str]:
    """Return the installed versions of :data:`TOOLS` and of compress itself."""
    versions = {"compress": __version__}
    for name in TOOLS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def build_manifest(
    checkpoint: Checkpoint,
    profile: Profile,
    *,
    seed: int,
    files: Iterable[SourceFile],
    adapter: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the manifest without the artifact's own files; see :func:`write_manifest`."""
    source: dict[str, Any] = {
        "kind": checkpoint.kind,
        "id": checkpoint.identifier,
        "revision": checkpoint.revision,
        "files": [{"name": item.name, "size": item.size, "sha256": item.sha256} for item in files],
    }
    if adapter:
        source["adapter"] = dict(adapter)
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "built",
        "source": source,
        "profile": profile.model_dump(mode="json", exclude_none=True),
        "seed": seed,
        "tools": tool_versions(),
    }


def write_manifest(
    directory: Path,
    manifest: Mapping[str, Any],
    *,
    status: str | None = None,
    known: Iterable[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Digest every file of the artifact and write ``manifest.json`` last.

    ``known`` are files that nothing has written to since they were listed: they are not read again.
    """
    files = list_files(directory, known)
    complete = {
        **manifest,
        "status": status or manifest["status"],
        "files": files,
        "measured_files": [item["name"] for item in files if measured(item["name"])],
    }
    write_file(directory / NAME, json.dumps(complete, indent=2, sort_keys=True) + "\n")
    return complete


def list_files(directory: Path, known: Iterable[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Return name, size and SHA-256 of every file, by name; the manifest and a signature are not among them."""
    names = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    digests = {item["name"]: item["sha256"] for item in known}
    return [
        {"name": name, "size": path.stat().st_size, "sha256": digests.get(name) or sha256(path)}
        for name, path in sorted(names.items())
        if name not in (NAME, SIGNATURE_NAME) and not name.endswith(".partial")
    ]


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read an artifact's manifest.

    Raises:
        CompressError: There is none, or it is not one this version understands.
    """
    path = directory / NAME
    if not path.is_file():
        raise CompressError(
            "not an artifact: it has no manifest.json", where=str(directory), hint="compress export makes one"
        )
    try:
        manifest = read_json_object(path, MAX_BYTES)
    except SourceError as error:
        raise CompressError(f"manifest.json is damaged: {error.what}", where=str(path)) from None
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise CompressError(
            "manifest.json has another schema version than this compress understands",
            where=str(path),
            hint=f"schema_version {SCHEMA_VERSION} was expected",
        )
    for key, kind in _SHAPE.items():
        if not isinstance(manifest.get(key), kind):
            raise CompressError(f"manifest.json is damaged: {key} is missing or malformed", where=str(path))
    return manifest
