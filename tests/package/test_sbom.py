"""The bill of materials: valid by the published schema, complete, and the same from the same inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from compress.errors import CompressError
from compress.package import sbom
from compress.package.manifest import NAME as MANIFEST_NAME
from compress.package.manifest import list_files

FILE = {"name": "model.onnx", "size": 3, "sha256": "a" * 64}


def valid(text: str) -> str | None:
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    return None if error is None else repr(error)


def read(artifact: Path) -> dict[str, Any]:
    return dict(json.loads((artifact / sbom.NAME).read_text()))


def made(**changes: Any) -> dict[str, Any]:
    manifest: dict[str, Any] = {
        "source": {
            "kind": "hub", "id": "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "revision": "f" * 40, "files": [FILE],
        },
        "profile": {"name": "arm-int4", "quantize": {"bits": 4, "roles": {"head": {"bits": 8}}}},
        "seed": 0,
        "tools": {"compress": "0.1.0", "torch": "2.13.0+cpu"},
        "task": "text-generation",
    }  # fmt: skip
    return sbom.build_sbom(manifest | changes, [FILE], {"architectures": ["LlamaForCausalLM"]})


@pytest.mark.parametrize("name", ["llama", "bert:embedding"])
def test_an_exports_bill(name: str, tiny_artifact: Callable[..., Path], tiny_model: Callable[[str], Path]) -> None:
    artifact = tiny_artifact(name, *(("float",) if ":" in name else ()))
    bill = read(artifact)
    assert valid(json.dumps(bill)) is None
    assert sbom.read_digests(artifact / sbom.NAME) == {
        item["name"]: item["sha256"]
        for item in list_files(artifact)
        if item["name"] not in (sbom.NAME, "README.md")  # the card is written after it, with what was measured
    }
    model = bill["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    (source,) = model["pedigree"]["ancestors"]
    assert source["name"] == tiny_model(name).name
    assert "model.safetensors" in {item["name"] for item in source["components"]}
    tools = {item["name"]: item["version"] for item in bill["metadata"]["tools"]["components"]}
    recorded = json.loads((artifact / MANIFEST_NAME).read_text())["tools"]
    assert tools == {"compress-slm" if key == "compress" else key: value for key, value in recorded.items()}
    assert str(tiny_model(name).parent) not in json.dumps(bill)


def test_the_schema_is_strict() -> None:
    """The control: what is not of the schema is found."""
    bill = made()
    assert valid(json.dumps(bill)) is None
    bill["components"][0]["hashes"][0]["content"] = "no digest"
    assert valid(json.dumps(bill)) is not None
    assert valid(json.dumps(made() | {"measured": 1})) is not None


def test_licence_pedigree_card_and_calibration() -> None:
    text = {"name": "domain.txt", "sha256": "b" * 64}
    bill = made(calibration={"text": text}, pruning={"before": {}})
    assert valid(json.dumps(bill)) is None
    model = bill["metadata"]["component"]
    (source,) = model["pedigree"]["ancestors"]
    assert source["licenses"] == model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert source["purl"] == "pkg:huggingface/TinyLlama/TinyLlama-1.1B-Chat-v1.0@" + "f" * 40
    parameters = model["modelCard"]["modelParameters"]
    assert (parameters["task"], parameters["modelArchitecture"]) == ("text-generation", "LlamaForCausalLM")
    assert parameters["datasets"][0]["contents"]["properties"][0]["value"] == "b" * 64
    assert {"name": "compress:quantize.roles.head.bits", "value": "8"} in model["properties"]
    assert "pruned" in model["pedigree"]["notes"]
    assert {item.get("purl") for item in bill["metadata"]["tools"]["components"]} == {
        None, "pkg:pypi/torch@2.13.0%2Bcpu",
    }  # fmt: skip


def test_a_licence_that_nobody_states_is_not_stated() -> None:
    other = {"kind": "directory", "id": "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "revision": None, "files": []}
    assert "licenses" not in made(source=other)["metadata"]["component"]


def test_its_number_follows_from_what_it_says() -> None:
    assert made() == made()
    assert made()["serialNumber"] != made(seed=1)["serialNumber"]
    assert "timestamp" not in made()["metadata"]


@pytest.mark.parametrize(
    "change",
    [
        {"bomFormat": "other"}, {"specVersion": "1.7"}, {"metadata": {"component": {"type": "library"}}},
        {"components": [{}]}, {"components": 3}, {"metadata": 3}, {"components": made()["components"] * 2},
    ],
)  # fmt: skip
def test_damaged_bills_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / sbom.NAME
    path.write_text(json.dumps(made()))
    assert sbom.read_digests(path) == {"model.onnx": "a" * 64}
    path.write_text(json.dumps(made() | change))
    with pytest.raises(CompressError):
        sbom.read_digests(path)
