"""Predicted speed in plans, and what plans and exports say of an artifact that is slower than float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import cli, forecast, pipeline
from compress.latency import LatencyModel
from compress.latency.parts import Attention, Empty, FeedForward, Point
from compress.package import manifest
from compress.planning import make_plan
from compress.profile import Profile, load_profile
from compress.report import slower
from compress.report.model import EncoderSpeed, Rate, Speed
from compress.source import open_checkpoint

Model = Callable[[str], Path]
Run = Callable[..., tuple[str, str]]
#: Seconds of one copy of a part by how it is stored: prefill as slow again with 4 bits, decode in a third of the time.
START = 1e-6


def fake(points: list[Point], threads: int, progress: Callable[[float], None]) -> list[float]:
    """Return times as an x86 processor has them: weights in blocks are slow with many tokens, fast with one."""
    progress(1.0)
    return [_seconds(point) for point in points]


def _seconds(point: Point) -> float:
    part, tokens = point.part, point.workload.tokens
    if isinstance(part, Empty):
        return START
    if not isinstance(part, FeedForward | Attention):
        return 2 * START
    stored = part.up if isinstance(part, FeedForward) else part.qkv
    factor = 1.0 if stored.bits == 32 else 0.25 if stored.dynamic else 2.0 if tokens > 1 else 1 / 3
    return START + point.copies * 1e-3 * factor * tokens


@pytest.fixture(autouse=True)
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Give every test a cache of its own and made up times; returns how many points each call measured."""
    calls: list[int] = []

    def counted(points: list[Point], threads: int, progress: Callable[[float], None]) -> list[float]:
        calls.append(len(points))
        return fake(points, threads, progress)

    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(forecast, "LatencyModel", partial(LatencyModel, measure=counted))
    return calls


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert cli.run(list(words)) == code
        found = capsys.readouterr()
        return found.out, found.err

    return call


def test_a_plan_says_how_fast_it_would_be(tiny_model: Model, run: Run, measured: list[int]) -> None:
    command = ("plan", str(tiny_model("llama")), "--profile", "x86-int4", "--threads", "1")
    out, err = run(*command, "--speed", "--json")
    speed = json.loads(out)["predicted_speed"]
    assert [(item["run"], item["tokens"], item["past"]) for item in speed["runs"]] == [
        ("prefill", 128, 0), ("decode", 1, 128)
    ]  # fmt: skip
    prefill, decode = speed["runs"]
    # 3 blocks of two halves, 1 ms a token each in float32; ends and head are next to nothing.
    assert prefill["float_ms"] == pytest.approx(6 * 128, rel=0.01)
    assert (prefill["speedup"], decode["speedup"]) == (pytest.approx(0.5, rel=0.01), pytest.approx(3.0, rel=0.01))
    assert decode["tokens_per_second"] == pytest.approx(3000 / 6, rel=0.01)
    assert speed["threads"] == 1 and speed["onnxruntime"]
    assert err == (
        "note: x86-int4: it reads a prompt of 128 tokens at 0.50 times the speed of float32 ONNX, and decodes at "
        f"{decode['speedup']:.2f} times (predicted for this machine, 1 thread); where that counts, "
        f"{slower.remedy('x86-int4', blocks=True, rotates=True).removeprefix('where that counts, ')}\n"
    )
    page, _ = run(*command, "--speed")
    assert "on a prompt of 128 tokens, 0.50x float32 ONNX's" in page and "after 128 tokens, " in page
    assert len(measured) == 2, "one worker a workload, the second plan measures nothing"
    # Without the flag nothing is measured, and nothing is said that a machine's cache decides.
    assert json.loads(run(*command, "--json")[0])["predicted_speed"] is None
    assert run(*command)[1] == ""


def test_an_encoder_that_is_faster_is_no_news(tiny_model: Model, run: Run) -> None:
    command = ("plan", str(tiny_model("bert:embedding")), "--profile", "x86-int8", "--threads", "2", "--speed")
    out, err = run(*command, "--json")
    (only,) = json.loads(out)["predicted_speed"]["runs"]
    assert (only["run"], only["batch"], only["tokens"], err) == ("latency", 1, 128, "")
    assert only["speedup"] == pytest.approx(4, rel=0.01)
    assert "latency           " in run(*command)[0]
    # The control: the same processor, the same model, weights in blocks.
    _, err = run(*command[:2], "--profile", "x86-int4", "--threads", "2", "--speed")
    assert "it reads 1 x 128 tokens at 0.50 times" in err


def test_a_pruned_model_is_beside_its_source(tiny_model: Model) -> None:
    plan = compress.plan(
        tiny_model("llama"), "float", overrides=["prune.layers=1"], threads=1, speed=True
    ).predicted_speed
    assert plan is not None
    assert [item.speedup for item in plan.runs] == pytest.approx([1.5, 1.5], rel=0.01)


