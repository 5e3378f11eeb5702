"""Bad input for encoders through the command line: found out before work, told in three lines, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.cli import run
from test_bad_input import Bench, set_config, set_tensor
from tiny_models import PLAIN_INT8, add_sentence_transformers

UP = "bert.encoder.layer.1.intermediate.dense.weight"
QUICK = ("--profile", PLAIN_INT8)
GOOD = {"text": "The rain in Spain.", "label": "positive"}


@pytest.fixture
def bench(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fast_skeletons: None,
) -> Bench:
    """Return a bench with a classifier of the labels negative, neutral and positive."""
    shutil.copytree(tiny_model("bert:text-classification"), tmp_path / "model")
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    return Bench(tmp_path / "model", tmp_path / "place", capsys)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test fail if a graph or a weight is made."""

    def never(*arguments: Any, **named: Any) -> None:
        raise AssertionError("work started")

    monkeypatch.setattr("compress.pipeline.build", never)


def test_the_model_itself_is_good(bench: Bench) -> None:
    """Control: what the tests below damage does export, sentence-transformers files and all."""
    output = bench.place / "new" / "artifact"
    add_sentence_transformers(bench.model)
    words = ("--task", "embedding", "--no-validate", "--threads", "1")
    assert run(["export", str(bench.model), *QUICK, "-o", str(output), *words]) == 0
    assert (output / "manifest.json").is_file()


# --------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.usefixtures("no_work")
def test_tasks_that_cannot_be(bench: Bench) -> None:
    words = (*QUICK, "--task", "txet-classification")
    bench.refused(2, "unknown task 'txet-classification'", "did you mean text-classification", words=words)
    bench.refused(
        2, "this model cannot do text-generation", "it can: embedding", words=(*QUICK, "--task", "text-generation")
    )


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("task", "tensor"), [("question-answering", "qa_outputs.weight"), ("fill-mask", "cls.predictions")]
)
def test_a_head_that_the_checkpoint_lacks(bench: Bench, task: str, tensor: str) -> None:
    bench.refused(1, f"the checkpoint has no {task} head", tensor, "--task embedding", words=(*QUICK, "--task", task))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (None, "the classification head has no labels: config.json has no id2label"),
        ({}, "id2label names no labels"),
        ({"0": "negative", "1": "positive"}, "the classification head has 3 outputs, config.json names 2 labels"),
        ({"0": "a", "1": "b", "7": "c"}, "id2label does not number its labels from 0 on"),
        ({"zero": "a", "1": "b", "2": "c"}, "id2label does not number its labels from 0 on"),
        (["a", "b", "c"], "id2label names no labels"),
    ],
)
def test_a_classification_head_without_its_labels(bench: Bench, labels: Any, what: str) -> None:
    set_config(bench.model, id2label=labels)
    bench.refused(1, what, "id2label", words=QUICK)


# -------------------------------------------------------------------------------------------------------------- labels


def written(bench: Bench, *lines: str) -> str:
    """Write a labels file whose third line is the first of ``lines``, and return its path."""
    path = bench.model.parent / "labels.jsonl"
    path.write_text("\n".join([json.dumps(GOOD)] * 2 + [*lines] + [json.dumps(GOOD)] * 9) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (json.dumps({"text": "No label."}), ("line 3: the field 'label' is missing", "the line has: text")),
        (json.dumps({"label": "positive"}), ("line 3: the field 'text' is missing",)),
        (json.dumps({"text": " ", "label": "positive"}), ("line 3: text is empty", "delete the line")),
        (json.dumps({"text": "A label.", "label": "positve"}), ("line 3: label 'positve'", "did you mean positive")),
        (json.dumps({"text": "A label.", "label": 3}), ("line 3: label 3 is none of the model's 3", "0 to 2")),
        (json.dumps({"txt": "A text.", "label": 1}), ("line 3: unknown field 'txt'", "did you mean 'text'")),
        ("{'text': 'Not JSON', 'label': 1}", ("line 3: the line is not JSON", "one object a line")),
        ('["text", "label"]', ("line 3: the line is not a JSON object",)),
        ("", ("line 3: the line is empty", "delete it")),
    ],
)
def test_labels_that_are_wrong_are_found_before_work(bench: Bench, line: str, parts: tuple[str, ...]) -> None:
    path = written(bench, line)
    bench.refused(2, *parts, path, words=(*QUICK, "--eval-labels", path), validate=True)


@pytest.mark.usefixtures("no_work")
def test_labels_that_are_not_there_or_not_for_this_model(bench: Bench, tiny_model: Callable[[str], Path]) -> None:
    words = (*QUICK, "--eval-labels", "nowhere.jsonl")
    bench.refused(2, "the labels cannot be read", "nowhere.jsonl", words=words, validate=True)
    words = (*QUICK, "--eval-labels", written(bench))
    bench.refused(2, "this one writes text", "--eval-text", words=words, model=str(tiny_model("llama")), validate=True)
    other = str(tiny_model("distilbert:fill-mask"))
    bench.refused(2, "examples of fill-mask are not evaluated", "leave out", words=words, model=other, validate=True)
    set_config(bench.model, problem_type="multi_label_classification")
    bench.refused(2, "gives a text several labels", words=words, validate=True)


