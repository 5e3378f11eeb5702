"""What is in an artifact: a document that says everything, read from manifest, graph and report; no weight is read.

A directory without a manifest is read as far as it goes: the graph of another tool, or a report alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from compress.contracts import Linear, Table
from compress.errors import CompressError
from compress.graph import contents
from compress.package import manifest
from compress.package.manifest_schema import parse_manifest
from compress.package.tree import scan
from compress.report import json as report_json
from compress.source.files import MAX_CONFIG_BYTES, read_json_object

#: Where a directory's main graph may lie: at the top, or as optimum and transformers.js have it.
_GRAPHS = ("model.onnx", "onnx/model.onnx")


def inspect_document(artifact: Path) -> dict[str, Any]:
    """Read what an artifact says of itself, and what its graph holds.

    Keys that something missing would have filled are ``None``: without a manifest ``status``, ``source``, ``profile``
    and ``tools``; without a report ``report``; without a graph ``opset``, ``totals``; lists are empty.

    Raises:
        CompressError: There is nothing of an artifact, or its graph or manifest is damaged.
    """
    record = _manifest(artifact)
    graph = next((artifact / name for name in _GRAPHS if (artifact / name).is_file()), None)
    if record is None and graph is None and not (artifact / report_json.NAME).is_file():
        # Says what is missing as every command does.
        manifest.read_manifest(artifact)
    if record is not None and graph is None:
        raise CompressError("model.onnx cannot be read: it is missing", where=str(artifact))
    return {
        "name": artifact.resolve().name,
        **_from_manifest(record),
        "files": _files(artifact, record),
        **_from_graph(artifact, graph),
        "report": _report(artifact / report_json.NAME),
    }


def _manifest(artifact: Path) -> dict[str, Any] | None:
    path = artifact / manifest.NAME
    if not path.is_file():
        return None
    record = manifest.read_manifest(artifact)
    try:
        parse_manifest(record)
    except CompressError as error:
        raise CompressError(f"manifest.json is damaged: {error.what}", where=str(path)) from None
    return record


def source_files(artifact: Path) -> dict[str, str]:
    """Return the digests of the source's files by name, as the manifest has them; nothing without one."""
    record = _manifest(artifact)
    listed = record["source"].get("files") if record is not None else None
    return {
        str(item.get("name")): str(item.get("sha256"))
        for item in (listed if isinstance(listed, list) else ())
        if isinstance(item, dict)
    }


def _from_manifest(record: Mapping[str, Any] | None) -> dict[str, Any]:
    known: Mapping[str, Any] = record or {}
    return {
        "status": known.get("status"),
        "source": {key: value for key, value in known["source"].items() if key != "files"} if record else None,
        "task": known.get("task"),
        "profile": known.get("profile"),
        "seed": known.get("seed"),
        "calibration": known.get("calibration"),
        "pruning": known.get("pruning"),
        "fusions": known.get("fusions", {}),
        "tools": known.get("tools"),
    }


