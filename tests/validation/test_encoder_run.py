"""Encoders from an artifact directory to a verdict: every task, and what the source model is held to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_models import CLASSES, POSITIONS

from compress import validation
from compress.errors import CompressError, ResourceError, SourceError, UsageError, WorkerError
from compress.report.model import DecoderDrift, EncoderDrift, EncoderSpeed, Report
from compress.validation import encoder_measure, encoder_run
from compress.validation.encoder_run import run_encoder_validation
from compress.validation.encoder_speed import EncoderSpeedPlan

PLAN = EncoderSpeedPlan(lengths=(8, 16, 512), batches=(1, 2), repeats=1, seconds=0.01, runs=3, timeout=120)
BUDGETS = {
    "max_kl": 1e-9,  # a decoder's: it is skipped
    "min_cosine": 0.999999,
    "min_worst_cosine": 0.99999,
    "min_neighbour_agreement": 0.99,
    "min_label_agreement": 0.99,
}


def validated(root: Path, task: str, **changes: Any) -> validation.Validation:
    """Run a small validation of a tiny encoder."""
    settings: dict[str, Any] = {
        "checkpoint_spec": validation.CheckpointSpec(str(root / "source" / task)),
        "budgets": BUDGETS,
        "texts": 48,
        "pooling": "mean",
        "normalize": True,
        "pytorch_baseline": False,
        "speed_plan": PLAN,
    }
    return run_encoder_validation(root / "artifact" / task, **{**settings, **changes})


@pytest.mark.usefixtures("reference_in_process")
@pytest.mark.parametrize("task", CLASSES)
def test_a_float_graph_of_every_task_is_its_source(task: str, tiny_encoders: Path) -> None:
    result = validated(tiny_encoders, task)
    assert result.verdict.status == "pass", result.verdict.reasons
    drift = result.drift
    assert isinstance(drift, EncoderDrift)
    assert drift.task == task and 40 <= drift.texts <= 48 and drift.max_length == POSITIONS
    assert drift.reference == "PyTorch float32 of F32 weights"
    if task == "embedding":
        assert drift.cosine is not None and drift.cosine.min > 1 - 1e-5
        assert drift.neighbour_agreement == 1 and drift.label_agreement is None and drift.logit_max_abs is None
        assert (drift.unit, drift.items) == ("texts", drift.texts)
    else:
        assert drift.cosine is None and drift.label_agreement is not None and drift.label_agreement > 0.99
        assert drift.logit_max_abs is not None and 0 < drift.logit_max_abs < 1e-3
        assert drift.kl_divergence is not None and drift.kl_divergence.mean < 1e-7
    units = {"token-classification": "tokens", "fill-mask": "masked positions"}
    assert drift.unit == units.get(task, "texts")
    if drift.unit == "tokens":
        assert drift.items == drift.tokens - 2 * drift.texts  # special tokens do not count
    if drift.unit == "masked positions":
        assert 0.1 < drift.items / drift.tokens < 0.2


def test_an_embedding_is_measured_whole(tiny_encoders: Path) -> None:
    seen: list[tuple[str, float]] = []
    graph = tiny_encoders / "artifact" / "embedding" / "model.onnx"
    result = validated(
        tiny_encoders,
        "embedding",
        pytorch_baseline=True,
        float_baseline=graph,
        progress=lambda stage, fraction: seen.append((stage, fraction)),
    )
    (speed,) = result.speed
    assert isinstance(speed, EncoderSpeed)
    # 512 tokens are more than it has positions for, and 16 is the measured length nearest to 128.
    assert [(point.batch, point.length) for point in speed.points] == [(1, 8), (2, 8), (1, 16), (2, 16)]
    assert (speed.batch, speed.length) == (1, 16) and speed.latency_ms == speed.points[2].latency_ms
    for name in ("pytorch", "onnx_float"):
        baseline = speed.baselines[name]  # type: ignore[index]
        assert baseline.skipped is None and len(baseline.points) == 4
        ratio = baseline.points[2].latency_ms.p50 / speed.latency_ms.p50
        assert getattr(speed, f"speedup_vs_{name}") == pytest.approx(ratio)
        assert getattr(speed.points[0], f"speedup_vs_{name}") == pytest.approx(
            baseline.points[0].latency_ms.p50 / speed.points[0].latency_ms.p50
        )
    point = speed.points[3]
    assert point.tokens_per_second == pytest.approx(32 / point.latency_ms.p50 * 1000)
    assert point.latency_ms.p50 <= point.latency_ms.p95 and 1 <= point.runs <= 3
    assert result.placement[0].nodes_total == result.placement[0].nodes_on_provider > 20
    assert [stage.name for stage in result.stages] == ["reference", "drift on cpu", "speed on cpu"]
    assert result.artifact_bytes == graph.stat().st_size
    assert {stage for stage, _ in seen} <= {"reference", "drift", "speed"} and ("speed", 1.0) in seen
    assert not list(graph.parent.parent.glob(".compress-validate-*"))


def test_without_a_reference_a_budget_that_applies_cannot_pass(tiny_encoders: Path) -> None:
    budgets = {"min_cosine": 0.1, "max_accuracy_drop": 1.0, "min_speedup_vs_pytorch": 0.1, "max_kl": 1.0}
    result = validated(tiny_encoders, "embedding", checkpoint_spec=None, budgets=budgets)
    assert result.drift is None and result.speed and result.placement[0].nodes_total > 20
    reasons = " / ".join(result.verdict.reasons)
    assert len(result.verdict.reasons) == 3 and "kl" not in reasons
    assert "cosine was not measured (no reference model was given)" in reasons
    assert "speedup_vs_pytorch was not measured (it was not asked for)" in reasons


@pytest.mark.usefixtures("reference_in_process")
def test_an_accuracy_budget_without_labels_cannot_pass(tiny_encoders: Path) -> None:
    result = validated(tiny_encoders, "embedding", budgets={"max_accuracy_drop": 0.5}, texts=16)
    (reason,) = result.verdict.reasons
    assert "accuracy_drop was not measured (no labelled examples were given, see --eval-labels)" in reason


@pytest.mark.usefixtures("reference_in_process")
@pytest.mark.parametrize(("pooling", "near"), [("mean", True), ("cls", False), ("max", False)])
def test_the_pooling_that_is_asked_for_is_what_the_graph_is_held_to(
    pooling: str, near: bool, tiny_encoders: Path
) -> None:
    drift = validated(tiny_encoders, "embedding", pooling=pooling, texts=16).drift
    assert isinstance(drift, EncoderDrift) and drift.cosine is not None
    assert (drift.cosine.mean > 0.99999) == near


@pytest.mark.usefixtures("reference_in_process")
def test_token_vectors_alone_are_compared_by_their_mean(tiny_encoders: Path, tmp_path: Path) -> None:
    import onnx_ir as ir

    directory = shutil.copytree(tiny_encoders / "artifact" / "embedding", tmp_path / "bare")
    model = ir.load(directory / "model.onnx")
    model.graph.outputs.pop()
    ir.save(model, directory / "model.onnx")
    source = validation.CheckpointSpec(str(tiny_encoders / "source" / "embedding"))
    result = run_encoder_validation(
        directory, checkpoint_spec=source, budgets=BUDGETS, texts=16, pytorch_baseline=False, speed_plan=PLAN
    )
    assert result.verdict.status == "pass" and isinstance(result.drift, EncoderDrift)


def test_requests_that_make_no_sense_are_refused_before_work(
    tiny_encoders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_measure, "run_worker", lambda *_, **__: pytest.fail("a worker was started"))
    with pytest.raises(UsageError, match="texts of 65 tokens are longer than the model's table of 64 positions"):
        validated(tiny_encoders, "embedding", max_length=65)
    with pytest.raises(UsageError, match="unknown budget"):
        validated(tiny_encoders, "embedding", budgets={"min_cosin": 1})
    (tmp_path / "short.txt").write_text("Too short a text.\n\nIndeed it is.")
    with pytest.raises(UsageError, match="the text gives 2 short texts, drift needs at least 8"):
        validated(tiny_encoders, "embedding", eval_text=tmp_path / "short.txt")
    for length in (1, 2):
        with pytest.raises(UsageError, match=f"texts cut to {length} tokens have no room for words"):
            validated(tiny_encoders, "embedding", max_length=length)
    with pytest.raises(UsageError, match="beside the source model"):
        validated(tiny_encoders, "embedding", checkpoint_spec=None, eval_labels=tmp_path / "labels.jsonl")
    (tmp_path / "labels.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match="line 1: the field 'text' is missing"):
        validated(tiny_encoders, "embedding", eval_labels=tmp_path / "labels.jsonl")


def test_a_decoder_is_sent_away(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 5, "architectures": ["LlamaForCausalLM"]}')
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(UsageError, match="this artifact is a decoder"):
        run_encoder_validation(tmp_path, checkpoint_spec=None, budgets={})


@pytest.mark.usefixtures("reference_in_process")
def test_a_reference_of_another_task_is_refused(tiny_encoders: Path) -> None:
    other = validation.CheckpointSpec(str(tiny_encoders / "source" / "fill-mask"))
    with pytest.raises(CompressError, match="the source model's task is fill-mask, the artifact's embedding"):
        validated(tiny_encoders, "embedding", checkpoint_spec=other)


@pytest.mark.usefixtures("reference_in_process")
def test_an_artifact_that_crashes_is_judged(tiny_encoders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> Any:
        raise WorkerError("the worker worker crashed with SIGSEGV", where="model.onnx")

    monkeypatch.setattr(encoder_measure, "run_artifact", crash)
    budgets = {"min_cosine": 0.1, "max_accuracy_drop": 0.5, "min_speedup_vs_pytorch": 1.0}
    result = validated(tiny_encoders, "embedding", budgets=budgets, texts=16)
    assert result.verdict.status == "fail" and result.drift is None and result.speed == ()
    assert result.verdict.reasons[0] == "on cpu: the worker worker crashed with SIGSEGV (model.onnx)"
    assert len(result.verdict.reasons) == 4


# --------------------------------------------------------------------------------------------------- the source model


def spoilt(
    source: Path, target: Path, edit: Callable[[dict[str, Any]], None], **config: Any
) -> validation.CheckpointSpec:
    """Return a copy of a source with other tensors and another config."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **config}))
    return validation.CheckpointSpec(str(target))


