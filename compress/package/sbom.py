"""``sbom.cdx.json``: the bill of materials, CycloneDX 1.6 as JSON (https://cyclonedx.org/docs/1.6/json/).

The artifact is a component of type ``machine-learning-model`` with a model card; its files are components with their
digests, the source model is its ancestor. What was measured is not in it: that is the report's, and so the same
inputs give the same bytes. ``cyclonedx-python-lib`` knows no model cards, so the document is written here; a test
holds it to that library's copy of the published schema.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from compress import catalog
from compress.errors import CompressError
from compress.package.manifest import list_files, measured
from compress.package.staging import write_file
from compress.source.files import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, read_json_object

NAME = "sbom.cdx.json"
SPECIFICATION = "1.6"
MODEL = "machine-learning-model"
_REFERENCE = "artifact"
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "compress-slm")
#: Licences that SPDX has no identifier for are not stated at all.
_UNKNOWN_LICENCE = "not stated"


def write_sbom(directory: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write the bill of an artifact whose files are all there but those with measurements.

    Args:
        directory: The artifact; its files are digested.
        manifest: What the manifest will say: ``source``, ``profile``, ``seed``, ``tools``, ``task``, ``calibration``.

    Returns:
        Name, size and SHA-256 of the files that it lists.
    """
    files = [item for item in list_files(directory) if listed(item["name"])]
    config = read_json_object(directory / "config.json", MAX_CONFIG_BYTES)
    text = json.dumps(build_sbom(manifest, files, config), indent=2, sort_keys=True, allow_nan=False)
    write_file(directory / NAME, text + "\n")
    return files


def listed(name: str) -> bool:
    """Return whether the bill lists a file: not itself, and nothing that holds measurements."""
    return name != NAME and not measured(name)


def build_sbom(
    manifest: Mapping[str, Any], files: Iterable[Mapping[str, Any]], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the bill.

    Args:
        manifest: The artifact's manifest, its files not needed.
        files: Name, size and SHA-256 of the files to list.
        config: The artifact's ``config.json``.
    """
    components = [_file(item, f"file:{item['name']}") for item in files]
    document: dict[str, Any] = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPECIFICATION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPECIFICATION,
        "version": 1,
        "metadata": {
            "tools": {"components": [_tool(name, version) for name, version in sorted(manifest["tools"].items())]},
            "component": _model(manifest, config),
        },
        "components": components,
        "dependencies": [{"ref": _REFERENCE, "dependsOn": [item["bom-ref"] for item in components]}],
    }
    # Two artifacts have the same number only if they are the same to the last byte.
    content = json.dumps(document, sort_keys=True, allow_nan=False)
    return {**document, "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, content)}"}


def read_digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that a bill lists.

    Raises:
        CompressError: It is no CycloneDX document about a model, or an entry is malformed.
    """
    document = read_json_object(path, MAX_INDEX_BYTES)
    if (document.get("bomFormat"), document.get("specVersion")) != ("CycloneDX", SPECIFICATION):
        raise CompressError(f"it is not a CycloneDX {SPECIFICATION} document", where=path.name)
    try:
        if document["metadata"]["component"]["type"] != MODEL:
            raise CompressError("it is not about a model", where=path.name)
        found: dict[str, str] = {}
        for item in document["components"]:
            (value,) = (entry["content"] for entry in item["hashes"] if entry["alg"] == "SHA-256")
            if item["type"] != "file" or not isinstance(value, str) or item["name"] in found:
                raise ValueError("not one file")
            found[item["name"]] = value
    except (KeyError, TypeError, ValueError):
        raise CompressError("a component of it is malformed", where=path.name) from None
    return found


def _model(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    source, profile = manifest["source"], manifest["profile"]
    name = f"{Path(source['id']).name}-{profile['name']}"
    return {
        "type": MODEL,
        "bom-ref": _REFERENCE,
        "name": name,
        "description": f"{source['id']} as ONNX, made by compress under its profile {profile['name']}",
        **_licences(source),
        "pedigree": {"ancestors": [_ancestor(source)], "notes": _notes(manifest)},
        "modelCard": _card(manifest, config),
        "properties": [
            {"name": f"compress:{key}", "value": value}
            for key, value in (
                ("seed", str(manifest["seed"])),
                *flattened(profile.get("quantize", {}), "quantize"),
                *flattened(profile.get("graph", {}), "graph"),
            )
        ],
    }


def _card(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    parameters: dict[str, Any] = {"architectureFamily": "transformer", "modelArchitecture": str(name)}
    if manifest.get("task"):
        parameters["task"] = manifest["task"]
    text = (manifest.get("calibration") or {}).get("text")
    if text:
        digest = {"name": "compress:sha256", "value": str(text["sha256"])}
        parameters["datasets"] = [
            {
                "type": "dataset",
                "name": str(text["name"]),
                "description": "what the source model was run on to choose scales and rounding; not training data",
                "contents": {"properties": [digest]},
            }
        ]
    return {"modelParameters": parameters}


def _ancestor(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the source model with its files."""
    found: dict[str, Any] = {
        "type": MODEL,
        "bom-ref": "source",
        "name": source["id"],
        **_licences(source),
        "components": [_file(item, f"source:{item['name']}") for item in source["files"]],
        "properties": [{"name": "compress:kind", "value": source["kind"]}],
    }
    if source.get("revision"):
        found["version"] = source["revision"]
    if source["kind"] == "hub":
        revision = f"@{source['revision']}" if source.get("revision") else ""
        found["purl"] = f"pkg:huggingface/{quote(source['id'], safe='/')}{revision}"
    return found


def _notes(manifest: Mapping[str, Any]) -> str:
    steps = ["exported to ONNX", "weights stored as the properties say"]
    if manifest["source"].get("adapter"):
        steps.insert(0, "an adapter merged")
    if manifest.get("pruning"):
        steps.insert(-1, "pruned")
    return ", ".join(steps)


def _licences(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the licence that the catalog knows of a source, nothing where it knows none."""
    entry = catalog.of_source(source["kind"], source["id"])
    if entry is None or entry.licence == _UNKNOWN_LICENCE:
        return {}
    return {"licenses": [{"license": {"id": entry.licence}}]}


def _file(item: Mapping[str, Any], reference: str) -> dict[str, Any]:
    return {
        "type": "file",
        "bom-ref": reference,
        "name": item["name"],
        "hashes": [{"alg": "SHA-256", "content": item["sha256"]}],
        "properties": [{"name": "compress:bytes", "value": str(item["size"])}],
    }


def _tool(name: str, version: str) -> dict[str, Any]:
    if name == "compress":
        return {"type": "application", "name": "compress-slm", "version": version}
    return {"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name.lower()}@{quote(version)}"}


def flattened(value: object, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the leaves of nested mappings as text, each under its dotted key; lists and scalars are leaves, as JSON."""
    if isinstance(value, Mapping):
        for key, inner in sorted(value.items()):
            yield from flattened(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value)