def _files(artifact: Path, record: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return name, size and digest of every file; ``state`` says how the disk differs from the manifest, if it does.

    Sizes are compared, not digests: ``compress verify`` reads every byte, this does not.
    """
    present = dict(sorted(scan(artifact).files.items()))
    if record is None:
        return [{"name": name, "size": size, "sha256": None, "state": None} for name, size in present.items()]
    found = []
    for item in record["files"]:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not isinstance(item.get("size"), int):
            raise CompressError("manifest.json is damaged: files is malformed", where=str(artifact / manifest.NAME))
        size = present.pop(item["name"], None)
        state = "missing" if size is None else "another size" if size != item["size"] else None
        found.append({"name": item["name"], "size": item["size"], "sha256": str(item.get("sha256")), "state": state})
    present.pop(manifest.NAME, None)
    return found + [
        {"name": name, "size": size, "sha256": None, "state": "not in the manifest"} for name, size in present.items()
    ]


def _from_graph(artifact: Path, path: Path | None) -> dict[str, Any]:
    if path is None:
        empty: dict[str, Any] = {key: None for key in ("graph", "opset", "totals")}
        return empty | {
            "inputs": [],
            "outputs": [],
            "operators": {},
            "external_tensors": 0,
            "tensors": [],
            "constants": [],
        }
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise a dozen classes for a damaged file
        raise CompressError(f"model.onnx cannot be read: {error}", where=str(artifact)) from error
    try:
        found = _graph(model, path.relative_to(artifact).as_posix(), artifact)
        json.dumps(found)  # protobuf makes bytes of a name that is not UTF-8
        return found
    except CompressError:
        raise
    except Exception as error:  # a graph may be anything: shapes that are none, types that do not exist
        raise CompressError(
            f"the graph is damaged: {type(error).__name__}: {error}",
            where=str(path),
            hint="compress verify ARTIFACT tells all that is wrong",
        ) from error


def _graph(model: ir.Model, name: str, artifact: Path) -> dict[str, Any]:
    operators: dict[str, int] = {}
    for node in model.graph:
        operators[node.op_type] = operators.get(node.op_type, 0) + 1
    external = [v for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    return {
        "graph": name,
        "opset": model.opset_imports.get("", 0),
        "inputs": [{"name": value.name, "shape": _shape(value)} for value in model.graph.inputs],
        "outputs": [{"name": value.name, "shape": _shape(value)} for value in model.graph.outputs],
        "operators": dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        "external_tensors": len(external),
        **_tensors(contents.weights(model), _known_roles(artifact)),
    }


def _shape(value: ir.Value) -> list[int | str]:
    return [dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ()]


def _tensors(found: list[contents.Weight], known: Mapping[str, tuple[str, int | None]]) -> dict[str, Any]:
    tensors, constants = [], []
    for item in found:
        if item.kind == "constant":
            constants.append({"name": item.name, "shape": list(item.shape), "bytes": item.bytes})
            continue
        role, layer = known.get(item.name, (None, item.layer))
        tensors.append(
            {
                "name": item.name,
                "kind": item.kind,
                "role": role or ("norms and biases" if item.kind == "vector" else item.place),
                "layer": layer,
                "shape": list(item.shape),
                "storage": item.storage,
                "bits": round(item.bits, 3),
                "bytes": item.bytes,
                "operators": list(item.operators),
            }
        )
    counted = [item for item in found if item.kind != "constant"]
    values, size = sum(item.values for item in counted), sum(item.bytes for item in counted)
    totals = {
        "tensors": len(tensors),
        "values": values,
        "bytes": size,
        "bits": round(8 * size / values, 3) if values else None,
        "constants_bytes": sum(item.bytes for item in found if item.kind == "constant"),
    }
    return {"tensors": tensors, "constants": constants, "totals": totals}


def _known_roles(artifact: Path) -> dict[str, tuple[str, int | None]]:
    """Return role and block by name where a family reads the artifact's config; nothing of other tools' artifacts."""
    from compress.families import load_family

    try:
        config = read_json_object(artifact / "config.json", MAX_CONFIG_BYTES)
        structure = load_family(config).describe(config, {})
    except (CompressError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    items: tuple[Linear | Table, ...] = (*structure.linears, *structure.tables)
    return {
        item.name: (item.role, item.layer)
        if isinstance(item, Linear)
        else ("embedding" if item.role == "token" else item.role, None)
        for item in items
    }


def _report(path: Path) -> dict[str, Any] | None:
    """Return what a report says in short; its own schema version as it is on disk.

    Raises:
        CompressError: It is damaged, or of a newer version.
    """
    if not path.is_file():
        return None
    found = report_json.read(path)
    return {
        "schema_version": read_json_object(path, report_json.MAX_BYTES)["schema_version"],  # as it is on disk
        "verdict": found.verdict.model_dump(mode="json"),
        "created": found.created,
        "source": found.source.identifier if found.source else None,
        "profile": found.profile.name if found.profile else None,
        "size": found.size.model_dump(mode="json"),
        "providers": [item.provider for item in found.speed],
    }
