"""The main job of encoders on real weights: all-MiniLM-L6-v2, and a classifier trained on it, under ``x86-int8``."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import labelled_text
from compress import cli

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("real_workers"),
    pytest.mark.skipif(
        importlib.util.find_spec(labelled_text.PACKAGE) is None,
        reason=f"needs the package {labelled_text.PACKAGE.replace('_', '-')}",
    ),
]

#: Speed is measured elsewhere, and on another machine; here it is what is lost that counts.
QUICK = ("validation.baselines=[]", "validation.repeats=1", "validation.lengths=[16]", "validation.batches=[1]")
SENTENCES = (
    "A decorator is a function that returns another function.",
    "The train to the coast leaves at seven in the morning, and it is usually late.",
    "Rain.",
    "Which of the two numbers is the greater one?",
    "Heat flows from the warmer body to the colder one until both have the same temperature, "
    "unless work is done on them from outside, as in a refrigerator.",
)


def run(*words: str, settings: tuple[str, ...] = ()) -> int:
    return cli.run([*words, *(word for setting in settings for word in ("--set", setting))])


def report_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "report.json").read_text())


# ----------------------------------------------------------------------------------------------------------- embedding


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("real") / "minilm"
    settings = (*QUICK, "validation.texts=160", "validation.max_length=96")
    assert run("export", "minilm", "--profile", "x86-int8", "-o", str(output), settings=settings) == 0
    return output


@pytest.mark.timeout(600)
def test_minilm_passes_its_gate_fused_and_small(minilm: Path) -> None:
    report = report_of(minilm)
    assert report["verdict"] == {"status": "pass", "reasons": []}
    assert report["drift"]["cosine"]["mean"] >= 0.998
    assert report["drift"]["neighbour_agreement"] >= 0.93
    assert report["size"]["artifact_bytes"] <= 23e6
    # Every layer: one attention over 8-bit inputs, one GELU; and nothing of the plain spelling is left.
    assert {name: report["fusions"][name] for name in ("attention", "packed_attention", "gelu", "linear")} == {
        "attention": 6, "packed_attention": 6, "gelu": 6, "linear": 24,
    }  # fmt: skip
    assert report["fusions"]["pooling"] >= 1
    assert report["placement"][0]["fallback_nodes"] == []
    record = json.loads((minilm / "manifest.json").read_text())
    assert (record["status"], record["task"]) == ("accepted", "embedding")
    assert len(record["calibration"]["losses"]) == 24
    assert not list(minilm.parent.glob(".*")), "something was left behind"


def embed(artifact: Path, sentences: tuple[str, ...]) -> np.ndarray:
    """Embed sentences as README.md says, in one padded batch."""
    import onnxruntime
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(256)
    encoded = tokenizer.encode_batch(list(sentences))
    feeds = {
        "input_ids": np.array([item.ids for item in encoded]),
        "attention_mask": np.array([item.attention_mask for item in encoded]),
        "token_type_ids": np.array([item.type_ids for item in encoded]),
    }
    session = onnxruntime.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["sentence_embedding"], feeds)[0])


@pytest.mark.timeout(600)
def test_minilm_embeds_as_mean_pooling_in_pytorch_does(minilm: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    source = labelled_text.pretrained()
    assert source is not None
    model, tokenizer = AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)
    wanted = []
    with torch.inference_mode():
        for sentence in SENTENCES:
            states = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0].double()
            mean = states.mean(dim=0)
            wanted.append((mean / mean.norm()).numpy())
    found = embed(minilm, SENTENCES).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    similar = found @ np.array(wanted).T
    assert similar.diagonal().min() >= 0.996
    # Controls: another sentence is far away, and so is a mean that counts padding.
    assert np.max(similar - 2 * np.eye(len(SENTENCES))) < 0.5
    padded = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.inference_mode():
        naive = model(**padded).last_hidden_state.double().mean(dim=1)
    naive = (naive / naive.norm(dim=1, keepdim=True)).numpy()
    assert np.sum(naive * np.array(wanted), axis=1).min() < 0.9


# ------------------------------------------------------------------------------------------------------ classification


@pytest.fixture(scope="module")
def in_domain(docstring_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return texts of the classifier's own kind to measure drift on, and every tenth labelled example."""
    place = tmp_path_factory.mktemp("texts")
    lines = (docstring_classifier / "test.jsonl").read_text(encoding="utf-8").splitlines()
    (place / "texts.txt").write_text("\n\n".join(json.loads(line)["text"] for line in lines[::20]), encoding="utf-8")
    (place / "few.jsonl").write_text("\n".join(lines[::10]) + "\n", encoding="utf-8")
    return place / "texts.txt", place / "few.jsonl"


@pytest.fixture(scope="module")
def classifier(
    docstring_classifier: Path, in_domain: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("classifier") / "docstrings"
    labels = docstring_classifier / "test.jsonl"
    code = run(
        "export", str(docstring_classifier), "--profile", "x86-int8", "-o", str(output),
        "--eval-labels", str(labels), "--eval-text", str(in_domain[0]),
        settings=(
            *QUICK, "validation.texts=64", "validation.max_length=48", "budget.min_label_agreement=0.9",
            "budget.max_accuracy_drop=0.005", "budget.max_accuracy_drop_bound=0.01",
        ),
    )  # fmt: skip
    assert code == 0, report_of(output)["verdict"]
    return output


@pytest.mark.timeout(900)
def test_a_trained_classifier_keeps_its_accuracy(classifier: Path) -> None:
    accuracy = report_of(classifier)["drift"]["task_accuracy"]
    assert accuracy["examples"] >= 2000
    assert 0.6 < accuracy["reference"] < 0.98  # flips in either direction could show
    assert abs(accuracy["difference"]) <= 0.005
    low, high = accuracy["interval"]
    assert -0.01 <= low <= accuracy["difference"] <= high <= 0.01
    assert high - low > 0.002, "nothing changed at all: is this the same model twice?"


def shift_bias(artifact: Path, by: float) -> None:
    """Add to the first label's score, whatever the text."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(artifact / "model.onnx", load_external_data=False)
    (bias,) = [item for item in graph.graph.initializer if item.name == "classifier.bias"]
    values = numpy_helper.to_array(bias).copy()
    values[0] += by
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(graph, artifact / "model.onnx")


@pytest.mark.timeout(900)
def test_a_shifted_bias_costs_more_than_the_budget(
    classifier: Path, docstring_classifier: Path, in_domain: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    changed = tmp_path / "changed"
    shutil.copytree(classifier, changed)
    shift_bias(changed, 3.0)
    words = ("--reference", str(docstring_classifier), "--eval-labels", str(in_domain[1]))
    assert cli.run(["validate", str(changed), *words, "--eval-text", str(in_domain[0]), "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["drift"]["task_accuracy"]["interval"][1] < -0.01
    reasons = " ".join(report["verdict"]["reasons"])
    assert "accuracy_drop is" in reasons and "accuracy_drop_bound is" in reasons
    assert json.loads((changed / "manifest.json").read_text())["status"] == "rejected"