@pytest.mark.usefixtures("reference_in_process")
def test_a_missing_head_is_told_and_never_made_up(tiny_encoders: Path, tmp_path: Path) -> None:
    task = "text-classification"
    spec = spoilt(tiny_encoders / "source" / task, tmp_path / "a", lambda tensors: tensors.pop("classifier.weight"))
    with pytest.raises(
        SourceError, match="the checkpoint has no text-classification head: classifier.weight is missing"
    ):
        validated(tiny_encoders, task, checkpoint_spec=spec)
    spec = spoilt(
        tiny_encoders / "source" / task,
        tmp_path / "b",
        lambda tensors: tensors.pop("bert.encoder.layer.1.output.dense.weight"),
    )
    with pytest.raises(SourceError, match="lacks 1 weights of the model, the first is bert.encoder.layer.1.output"):
        validated(tiny_encoders, task, checkpoint_spec=spec)


@pytest.mark.usefixtures("reference_in_process")
def test_an_embedding_needs_no_pooler_and_takes_any_prefix(tiny_encoders: Path, tmp_path: Path) -> None:
    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            array = tensors.pop(name)
            if "pooler" not in name:
                tensors[f"bert.{name}"] = array
        tensors["bert.embeddings.position_ids"] = np.arange(POSITIONS)[None]

    spec = spoilt(tiny_encoders / "source" / "embedding", tmp_path / "a", rename)
    assert validated(tiny_encoders, "embedding", checkpoint_spec=spec, texts=16).verdict.status == "pass"


