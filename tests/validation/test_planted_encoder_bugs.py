"""The gate against planted bugs in encoder graphs: each makes a good artifact fail, and without one it passes.

Budgets are what int8 costs: the same graph with its weights rounded to 8 bits has to pass them too. The model is random
with wide weights, so that what is small in the graph is not small in its outputs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from compress.report.model import EncoderDrift
from compress.validation import encoder_measure, encoder_run
from compress.validation.artifact import open_artifact
from compress.validation.encoder_speed import EncoderSpeedPlan
from compress.validation.on_provider import Terms
from compress.validation.run import CheckpointSpec, Measured, verdicts

PLAN = EncoderSpeedPlan(repeats=1, timeout=120)
# 8-bit weights cost: worst cosine 0.9997, neighbours 0.948, labels 0.979; the mildest bugs 0.987, 0.77, 0.896.
BUDGETS = {"min_cosine": 0.999, "min_worst_cosine": 0.995, "min_neighbour_agreement": 0.86, "min_label_agreement": 0.94}


@dataclass(frozen=True)
class Fixture:
    """The artifacts, and what the source model says of the texts, by task."""

    root: Path
    references: dict[str, encoder_measure.Reference]


@pytest.fixture(scope="module")
def good(tiny_encoders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fixture]:
    """Run the source models once."""
    from compress.validation import encoder_reference

    references = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            encoder_measure,
            "run_worker",
            lambda module, request, **_: encoder_reference.handle(request, tmp_path_factory.mktemp("job")),
        )
        for task in ("embedding", "text-classification"):
            references[task] = encoder_measure.make_reference(
                open_artifact(tiny_encoders / "artifact" / task),
                encoder_measure.Source(CheckpointSpec(str(tiny_encoders / "source" / task)), "mean", True, None),
                None,
                None,
                96,
                None,
                PLAN,
                tmp_path_factory.mktemp("reference"),
                [],
                lambda stage, fraction: None,
            )
    yield Fixture(tiny_encoders, references)


def judged(directory: Path, task: str, good: Fixture, work: Path) -> tuple[Any, Measured]:
    """Measure an artifact against the reference and judge it."""
    measured = Measured()
    work.mkdir()
    artifact = open_artifact(directory)
    encoder_run.measure_graph(
        artifact, "cpu", good.references[task], measured, PLAN, work, [], lambda stage, fraction: None
    )
    return verdicts(BUDGETS, {"cpu": measured}, artifact.bytes, Terms(), task=task)[0], measured


def mutated(good: Fixture, task: str, directory: Path, mutate: Callable[[ir.Model], None]) -> Path:
    """Return a copy of the good artifact with one change to its graph or weights."""
    shutil.copytree(good.root / "artifact" / task, directory)
    model = ir.load(directory / "model.onnx")
    mutate(model)
    ir.save(model, directory / "model.onnx")
    return directory


def change(model: ir.Model, ending: str, edit: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> None:
    """Edit the initializers whose name ends so; each must become another array of the same shape and type."""
    found = [value for name, value in model.graph.initializers.items() if name.endswith(ending)]
    assert found
    for value in found:
        assert value.const_value is not None
        before = value.const_value.numpy().copy()
        after = edit(before.copy())
        assert after.shape == before.shape and after.dtype == before.dtype and (after != before).any()
        value.const_value = ir.tensor(after, name=value.name)


def replace(model: ir.Model, name: str, op_types: set[str], make: Callable[[ir.Value], ir.Node]) -> None:
    """Let the consumers of an input that have one of these types read ``make(input)`` instead."""
    source = next(value for value in model.graph.inputs if value.name == name)
    consumers = [(use.node, use.idx) for use in source.uses() if use.node.op_type in op_types]
    assert consumers
    node = make(source)
    model.graph.insert_before(consumers[0][0], node)
    for consumer, index in consumers:
        consumer.replace_input_with(index, node.outputs[0])


def swapped_rows(model: ir.Model) -> None:
    """Two rows of the token table change places: those of two frequent tokens."""

    def swap(table: npt.NDArray[Any]) -> npt.NDArray[Any]:
        table[[5, 6, 7, 8, 9, 10, 11, 12]] = table[[6, 5, 8, 7, 10, 9, 12, 11]]
        table[[20, 21, 22, 23, 24, 25, 26, 27]] = table[[21, 20, 23, 22, 25, 24, 27, 26]]
        return table

    change(model, "word_embeddings.weight", swap)


def shifted_positions(model: ir.Model) -> None:
    """Positions begin at one."""
    change(model, "position_embeddings.weight", lambda table: np.roll(table, -1, axis=0))


def dropped_bias(model: ir.Model) -> None:
    """The first biases of the feed-forwards are lost."""
    for layer in (0, 1):
        change(model, f"layer.{layer}.intermediate.dense.bias", np.zeros_like)


def leaking_mask(model: ir.Model) -> None:
    """Attention sees padding; pooling does not."""
    replace(model, "attention_mask", {"Cast"}, lambda mask: ir.Node("", "Equal", [mask, mask]))


def pooled_padding(model: ir.Model) -> None:
    """The mean is over padding too; attention does not see it."""
    source = model.graph.inputs[1]
    assert source.name == "attention_mask"
    equal = ir.Node("", "Equal", [source, source])
    ones = ir.Node("", "Cast", [equal.outputs[0]], [ir.AttrInt64("to", ir.DataType.INT64)])
    (use,) = [use for use in source.uses() if use.node.op_type == "Unsqueeze"]
    model.graph.insert_before(use.node, [equal, ones])
    use.node.replace_input_with(use.idx, ones.outputs[0])


def ignored_types(model: ir.Model) -> None:
    """A pair's second text counts as the first."""
    replace(model, "token_type_ids", {"Gather"}, lambda types: ir.Node("", "Sub", [types, types]))


