"""Validation from an artifact directory to a verdict, and the speed beside baselines."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import validation
from compress.errors import CompressError, ResourceError, UsageError, WorkerError
from compress.report.model import Baseline
from compress.validation import logits, on_provider, run, speed
from compress.validation.artifact import model_bytes, open_artifact

PLAN = speed.SpeedPlan(prompt_tokens=8, new_tokens=3, repeats=2, timeout=120)


@pytest.fixture(scope="module")
def source(tiny_model: Callable[[str], Path]) -> Path:
    """The tiny Llama with its tokenizer; 384 ids, 256 positions."""
    return tiny_model("llama")


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory, make_float_graph: Callable[[Path], Path]) -> Path:
    """It as a float graph, in the layout of an artifact."""
    directory = tmp_path_factory.mktemp("run") / "artifact"
    directory.mkdir()
    copy = shutil.copytree(source, directory.parent / "copy")
    graph = make_float_graph(copy)
    for path in (graph, graph.with_name("model.onnx.data"), source / "config.json", source / "tokenizer.json"):
        shutil.copy(path, directory)
    options = {"log_id": "x", "provider_options": [], "optimization.constant_folding_max_output_size_in_bytes": "1024"}
    config = {"model": {"decoder": {"filename": "model.onnx", "session_options": options}}}
    (directory / "genai_config.json").write_text(json.dumps(config))
    return directory


def validated(artifact: Path, source: Path | None, **changes: Any) -> validation.Validation:
    """Run a small validation."""
    settings: dict[str, Any] = {
        "checkpoint_spec": None if source is None else validation.CheckpointSpec(str(source)),
        "budgets": {"max_kl": 1e-6},
        "tokens": 130,
        "window": 32,
        "pytorch_baseline": False,
        "speed_plan": PLAN,
    }
    return validation.run_validation(artifact, **{**settings, **changes})


def test_a_float_artifact_is_measured_whole(artifact: Path, source: Path) -> None:
    seen: list[tuple[str, float]] = []
    budgets = {"max_kl": 1e-6, "min_top1_agreement": 0.99, "max_perplexity_ratio": 1.001, "max_bytes": 10**7}
    result = validated(
        artifact,
        source,
        budgets=budgets,
        pytorch_baseline=True,
        float_baseline=artifact / "model.onnx",
        progress=lambda stage, fraction: seen.append((stage, fraction)),
    )
    assert result.verdict.status == "pass", result.verdict.reasons
    drift = result.drift
    assert drift is not None and drift.decode is not None
    assert (drift.windows, drift.tokens, drift.decode.tokens) == (4, 4 * 31, 4 * 16)
    assert 0 <= drift.kl_divergence.mean < 1e-9 and drift.perplexity_ratio.value == pytest.approx(1, abs=1e-4)
    assert drift.reference == "PyTorch float32 of F32 weights" and drift.logit_max_abs < 1e-3
    assert drift.reference_perplexity > 50  # it is a random model
    (measured,) = result.speed
    assert measured.evidence == "measured" and measured.repeats == 2
    assert measured.decode_tokens_per_second.p10 <= measured.decode_tokens_per_second.median
    for name in ("pytorch", "onnx_float"):
        baseline = measured.baselines[name]
        assert baseline.skipped is None and baseline.decode_tokens_per_second is not None
        ratio = measured.decode_tokens_per_second.median / baseline.decode_tokens_per_second.median
        assert getattr(measured, f"speedup_vs_{name}") == pytest.approx(ratio)
    assert result.placement[0].nodes_total == result.placement[0].nodes_on_provider > 20
    assert [stage.name for stage in result.stages] == ["reference", "drift on cpu", "speed on cpu"]
    assert all(stage.seconds > 0 and (stage.peak_rss_bytes or 0) > 10 << 20 for stage in result.stages)
    assert result.artifact_bytes == sum((artifact / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert {stage for stage, _ in seen} <= {"reference", "drift", "speed"} and ("speed", 1.0) in seen
    assert not list(artifact.parent.glob(".compress-validate-*"))


def test_without_a_reference_a_drift_budget_cannot_pass(artifact: Path) -> None:
    result = validated(artifact, None, budgets={"max_kl": 10.0, "min_speedup_vs_pytorch": 0.001})
    assert result.drift is None and result.placement[0].nodes_total > 20 and result.speed
    assert result.verdict.status == "fail"
    assert "kl was not measured (no reference model was given)" in result.verdict.reasons[0]
    assert "speedup_vs_pytorch was not measured (it was not asked for)" in result.verdict.reasons[1]


def test_a_budget_that_is_not_met_is_the_reason(artifact: Path, source: Path) -> None:
    result = validated(artifact, source, budgets={"max_bytes": 1000.0}, tokens=32)
    assert len(result.verdict.reasons) == 1 and result.verdict.reasons[0].startswith("bytes is ")
    assert result.drift is not None and result.drift.kl_divergence.standard_error is None  # a single window


def test_a_reference_with_another_vocabulary_is_refused(artifact: Path, tiny_directories: dict[str, Path]) -> None:
    with pytest.raises(CompressError, match="outside the vocabulary of 257|vocabulary of 257, the artifact of 384"):
        validated(artifact, tiny_directories["llama"])
    assert not list(artifact.parent.glob(".compress-validate-*"))


def test_requests_that_make_no_sense_are_refused_before_work(
    artifact: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_worker", lambda *_, **__: pytest.fail("a worker was started"))
    with pytest.raises(UsageError, match="a window of 300 tokens is longer than the model's context of 256"):
        validated(artifact, source, window=300, tokens=300)
    with pytest.raises(UsageError, match="prompt and new tokens together"):
        validated(artifact, source, speed_plan=speed.SpeedPlan(prompt_tokens=250, new_tokens=7))
    with pytest.raises(UsageError, match="unknown budget"):
        validated(artifact, source, budgets={"max_kll": 1})
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UsageError, match="one window needs 32"):
        validated(artifact, source, eval_text=tmp_path / "short.txt")
    monkeypatch.setattr(logits, "DISK_RESERVE", 1 << 60)
    with pytest.raises(ResourceError, match="validation needs 0.0 GB of disk"):
        validated(artifact, source)


def test_an_artifact_that_crashes_is_judged(artifact: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = on_provider.run_worker

    def crash(module: str, request: Any, **options: Any) -> Any:
        if module == "worker":
            raise WorkerError("the worker worker crashed with SIGSEGV", where="model.onnx")
        return real(module, request, **options)

    monkeypatch.setattr(on_provider, "run_worker", crash)
    result = validated(artifact, source, tokens=32, budgets={"max_kl": 1.0, "min_speedup_vs_pytorch": 1.0})
    assert result.verdict.status == "fail" and result.drift is None and result.speed == ()
    assert result.verdict.reasons[0] == "on cpu: the worker worker crashed with SIGSEGV (model.onnx)"
    assert len(result.verdict.reasons) == 3


# ------------------------------------------------------------------------------------------------------------- speed


def test_contenders_take_turns_and_medians_are_reported(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    seconds = {"worker": iter([0.1, 0.9, 0.2]), "reference": iter([0.4, 0.4, 4.0])}

    def fake(module: str, request: Any, *, timeout: float, runtime: Any) -> Any:
        calls.append(module)
        step = next(seconds[module])
        times = {"prefill_seconds": [2 * step], "decode_seconds": [[step, step, step]]}
        return {"results": [times], "load_seconds": step, "peak_rss_bytes": len(calls), "evidence": "measured"}

    monkeypatch.setattr(speed, "run_worker", fake)
    plan = speed.SpeedPlan(prompt_tokens=100, new_tokens=3, repeats=3)
    measured = speed.measure_speed(open_artifact(artifact), "cpu", {"pytorch": speed.Contender("reference", {})}, plan)
    assert sorted(calls[:2]) == sorted(calls[2:4]) == sorted(calls[4:]) == ["reference", "worker"]
    assert measured.load_seconds == 0.2 and measured.decode_tokens_per_second.median == pytest.approx(5)
    assert measured.prefill_tokens_per_second == pytest.approx(100 / 0.4)
    assert measured.speedup_vs_pytorch == pytest.approx(2) and measured.speedup_vs_onnx_float is None
    assert measured.peak_rss_bytes in (5, 6)  # the largest of the rounds


def test_a_baseline_that_fails_is_skipped_and_the_artifact_may_not(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(module: str, request: Any, *, timeout: float, runtime: Any) -> Any:
        if module == "reference":
            raise ResourceError("the float32 model needs about 18 GB of memory, 8 GB are available")
        times = {"prefill_seconds": [0.1], "decode_seconds": [[0.1, 0.1]]}
        return {"results": [times], "load_seconds": 1.0, "peak_rss_bytes": 1, "evidence": "measured"}

    monkeypatch.setattr(speed, "run_worker", fake)
    opened = open_artifact(artifact)
    contenders = {"pytorch": speed.Contender("reference", {}), "onnx_float": speed.Contender(skipped="not built")}
    measured = speed.measure_speed(opened, "cpu", contenders, PLAN)  # type: ignore[arg-type]
    assert measured.baselines["pytorch"] == Baseline(
        skipped="the float32 model needs about 18 GB of memory, 8 GB are available"
    )
    assert measured.baselines["onnx_float"] == Baseline(skipped="not built")
    assert measured.speedup_vs_pytorch is None

    def broken(module: str, request: Any, *, timeout: float, runtime: Any) -> Any:
        raise WorkerError("it crashed")

    monkeypatch.setattr(speed, "run_worker", broken)
    with pytest.raises(WorkerError, match="it crashed"):
        speed.measure_speed(opened, "cpu", {}, PLAN)


def test_a_float_graph_over_the_cap_is_skipped_with_the_reason(artifact: Path) -> None:
    assert speed.float_contender(None, "the disk is full", None, "cpu").skipped == "the disk is full"
    assert speed.float_contender(artifact / "model.onnx", None, None, "cpu").skipped is None
    reason = speed.float_contender(artifact / "model.onnx", None, 1000, "cpu").skipped
    assert reason is not None and "are allowed" in reason


def test_rates_come_from_the_steps() -> None:
    rate = speed.rate([0.1] * 50 + [0.5] * 9 + [0.05] * 41)
    assert rate.median == pytest.approx(10) and rate.p10 == pytest.approx(10) and rate.p90 == pytest.approx(20)
    steps = list(np.linspace(0.1, 0.2, 101))
    assert speed.rate(steps).p10 == pytest.approx(1 / 0.19) and speed.rate(steps).p90 == pytest.approx(1 / 0.11)
    assert math.isclose(speed.rate(steps).median, 1 / 0.15)


# ---------------------------------------------------------------------------------------------------------- artifact


def test_an_artifact_is_read_from_its_configs(artifact: Path) -> None:
    opened = open_artifact(artifact)
    assert opened.model == artifact / "model.onnx" and (opened.vocab_size, opened.context_length) == (384, 256)
    assert opened.session_options == {
        "log_id": "x",
        "optimization.constant_folding_max_output_size_in_bytes": "1024",
    }
    assert opened.bytes == model_bytes(artifact / "model.onnx") > 100_000


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("genai_config.json", '{"model": {"decoder": {"filename": "../model.onnx"}}}', "not a plain name"),
        ("genai_config.json", '{"model": {"decoder": {"filename": "other.onnx"}}}', "has no other.onnx"),
        ("genai_config.json", '{"model": {"decoder": {"session_options": []}}}', "not a mapping"),
        ("genai_config.json", '{"model": 3}', "not a mapping"),
        ("genai_config.json", "[", "not JSON"),
        ("config.json", "[]", "not an object"),
        ("config.json", "{}", "does not say the vocabulary's size"),
    ],
)
def test_a_hostile_artifact_is_refused(artifact: Path, tmp_path: Path, file: str, content: str, message: str) -> None:
    directory = shutil.copytree(artifact, tmp_path / "a")
    (directory / file).write_text(content)
    with pytest.raises(CompressError, match=message):
        open_artifact(directory)


def test_what_is_missing_is_named(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no such artifact directory"):
        open_artifact(tmp_path / "absent")
    with pytest.raises(CompressError, match="cannot open the file"):
        open_artifact(tmp_path)