@pytest.mark.usefixtures("reference_in_process")
def test_weights_that_do_not_fit_the_config_are_an_error(tiny_encoders: Path, tmp_path: Path) -> None:
    def widen(tensors: dict[str, Any]) -> None:
        tensors["classifier.weight"] = np.zeros((5, 48), np.float32)

    task = "text-classification"
    spec = spoilt(tiny_encoders / "source" / task, tmp_path / "a", widen)
    with pytest.raises(SourceError, match="the weights do not fit the config"):
        validated(tiny_encoders, task, checkpoint_spec=spec)


@pytest.mark.usefixtures("reference_in_process")
def test_a_source_over_the_memory_cap_is_refused(tiny_encoders: Path) -> None:
    with pytest.raises(ResourceError, match="are allowed"):
        validated(tiny_encoders, "embedding", memory_cap=1000)


# ------------------------------------------------------------------------------------------------------------- report


@pytest.mark.usefixtures("reference_in_process")
def test_reports_of_both_kinds_are_read_back_as_what_they_were(tiny_encoders: Path) -> None:
    result = validated(tiny_encoders, "text-classification", texts=16)
    base = {"verdict": {"status": "pass"}, "size": {"artifact_bytes": 1}}
    surroundings = {"versions": {}, "cpu": "", "cores": 1, "instruction_sets": [], "os": "", "architecture": ""}
    made = Report.model_validate({**base, "drift": result.drift, "speed": result.speed, "environment": surroundings})
    again = Report.model_validate_json(made.model_dump_json())
    assert again == made and isinstance(again.drift, EncoderDrift) and isinstance(again.speed[0], EncoderSpeed)
    assert not isinstance(again.drift, DecoderDrift)
    assert encoder_run.numbers(again.drift)["label_agreement"] == again.drift.label_agreement
