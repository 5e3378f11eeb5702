"""Latency points, alternation, and what the report says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.errors import ResourceError, WorkerError
from compress.report.model import EncoderBaseline
from compress.validation import encoder_speed
from compress.validation.artifact import Artifact
from compress.validation.encoder_speed import EncoderSpeedPlan, main_point, measure_encoder_speed, points_of
from compress.validation.speed import Contender


def model(task: str = "embedding", context: int | None = 512, vocab: int = 30522) -> Artifact:
    return Artifact(Path(), Path("model.onnx"), {}, vocab, context, task, {})


def test_points_are_those_that_the_model_has_positions_for() -> None:
    plan = EncoderSpeedPlan()
    assert points_of(model(), plan) == [(1, 16), (8, 16), (1, 128), (8, 128), (1, 512), (8, 512)]
    assert points_of(model(context=128), plan) == [(1, 16), (8, 16), (1, 128), (8, 128)]
    assert points_of(model(context=10), plan) == [(1, 10), (8, 10)]
    assert points_of(model("fill-mask"), plan) == [(1, 16), (8, 16), (1, 128), (8, 128), (1, 512)]  # 500 MB of scores
    assert points_of(model("fill-mask", vocab=10**8), plan) == [(1, 16)]


def test_the_main_point_is_one_text_of_128_tokens_or_the_nearest() -> None:
    assert main_point(points_of(model(), EncoderSpeedPlan())) == (1, 128)
    assert main_point([(8, 128), (4, 16), (4, 512)]) == (4, 16)
    assert main_point([(1, 16), (1, 64), (8, 128)]) == (1, 64)


def test_contenders_take_turns_and_medians_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    step = {"worker": iter([1, 9, 2]), "encoder_reference": iter([4, 4, 40])}

    def fake(module: str, request: Any, *, timeout: float, runtime: Any) -> Any:
        calls.append(module)
        (job,) = request["jobs"]
        assert job["points"] == [(1, 16), (1, 128)] and request["threads"] == 2
        scale = next(step[module]) / 1000
        seconds = [[scale * length / 16] * 2 for _, length in job["points"]]
        return {"results": [{"seconds": seconds}], "load_seconds": scale, "peak_rss_bytes": len(calls)}

    monkeypatch.setattr(encoder_speed, "run_worker", fake)
    plan = EncoderSpeedPlan(lengths=(16, 128), batches=(1,), threads=2)
    measured = measure_encoder_speed(model(), "cpu", {"pytorch": Contender("encoder_reference", {})}, plan)
    assert sorted(calls[:2]) == sorted(calls[2:4]) == sorted(calls[4:]) == ["encoder_reference", "worker"]
    first, second = measured.points
    assert first.latency_ms.p50 == pytest.approx(2) and first.latency_ms.p95 == pytest.approx(9) and first.runs == 6
    assert second.tokens_per_second == pytest.approx(128 / 0.016) and second.sequences_per_second == pytest.approx(62.5)
    assert (measured.batch, measured.length, measured.latency_ms) == (1, 128, second.latency_ms)
    assert measured.speedup_vs_pytorch == second.speedup_vs_pytorch == pytest.approx(2)
    assert measured.speedup_vs_onnx_float is None and measured.load_seconds == 0.002


def test_a_baseline_that_fails_is_skipped_and_the_artifact_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(module: str, request: Any, *, timeout: float, runtime: Any) -> Any:
        if module == "encoder_reference":
            raise ResourceError("the float32 model needs about 18 GB of memory, 8 GB are available")
        return {"results": [{"seconds": [[0.1]]}], "load_seconds": 1.0, "peak_rss_bytes": 1, "evidence": "measured"}

    monkeypatch.setattr(encoder_speed, "run_worker", fake)
    plan = EncoderSpeedPlan(lengths=(16,), batches=(1,), repeats=2)
    contenders: Any = {"pytorch": Contender("encoder_reference", {}), "onnx_float": Contender(skipped="not built")}
    measured = measure_encoder_speed(model(), "cpu", contenders, plan)
    assert measured.baselines["pytorch"] == EncoderBaseline(
        skipped="the float32 model needs about 18 GB of memory, 8 GB are available"
    )
    assert measured.baselines["onnx_float"] == EncoderBaseline(skipped="not built")
    assert measured.speedup_vs_pytorch is None and measured.points[0].speedup_vs_onnx_float is None

    def broken(module: str, request: Any, *, timeout: float, runtime: Any) -> Any:
        raise WorkerError("it crashed")

    monkeypatch.setattr(encoder_speed, "run_worker", broken)
    with pytest.raises(WorkerError, match="it crashed"):
        measure_encoder_speed(model(), "cpu", {}, plan)