def swapped_labels(model: ir.Model) -> None:
    """The classifier's rows are in another order."""
    change(model, "sequence.weight", lambda weight: weight[[1, 0, 2]])


def nothing(model: ir.Model) -> None:
    """Change nothing: the round trip through the graph library is not what fails."""


EMBEDDING_BUGS = (swapped_rows, shifted_positions, dropped_bias, leaking_mask, pooled_padding)
CLASSIFIER_BUGS = (swapped_rows, shifted_positions, dropped_bias, leaking_mask, ignored_types, swapped_labels)


def rounded(model: ir.Model) -> None:
    """Round the weight of every matrix product to 8 bits a column, and the token table to 8 bits a row."""
    table = next(value for name, value in model.graph.initializers.items() if "word_embeddings" in name)
    axes = {node.inputs[1]: 0 for node in model.graph if node.op_type == "MatMul"} | {table: 1}
    done = 0
    for value, axis in axes.items():
        if value is not None and value.const_value is not None:
            weight = value.const_value.numpy()
            scale = np.abs(weight).max(axis=axis, keepdims=True).clip(1e-9) / np.float32(127)  # padding is all zeros
            value.const_value = ir.tensor(np.round(weight / scale) * scale, name=value.name)
            done += 1
    assert done == 2 * 6 + 1


@pytest.mark.parametrize("task", ["embedding", "text-classification"])
def test_a_good_graph_passes_in_float_and_in_int8(task: str, good: Fixture, tmp_path: Path) -> None:
    for mutate in (nothing, rounded):
        directory = mutated(good, task, tmp_path / mutate.__name__, mutate)
        result, measured = judged(directory, task, good, tmp_path / f"work-{mutate.__name__}")
        assert result.status == "pass", result.reasons
        assert isinstance(measured.drift, EncoderDrift) and measured.failures == []
    drift = measured.drift
    if task == "embedding":
        assert drift.cosine is not None and drift.cosine.mean < 1 - 1e-5  # int8 does cost something
    else:
        assert drift.logit_max_abs is not None and drift.logit_max_abs > 0.005


@pytest.mark.parametrize("bug", EMBEDDING_BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_fails_an_embedding(bug: Callable[[ir.Model], None], good: Fixture, tmp_path: Path) -> None:
    result, measured = judged(mutated(good, "embedding", tmp_path / "bug", bug), "embedding", good, tmp_path / "work")
    assert result.status == "fail" and measured.failures == []
    # The mean over some padding too hardly turns a vector, but it changes which one is nearest.
    assert any("neighbour_agreement is " in reason for reason in result.reasons), result.reasons
    assert bug is pooled_padding or any(reason.startswith("cosine is ") for reason in result.reasons), result.reasons


@pytest.mark.parametrize("bug", CLASSIFIER_BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_fails_a_classifier(bug: Callable[[ir.Model], None], good: Fixture, tmp_path: Path) -> None:
    task = "text-classification"
    result, measured = judged(mutated(good, task, tmp_path / "bug", bug), task, good, tmp_path / "work")
    assert result.status == "fail" and measured.failures == []
    assert any("label_agreement is " in reason for reason in result.reasons), result.reasons


def test_scores_that_are_not_finite_are_a_reason(good: Fixture, tmp_path: Path) -> None:
    def broken(model: ir.Model) -> None:
        change(model, "embeddings.LayerNorm.weight", lambda weight: weight * np.float32(np.nan))

    for task, what in (("embedding", "an embedding"), ("text-classification", "scores")):
        directory = mutated(good, task, tmp_path / task, broken)
        result, measured = judged(directory, task, good, tmp_path / f"{task}-work")
        assert result.status == "fail" and measured.drift is None
        assert f"the artifact gave {what} that" in result.reasons[0] and "not finite" in result.reasons[0]
        assert any("was not measured (the run failed)" in reason for reason in result.reasons[1:])


def test_a_graph_of_another_shape_is_a_reason(good: Fixture, tmp_path: Path) -> None:
    shutil.copytree(good.root / "artifact" / "embedding", tmp_path / "a")
    shutil.copy(good.root / "artifact" / "token-classification" / "model.onnx", tmp_path / "a")
    result, _ = judged(tmp_path / "a", "embedding", good, tmp_path / "work")
    assert result.status == "fail" and "the graph lacks the output last_hidden_state of embedding" in result.reasons[0]