def test_good_labels_pass_the_same_check(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with these, work does start."""

    started = []

    def start(*arguments: Any, **named: Any) -> None:
        started.append(True)
        raise KeyboardInterrupt

    monkeypatch.setattr("compress.pipeline.build", start)
    words = ["export", str(bench.model), *QUICK, "-o", str(bench.place / "new"), "--eval-labels", written(bench)]
    assert run(words) == 130 and started
    assert bench.listing() == []


# --------------------------------------------------------------------------------------------------- texts and lengths


@pytest.mark.usefixtures("no_work")
def test_sequences_beyond_the_position_table(bench: Bench) -> None:
    words = (*QUICK, "--set", "validation.max_length=65")
    bench.refused(2, "65 tokens", "table of 64 positions", "--set validation.max_length=64", words=words, validate=True)


@pytest.mark.usefixtures("no_work")
def test_calibration_texts(bench: Bench) -> None:
    text = bench.model.parent / "text.txt"
    words = ("--profile", "x86-int8", "--calibration-text")
    bench.refused(2, "the text cannot be read", "nowhere.txt", words=(*words, "nowhere.txt"))
    text.write_bytes(b"\xff\xfe text")
    bench.refused(2, "not UTF-8", "text.txt", words=(*words, str(text)))
    text.write_text("Nobody reads this. It is a text, however.")
    plain = ("--profile", PLAIN_INT8, "--calibration-text", str(text))
    bench.refused(2, "calibrates nothing", "text.txt", "leave --calibration-text out", words=plain)


def test_a_calibration_text_without_a_sentence(bench: Bench) -> None:
    text = bench.model.parent / "text.txt"
    text.write_text("- -\n\n- -\n")
    words = ("--profile", "x86-int8", "--calibration-text", str(text))
    bench.refused(2, "no sentence of three words", "text.txt", "use a longer text", words=words)


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("modules.json", "{", "not JSON"),
        ("modules.json", "[]", "no order that is known"),
        ("modules.json", '[{"path": ""}]', "has no type or no path"),
        ("modules.json", '[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]', "a module"),
        ("modules.json", '[{"type": "sentence_transformers.models.Transformer", "path": "../etc"}]', "'../etc'"),
        ("1_Pooling/config.json", "{}", "no pooling mode is turned on"),
        ("1_Pooling/config.json", '{"pooling_mode_mean_tokens": "yes"}', "not true or false"),
        ("1_Pooling/config.json", '{"pooling_mode": "median"}', "'median' has no implementation"),
        ("1_Pooling/config.json", '{"pooling_mode": "mean", "word_embedding_dimension": 99}', "99"),
        ("sentence_bert_config.json", '{"max_seq_length": "long"}', "max_seq_length is 'long'"),
    ],
)
def test_damaged_sentence_transformers_files(bench: Bench, name: str, content: str, what: str) -> None:
    add_sentence_transformers(bench.model)
    (bench.model / name).write_text(content)
    bench.refused(1, what, Path(name).name, words=(*QUICK, "--task", "embedding"))


@pytest.mark.usefixtures("no_work")
def test_no_pooling_settings(bench: Bench) -> None:
    add_sentence_transformers(bench.model)
    (bench.model / "1_Pooling" / "config.json").unlink()
    bench.refused(1, "the pooling's settings are missing", "all of its files", words=(*QUICK, "--task", "embedding"))


@pytest.mark.usefixtures("no_work")
def test_no_tokenizer(bench: Bench) -> None:
    for path in bench.model.glob("tokenizer*"):
        path.unlink()
    bench.refused(1, "the tokenizer is missing", "copy the tokenizer's files", words=QUICK)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("profile", ["float", PLAIN_INT8])
def test_weights_that_are_no_numbers(bench: Bench, value: float, profile: str) -> None:
    set_tensor(bench.model, UP, (11, 5), value)
    bench.refused(1, f"not a finite number: {value}", f"{UP}, row 11", "fetch it again", words=("--profile", profile))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"hidden_size": "64"}, ("hidden_size", "restore")),
        ({"num_hidden_layers": 1 << 30}, ("num_hidden_layers", "restore")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers",)),
        ({"num_attention_heads": 7}, ("not a multiple of 7 attention heads",)),
        ({"max_position_embeddings": 128}, ("config and weights disagree", "position_embeddings")),
        ({"type_vocab_size": -1}, ("type_vocab_size",)),
        ({"intermediate_size": 200}, ("config and weights disagree", "intermediate")),
        ({"hidden_act": "swish"}, ("hidden_act",)),
        ({"is_decoder": True}, ("is_decoder",)),
        ({"position_embedding_type": "relative_key"}, ("position_embedding_type",)),
        ({"architectures": ["BertForNothing"]}, ("BertForNothing",)),
        ({"num_hidden_layers": 4}, ("lacks a tensor", "layer.3")),
    ],
)
def test_hostile_configs(bench: Bench, changes: dict[str, Any], parts: tuple[str, ...]) -> None:
    set_config(bench.model, **changes)
    bench.refused(1, *parts, words=QUICK)


def test_fusions_that_do_not_happen(bench: Bench) -> None:
    words = (*QUICK, "--set", "graph.minimum_fusions.attention=2")
    bench.refused(1, "attention fired 3 times, 2 a layer make 6", "graph.minimum_fusions={}", words=words)
    words = (*QUICK, "--set", "graph.fusions=[]")
    bench.refused(1, "attention fired 0 times, 1 a layer make 3", words=words)


# ----------------------------------------------------------------------------------------------------------- artifacts


def test_generate_needs_a_model_that_writes(
    tiny_artifact: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = tiny_artifact("bert:embedding", PLAIN_INT8)
    before = sorted(artifact.iterdir())
    capsys.readouterr()
    assert run(["generate", str(artifact), "Why?"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.strip().splitlines()) == 3
    assert "encoder (embedding)" in err and "last_hidden_state, sentence_embedding" in err
    assert sorted(artifact.iterdir()) == before
