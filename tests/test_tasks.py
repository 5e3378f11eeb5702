"""Tasks: read from the architecture, or asked for; a checkpoint that cannot do one says what it can do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress import catalog, pipeline
from compress.contracts import Encoder
from compress.errors import CompressError, SourceError, UnsupportedModelError, UsageError
from compress.families import available_families, load_family
from compress.source import open_checkpoint
from compress.tasks import TASKS, architecture_of, load_task, retask, task_of
from tiny_models import ENCODER_STEMS, TASK_SUFFIXES


def structure(directory: Path, task: str | None = None) -> Encoder:
    with open_checkpoint(str(directory), task=task) as checkpoint:
        found = pipeline.describe(checkpoint)
    assert isinstance(found, Encoder)
    return found


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "embedding"),
        ("ElectraForPreTraining", "embedding"),
        ("DistilBertForSequenceClassification", "text-classification"),
        ("AlbertForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"),
        ("ElectraForMaskedLM", "fill-mask"),
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
    ],
)
def test_the_architecture_says_the_task(architecture: str, task: str) -> None:
    assert task_of({"architectures": [architecture, "OtherForMaskedLM"]}).name == task


@pytest.mark.parametrize("given", [None, [], "BertModel", [5], {}, [[]]])
def test_a_config_without_an_architecture_is_told_to_name_the_task(given: Any) -> None:
    assert architecture_of({"architectures": given}) is None
    with pytest.raises(UnsupportedModelError, match="names no architecture") as caught:
        task_of({"architectures": given})
    assert "--task" in (caught.value.hint or "")


def test_an_architecture_with_another_head_lists_the_tasks() -> None:
    for name in ("BertForMultipleChoice", "BertForNextSentencePrediction", "x" * 5000):
        with pytest.raises(UnsupportedModelError, match="has no task here") as caught:
            task_of({"architectures": [name]})
        assert len(str(caught.value)) < 400 and "fill-mask" in (caught.value.hint or "")


def test_names_and_aliases() -> None:
    names = [name for task in TASKS for name in (task.name, *task.aliases)]
    assert len(set(names)) == len(names)
    for task in TASKS:
        assert [load_task(name) for name in (task.name, *task.aliases)] == [task] * (1 + len(task.aliases))
    with pytest.raises(UsageError, match="unknown task 'fil-mask'") as caught:
        load_task("fil-mask")
    assert "did you mean fill-mask" in (caught.value.hint or "")


# ----------------------------------------------------------------------------------------------------------- asking for


def test_retask_names_the_familys_own_class() -> None:
    architectures = load_family({"model_type": "electra"}).architectures
    config = {"architectures": ["ElectraForPreTraining"], "hidden_size": 8}
    assert retask(config, "masked-lm", architectures) == {**config, "architectures": ["ElectraForMaskedLM"]}
    assert retask(config, "embedding", architectures)["architectures"] == ["ElectraModel"]
    assert config["architectures"] == ["ElectraForPreTraining"], "the caller's config is not written to"


@pytest.mark.parametrize("family", available_families())
def test_every_family_can_do_what_it_says_and_nothing_else(family: str) -> None:
    architectures = load_family({"model_type": family}).architectures
    tasks = {task_of({"architectures": [name]}).name for name in architectures}
    for task in TASKS:
        if task.name in tasks:
            assert task_of(retask({}, task.name, architectures)) is task
        else:
            with pytest.raises(UsageError, match=f"cannot do {task.name}") as caught:
                retask({}, task.name, architectures)
            assert caught.value.hint == f"it can: {', '.join(sorted(tasks))}"


@pytest.mark.parametrize("family", ENCODER_STEMS)
def test_a_fill_mask_checkpoint_gives_an_embedding(family: str, tiny_model: Callable[[str], Path]) -> None:
    directory = tiny_model(f"{family}:fill-mask")
    assert structure(directory).task == "fill-mask"
    found = structure(directory, "feature-extraction")
    assert found.task == "embedding"
    assert [linear.role for linear in found.linears if linear.role == "head"] == []


@pytest.mark.parametrize("task", [task for task in TASK_SUFFIXES if task != "embedding"])
def test_an_embedding_checkpoint_has_no_head_for_another_task(task: str, tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(SourceError, match=f"the checkpoint has no {task} head") as caught:
        structure(tiny_model("bert:embedding"), task)
    assert "--task embedding" in (caught.value.hint or "")


def test_a_checkpoint_whose_own_head_nobody_exports_can_be_asked_for_another(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_model("bert:fill-mask"), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["BertForNextSentencePrediction"]}))
    with pytest.raises(UnsupportedModelError, match="BertForNextSentencePrediction"):
        structure(directory)
    assert structure(directory, "embedding").task == "embedding"


def test_decoders_and_encoders_do_not_swap_tasks(tiny_model: Callable[[str], Path]) -> None:
    for name, task in (("llama", "embedding"), ("bert:embedding", "text-generation")):
        with pytest.raises(UsageError, match=f"cannot do {task}"):
            structure(tiny_model(name), task)
    with pytest.raises(UsageError, match="unknown task"):
        structure(tiny_model("llama"), "chat")


@pytest.mark.usefixtures("fast_skeletons")
def test_the_artifact_says_what_it_can_do(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Its config names the architecture that was exported, not the checkpoint's."""
    import onnxruntime as ort

    from compress.profile import load_profile
    from compress.progress import Stages

    model = pipeline.ModelReference(str(tiny_model("distilbert:fill-mask")), task="embedding")
    options = pipeline.ExportOptions(validate=False, threads=1)
    pipeline.export(model, load_profile("float"), tmp_path / "out", options, Stages())
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert exported["architectures"] == ["DistilBertModel"]
    original = json.loads((tiny_model("distilbert:fill-mask") / "config.json").read_text())
    assert {**exported, "architectures": original["architectures"]} == original
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]


# ------------------------------------------------------------------------------------------------------------- catalog


@pytest.mark.parametrize("entry", catalog.entries(), ids=lambda entry: entry.name)
def test_every_short_name_stands_for_a_task_that_its_family_does(entry: catalog.CatalogEntry) -> None:
    reference = pipeline.ModelReference(entry.name)
    assert reference.wanted_task is not None
    config = {"model_type": entry.model_type}
    retask(config, reference.wanted_task, load_family(config).architectures)


def test_a_short_names_task_gives_way_to_the_users_and_to_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipeline.ModelReference("minilm").wanted_task == "embedding"
    assert pipeline.ModelReference("minilm", task="fill-mask").wanted_task == "fill-mask"
    assert pipeline.ModelReference("someone/model").wanted_task is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").mkdir()
    assert pipeline.ModelReference("minilm").wanted_task is None, "a directory of that name comes first"
    with pytest.raises(CompressError):
        pipeline.ModelReference("minilm").open()