@pytest.mark.parametrize(
    ("profile", "override", "what"),
    [
        ("cuda-int4", "quantize.bits=4", "not for this machine's processor"),
        ("web-int4-fp16", "quantize.bits=4", "not for this machine's processor"),
        ("float", "prune.speedup=1.5", "has yet to find"),
        ("float", "prune.vocabulary=from-text", "has yet to find"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    profile: str, override: str, what: str, tiny_model: Model, measured: list[int]
) -> None:
    with pytest.raises(compress.UsageError, match=what):
        compress.plan(tiny_model("llama"), profile, overrides=[override], speed=True)
    assert not measured


# ------------------------------------------------------------------------------------------------------------- exports


@pytest.mark.usefixtures("fast_skeletons")
def test_an_export_says_what_is_known_and_measures_nothing(
    tiny_model: Model, tiny_artifact: Callable[..., Path], tmp_path: Path, run: Run, measured: list[int]
) -> None:
    model = str(tiny_model("llama"))
    shared = (model, "--profile", "x86-int4", "--threads", "1")

    def export(name: str) -> str:
        return run("export", *shared, "--no-validate", "-o", str(tmp_path / name))[1]

    assert export("unknown").startswith("note: how fast this is beside float32 ONNX was not measured")
    assert not measured
    run("plan", *shared, "--speed")
    assert "it reads a prompt of 128 tokens at 0.50 times" in export("known")
    assert len(measured) == 2
    # What one machine knows is in no file of the artifact.
    expected = manifest.read_manifest(tiny_artifact("llama", "x86-int4"))
    for name in ("unknown", "known"):
        assert manifest.read_manifest(tmp_path / name) == expected
    _, err = run(
        "export", model, "--profile", "float", "--threads", "1", "--no-validate", "-o", str(tmp_path / "float")
    )
    assert err == ""


def speed(**changes: Any) -> Speed:
    values: dict[str, Any] = {
        "provider": "cpu", "device": "x", "evidence": "measured", "threads": 1, "prompt_tokens": 128, "new_tokens": 32,
        "repeats": 3, "load_seconds": 1.0, "peak_rss_bytes": 1, "prefill_tokens_per_second": 1.0,
        "decode_tokens_per_second": Rate(median=1.0, p10=1.0, p90=1.0),
        "speedup_vs_onnx_float": 3.1, "prefill_speedup_vs_onnx_float": 0.62,
    }  # fmt: skip
    return Speed.model_validate(values | changes)


def test_what_was_measured_goes_before_what_is_predicted() -> None:
    assert slower.sentence(slower.measured(speed())) == (
        "it reads a prompt of 128 tokens at 0.62 times the speed of float32 ONNX, and decodes at 3.10 times"
    )
    both = speed(speedup_vs_onnx_float=0.5)
    assert slower.sentence(slower.measured(both)) == (
        "it reads a prompt of 128 tokens at 0.62 times and decodes at 0.50 times the speed of float32 ONNX"
    )
    assert slower.sentence(slower.measured(speed(prefill_speedup_vs_onnx_float=1.0))) is None
    assert slower.sentence(slower.measured(speed(prefill_speedup_vs_onnx_float=0.996))) is None
    assert slower.measured(speed(evidence="simulated")) == (), "a simulator's time is no device's"
    assert slower.measured(speed(speedup_vs_onnx_float=None, prefill_speedup_vs_onnx_float=None)) == ()


def test_a_validated_export_tells_what_was_measured(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    # Not by a handler: whether a logger reaches it depends on which command ran before in this process.
    monkeypatch.setattr(forecast._log, "warning", lambda text, *values: said.append(text % values))
    recipe = load_profile("x86-int4")
    with open_checkpoint(str(tiny_model("llama"))) as checkpoint:
        structure = pipeline.describe(checkpoint)
        plan = make_plan(structure, recipe, checkpoint)

    def told(profile: Profile = recipe, **changes: Any) -> list[str]:
        report = {
            "schema_version": 2,
            "verdict": {"status": "pass", "reasons": []},
            "size": {"artifact_bytes": 1},
            "environment": {
                "versions": {}, "cpu": "", "cores": 1, "instruction_sets": [], "os": "", "architecture": "",
            },
            "speed": [speed(**changes).model_dump(mode="json")],
        }  # fmt: skip
        said.clear()
        forecast.warn_of_export(plan, structure, profile, 1, report)
        return list(said)

    (only,) = told()
    assert only.startswith("x86-int4: it reads a prompt of 128 tokens at 0.62 times") and "(measured)" in only
    assert told(prefill_speedup_vs_onnx_float=1.2) == []
    # Nothing beside float32 was measured, and nothing is known: that is said; of another processor's, nothing is.
    (only,) = told(speedup_vs_onnx_float=None, prefill_speedup_vs_onnx_float=None)
    assert "was not measured" in only
    assert told(load_profile("cuda-int4")) == []


def test_an_encoders_slow_points_are_named() -> None:
    def point(batch: int, ratio: float) -> dict[str, Any]:
        return {
            "batch": batch, "length": 128, "runs": 3, "latency_ms": {"p50": 1.0, "p95": 1.0},
            "sequences_per_second": 1.0, "tokens_per_second": 1.0, "speedup_vs_onnx_float": ratio,
        }  # fmt: skip

    found = EncoderSpeed.model_validate(
        {
            "provider": "cpu", "device": "x", "evidence": "measured", "threads": 1, "repeats": 3, "load_seconds": 1.0,
            "peak_rss_bytes": 1, "batch": 1, "length": 128, "latency_ms": {"p50": 1.0, "p95": 1.0},
            "points": [point(1, 2.0), point(8, 0.9)],
        }
    )  # fmt: skip
    assert slower.sentence(slower.measured(found)) == (
        "it reads 8 x 128 tokens at 0.90 times the speed of float32 ONNX, and reads 1 x 128 tokens at 2.00 times"
    )


def test_the_remedy_is_not_what_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert "--profile x86-int8 " in slower.remedy("x86-int4", blocks=True)
    assert "--profile x86-int8-hybrid " in slower.remedy("x86-int4", blocks=True, rotates=True)
    assert "float" in slower.remedy("x86-int8", blocks=True)
    assert "float" in slower.remedy("my-int8", blocks=False)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "arm-int8" in slower.remedy("arm-int4", blocks=True, rotates=True)
