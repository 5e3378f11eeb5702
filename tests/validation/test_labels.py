"""Labels files: what each task takes, and every mistake with its line number; scores against naive ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import CompressError, UsageError
from compress.report.model import EncoderDrift
from compress.validation import CheckpointSpec, evaluation, labels
from compress.validation.artifact import Artifact
from compress.validation.encoder_run import run_encoder_validation
from compress.validation.encoder_speed import EncoderSpeedPlan
from compress.validation.labels import label_names, read_labels
from compress.validation.paired import accuracy_interval, spearman

NAMES = {"0": "good", "1": "bad", "2": "other"}


def model(task: str = "text-classification", **config: Any) -> Artifact:
    return Artifact(Path(), Path(), {}, 100, 64, task, {"id2label": NAMES, **config})


def written(directory: Path, records: Any) -> Path:
    path = directory / "labels.jsonl"
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def classified(count: int = 12) -> list[Any]:
    return [{"text": f"text {i}", "label": list(NAMES.values())[i % 3], "id": i} for i in range(count)]


def test_names_numbers_and_pairs_are_a_classifiers(tmp_path: Path) -> None:
    records = [*classified(9), {"text": "a", "text_pair": "b", "label": 2}, {"text": "c", "label": 0}]
    path = written(tmp_path, records)
    found = read_labels(path, model())
    assert (found.kind, found.name, len(found.examples)) == ("class", "labels.jsonl", 11)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [example.truth for example in found.examples] == [0, 1, 2] * 3 + [2, 0]
    assert found.examples[9].other == "b" and found.examples[10].other is None
    assert evaluation.inputs(found, "text-classification")[9] == ("a", "b")


def test_an_embedding_takes_graded_pairs_or_labels_of_any_name(tmp_path: Path) -> None:
    pairs = [{"text_a": f"a{i}", "text_b": f"b{i}", "score": i / 3} for i in range(10)]
    found = read_labels(written(tmp_path, pairs), model("embedding"))
    assert found.kind == "score" and found.examples[3].truth == 1.0
    assert evaluation.inputs(found, "embedding")[:3] == [("a0", None), ("b0", None), ("a1", None)]
    topics = [{"text": f"t{i}", "label": i // 2 if i % 2 else str(i // 2)} for i in range(10)]
    found = read_labels(written(tmp_path, topics), model("embedding"))
    assert found.kind == "neighbour" and [example.truth for example in found.examples] == [i // 2 for i in range(10)]


def test_one_output_takes_scores_of_a_text_or_a_pair(tmp_path: Path) -> None:
    records = [{"text_a": "x", "text_b": f"y{i}", "score": i} for i in range(6)]
    records += [{"text": f"z{i}", "score": -i} for i in range(6)]
    found = read_labels(written(tmp_path, records), model(id2label={"0": "LABEL_0"}))
    assert found.kind == "score" and found.examples[0].other == "y0" and found.examples[7].other is None


GOOD: dict[str, Any] = {"text": "t", "label": "good"}


@pytest.mark.parametrize(
    ("line", "what", "hint"),
    [
        ({"label": "good"}, "the field 'text' is missing", "the line has: label"),
        ({"text": "t"}, "the field 'label' is missing", "the line has: text"),
        ({"text": "t", "lable": "good"}, "unknown field 'lable'", "did you mean 'label'"),
        ({"text": "t", "label": "goood"}, "label 'goood' is none of the model's", "did you mean good"),
        ({"text": "t", "label": 3}, "label 3 is none of the model's 3", "0 to 2"),
        ({"text": "t", "label": -1}, "label -1 is none", "0 to 2"),
        ({"text": "t", "label": True}, "label is true or false", "name or its number"),
        ({"text": "t", "label": 1.0}, "label is a number", "name or its number"),
        ({"text": "t", "label": None}, "label is null", "name or its number"),
        ({"text": "", "label": "good"}, "text is empty", "delete the line"),
        ({"text": " \n", "label": "good"}, "text is empty", "delete the line"),
        ({"text": ["t"], "label": "good"}, "text is a list, not a text", "a string"),
        ({"text": 5, "label": "good"}, "text is a number, not a text", "a string"),
        ({**GOOD, "text_pair": ""}, "text_pair is empty", "delete the line"),
        ({**GOOD, "txt_pair": "u"}, "unknown field 'txt_pair'", "did you mean 'text_pair'"),
        ('{"text": "\\ud800", "label": "good"}', "half of a surrogate pair", "in UTF-8"),
        ({"text_a": "a", "text_b": "b", "score": 1}, "gives labels, not scores", '"text_pair"'),
        ("[1, 2]", "not a JSON object", '"label"'),
        ("{'text': 1}", "the line is not JSON: Expecting property name", '"label"'),
        ("[" * 100_000, "the line is not JSON", '"label"'),
        ("", "the line is empty", "delete it"),
        ('{"text": "t", "label": NaN}', "NaN is not JSON", "a number"),
    ],
)
def test_every_mistake_names_its_line_and_the_remedy(line: Any, what: str, hint: str, tmp_path: Path) -> None:
    path = written(tmp_path, [*classified(), line, *classified()])
    with pytest.raises(UsageError) as caught:
        read_labels(path, model())
    assert caught.value.what.startswith("line 13: ") and what in caught.value.what
    assert hint in str(caught.value.hint) and caught.value.where == str(path)
    assert len(caught.value.render().splitlines()) == 3


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ({"text_a": "a", "text_b": "b"}, "the field 'score' is missing"),
        ({"text_a": "a", "score": 1}, "the field 'text_b' is missing"),
        ({"text_a": "a", "text_b": "b", "score": "high"}, "score is a text, not a number"),
        ({"text_a": "a", "text_b": "b", "score": False}, "score is true or false"),
        ('{"text_a": "a", "text_b": "b", "score": 1e999}', "score is not finite"),
        ('{"text_a": "a", "text_b": "b", "score": 1' + "0" * 400 + "}", "score is not finite"),
        ({"text": "t", "label": "x"}, "another form than the lines before"),
    ],
)
def test_scores_are_checked_too(line: Any, what: str, tmp_path: Path) -> None:
    pairs = [{"text_a": f"a{i}", "text_b": f"b{i}", "score": i} for i in range(12)]
    with pytest.raises(UsageError, match="line 13: ") as caught:
        read_labels(written(tmp_path, [*pairs, line]), model("embedding"))
    assert what in caught.value.what


def test_bytes_that_are_not_text_name_their_line(tmp_path: Path) -> None:
    path = written(tmp_path, classified())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b'{"text": "\xff", "label": 0}\n')  # a BOM is fine
    with pytest.raises(UsageError, match="line 13: the line is not UTF-8"):
        read_labels(path, model())


def test_files_of_the_wrong_size_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="line 9: the file ends after 9 examples"):
        read_labels(written(tmp_path, classified(9)), model())
    with pytest.raises(UsageError, match="line 0: the file ends after 0 examples"):
        (tmp_path / "empty.jsonl").write_bytes(b"")
        read_labels(tmp_path / "empty.jsonl", model())
    with pytest.raises(UsageError, match="cannot be read"):
        read_labels(tmp_path / "absent.jsonl", model())
    monkeypatch.setattr(labels, "MAX_EXAMPLES", 11)
    with pytest.raises(UsageError, match="line 12: there are more than 11 examples"):
        read_labels(written(tmp_path, classified()), model())
    monkeypatch.setattr(labels, "MAX_LINE_BYTES", 100)
    with pytest.raises(UsageError, match="line 2: the line is longer than a megabyte"):
        read_labels(written(tmp_path, [GOOD, {"text": "t" * 200, "label": 0}]), model())


def test_truths_that_cannot_tell_anything_are_refused(tmp_path: Path) -> None:
    same = [{"text_a": f"a{i}", "text_b": "b", "score": 1} for i in range(10)]
    with pytest.raises(UsageError, match="all scores are the same"):
        read_labels(written(tmp_path, same), model("embedding"))
    for label in ("x", None):
        records = [{"text": f"t{i}", "label": label or f"l{i}"} for i in range(10)]
        with pytest.raises(UsageError, match="all texts have the same label|no two texts have the same label"):
            read_labels(written(tmp_path, records), model("embedding"))


@pytest.mark.parametrize("task", ["token-classification", "question-answering", "fill-mask"])
def test_tasks_without_a_metric_say_so(task: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"labelled examples of {task} are not evaluated"):
        read_labels(written(tmp_path, classified()), model(task))


def test_several_labels_a_text_are_not_evaluated(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="several labels"):
        read_labels(written(tmp_path, classified()), model(problem_type="multi_label_classification"))


def test_a_head_without_label_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 1: the model's config names no labels"):
        read_labels(written(tmp_path, classified()), model(id2label={}))
    assert label_names({"id2label": {"1": "b", "0": "a"}}) == ["a", "b"]
    assert label_names({"num_labels": 2}) == ["LABEL_0", "LABEL_1"]
    for broken in ({"id2label": {"0": "a", "2": "c"}}, {"id2label": {"x": "a"}}, {"id2label": []}, {}):
        assert label_names(broken) is None


# ----------------------------------------------------------------------------------------------------------- metrics


def test_accuracy_flips_and_interval_are_those_of_a_naive_count(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    found = read_labels(written(tmp_path, classified(60)), model())
    reference = generator.normal(size=(60, 3)) + 2 * np.eye(3)[np.arange(60) % 3]
    artifact = reference + generator.normal(size=(60, 3))
    made = evaluation.evaluate(found, "text-classification", reference, artifact, truncated=2, max_length=64)
    truth = [int(example.truth) for example in found.examples]
    before, after = reference.argmax(1).tolist(), artifact.argmax(1).tolist()
    lost = sum(b == t != a for b, a, t in zip(before, after, truth, strict=True))
    won = sum(a == t != b for b, a, t in zip(before, after, truth, strict=True))
    assert made.metric == "accuracy" and made.examples == 60 and made.truncated == 2 and made.flips is not None
    assert (made.flips.right_to_wrong, made.flips.wrong_to_right) == (lost, won) and lost > won > 0
    assert made.flips.changed == sum(b != a for b, a in zip(before, after, strict=True)) >= lost + won
    assert made.reference == np.mean([b == t for b, t in zip(before, truth, strict=True)])
    assert made.difference == pytest.approx(made.artifact - made.reference) == pytest.approx((won - lost) / 60)
    assert made.interval == accuracy_interval(lost, won, 60)


def test_graded_similarity_is_the_rank_correlation_of_cosines(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pairs = [{"text_a": f"a{i}", "text_b": f"b{i}", "score": i % 7} for i in range(30)]
    found = read_labels(written(tmp_path, pairs), model("embedding"))
    vectors = generator.normal(size=(60, 5))
    cosines = [float(vectors[2 * i] @ vectors[2 * i + 1] / np.prod(np.linalg.norm(vectors[2 * i : 2 * i + 2], axis=1)))
               for i in range(30)]  # fmt: skip
    made = evaluation.evaluate(found, "embedding", vectors, 3 * vectors, truncated=0, max_length=64)
    expected = spearman(np.array(cosines), np.arange(30) % 7.0)
    assert made.metric == "spearman" and made.flips is None
    assert made.reference == pytest.approx(expected) and made.difference == 0 and made.interval == (0, 0)
    with pytest.raises(CompressError, match="the artifact gives every example the same score"):
        evaluation.evaluate(found, "embedding", vectors, np.ones((60, 5)), truncated=0, max_length=64)


def test_neighbours_of_a_label_are_retrieval(tmp_path: Path) -> None:
    records = [{"text": f"t{i}", "label": f"topic {i // 2}"} for i in range(12)]
    found = read_labels(written(tmp_path, records), model("embedding"))
    vectors = np.repeat(np.eye(6), 2, axis=0) + 0.01 * np.arange(12)[:, None]
    worse = vectors.copy()
    worse[[1, 3]] = worse[[3, 1]]  # two texts found the other's topic
    made = evaluation.evaluate(found, "embedding", vectors, worse, truncated=0, max_length=64)
    assert made.metric == "neighbour_accuracy" and made.reference == 1
    assert made.artifact == pytest.approx(8 / 12) and made.flips is not None and made.flips.right_to_wrong == 4


def test_fewer_outputs_than_labels_are_refused(tmp_path: Path) -> None:
    found = read_labels(written(tmp_path, classified()), model())
    with pytest.raises(CompressError, match="the model has 2 outputs, the labels name class 2"):
        evaluation.evaluate(found, "text-classification", np.ones((12, 2)), np.ones((12, 2)), truncated=0, max_length=9)


# ------------------------------------------------------------------------------------------------------ from end to end


@pytest.mark.usefixtures("reference_in_process")
def test_labelled_examples_go_through_both_sides(tiny_encoders: Path, tmp_path: Path) -> None:
    words = ["compound", "import", "class", "yield", "operator", "lambda", "module", "string", "slice", "method"]
    records = [
        {"text": f"the {a} {b} " * (40 if a == "class" else 1), "label": (i + j) % 3, "text_pair": a if j % 2 else None}
        for i, a in enumerate(words)
        for j, b in enumerate(words)
    ]
    task = "text-classification"
    broken = shutil.copytree(tiny_encoders / "artifact" / task, tmp_path / "broken")
    swap_labels(broken / "model.onnx")
    made = {}
    for name, artifact in (("good", tiny_encoders / "artifact" / task), ("broken", broken)):
        result = run_encoder_validation(
            artifact,
            checkpoint_spec=CheckpointSpec(str(tiny_encoders / "source" / task)),
            budgets={"max_accuracy_drop": 0.0, "max_accuracy_drop_bound": 0.04},
            eval_labels=written(tmp_path, records),
            texts=16,
            pytorch_baseline=False,
            speed_plan=EncoderSpeedPlan(lengths=(8,), batches=(1,), repeats=1, seconds=0.01, runs=2),
        )
        assert isinstance(result.drift, EncoderDrift) and result.drift.task_accuracy is not None
        made[name] = (result.drift.task_accuracy, result.verdict)
    accuracy, verdict = made["good"]
    assert (accuracy.examples, accuracy.truncated, accuracy.max_length) == (100, 10, 64)
    assert accuracy.difference == 0 and 0.1 < accuracy.reference < 0.9
    assert verdict.status == "pass" and accuracy.interval[0] == pytest.approx(-0.037, abs=0.001)
    accuracy, verdict = made["broken"]
    assert accuracy.reference == made["good"][0].reference
    assert accuracy.flips is not None and accuracy.flips.changed > 20 and verdict.status == "fail"
    assert any(reason.startswith("accuracy_drop_bound is ") for reason in verdict.reasons)


def swap_labels(path: Path) -> None:
    import onnx_ir as ir

    graph = ir.load(path)
    (value,) = (value for name, value in graph.graph.initializers.items() if name.endswith("sequence.weight"))
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy()[[1, 0, 2]], name=value.name)
    ir.save(graph, path)
