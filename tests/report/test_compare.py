"""Comparisons: what may be compared, who is worse and by how much, and how it is shown."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compress.cli import run
from compress.comparison import read_side
from compress.errors import CompressError
from compress.report.compare import compare
from compress.report.compare_model import Comparison, Measure
from compress.report.compare_show import page, show

REPORT: dict[str, Any] = {
    "schema_version": 2,
    "verdict": {"status": "pass"},
    "source": {"identifier": "owner/model", "kind": "hub", "revision": "abc"},
    "profile": {"name": "arm-int4", "resolved": {"quantize": {"bits": 4}, "targets": ["genai"]}},
    "size": {"source_bytes": 540_000_000, "artifact_bytes": 86_500_000, "ratio": 6.243},
    "drift": {
        "provider": "cpu",
        "tokens": 2044,
        "windows": 4,
        "eval_text": {"name": "evaluation", "sha256": "0" * 64},
        "reference": "PyTorch float32 of BF16 weights",
        "reference_perplexity": 13.3,
        "perplexity_ratio": {"value": 1.3, "standard_error": 0.01},
        "kl_divergence": {"mean": 0.4, "standard_error": 0.03, "p99": 2.5},
        "top1_agreement": 0.664,
        "confident_tokens": 900,
        "confident_flips": 31,
        "logit_max_abs": 9.5,
    },
    "speed": [
        {
            "provider": "cpu",
            "device": "a cpu",
            "evidence": "measured",
            "threads": 2,
            "prompt_tokens": 128,
            "new_tokens": 32,
            "repeats": 3,
            "load_seconds": 0.3,
            "peak_rss_bytes": 200_000_000,
            "prefill_tokens_per_second": 551.0,
            "decode_tokens_per_second": {"median": 107.0, "p10": 99.0, "p90": 110.0},
        }
    ],
    "tensors": [
        {"name": "l.0.down", "role": "down", "layer": 0, "storage": "int4 b32 sym", "bits": 4.5, "bytes": 90,
         "relative_error": 0.09},
        {"name": "l.1.down", "role": "down", "layer": 1, "storage": "int4 b32 sym", "bits": 4.5, "bytes": 90,
         "relative_error": 0.11},
    ],
    "environment": {
        "versions": {"onnxruntime": "1.31.1"},
        "cpu": "a cpu", "cores": 2, "instruction_sets": [], "os": "Linux", "architecture": "x86_64",
    },
}  # fmt: skip
ENCODER_DRIFT: dict[str, Any] = {
    "provider": "cpu",
    "task": "text-classification",
    "texts": 256,
    "tokens": 11213,
    "items": 256,
    "unit": "texts",
    "max_length": 256,
    "batch": 8,
    "eval_text": {"name": "evaluation", "sha256": "0" * 64},
    "reference": "PyTorch float32 of F32 weights",
    "label_agreement": 0.98,
    "label_agreement_error": 0.01,
    "task_accuracy": {
        "labels": {"name": "test.jsonl", "sha256": "1" * 64},
        "metric": "accuracy",
        "examples": 1000,
        "truncated": 0,
        "max_length": 256,
        "reference": 0.91,
        "artifact": 0.90,
        "difference": -0.01,
        "interval": [-0.02, 0.0],
        "interval_method": "paired",
        "flips": None,
    },
}
ENCODER_SPEED: dict[str, Any] = {
    "provider": "cpu",
    "device": "a cpu",
    "evidence": "measured",
    "threads": 2,
    "repeats": 3,
    "load_seconds": 0.3,
    "peak_rss_bytes": 200_000_000,
    "batch": 1,
    "length": 16,
    "latency_ms": {"p50": 4.0, "p95": 5.0},
    "points": [
        {"batch": 1, "length": 16, "runs": 9, "latency_ms": {"p50": 4.0, "p95": 5.0}, "sequences_per_second": 250.0,
         "tokens_per_second": 4000.0}
    ],
}  # fmt: skip
Change = Callable[[dict[str, Any]], None]


def compared(
    tmp_path: Path, change: Change, *, base: dict[str, Any] = REPORT, before: Change | None = None
) -> Comparison:
    sides = []
    for name, act in (("a", before), ("b", change)):
        report = copy.deepcopy(base)
        if act is not None:
            act(report)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(report))
        sides.append(read_side(path))
    return compare(*sides)


def put(path: str, value: Any) -> Change:
    def change(report: dict[str, Any]) -> None:
        *keys, last = path.split("/")
        place: Any = report
        for key in keys:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value

    return change


def measure(found: Comparison, name: str) -> Measure:
    return next(item for item in found.measures if item.name == name)


def test_the_same_differs_in_nothing(tmp_path: Path) -> None:
    found = compared(tmp_path, lambda report: None)
    assert found.differences == () and found.worse == () and found.tensors == () and found.tensors_same == 2
    assert {item.judgement for item in found.measures} == {"same", "not judged"}
    assert found.not_compared == {"files": "A and B have no manifest"}


@pytest.mark.parametrize(
    ("mean", "judgement"), [(0.41, "within the errors"), (0.48, "within the errors"), (0.49, "worse"), (0.31, "better")]
)
def test_beyond_the_standard_errors(mean: float, judgement: str, tmp_path: Path) -> None:
    # Two standard errors of the difference: 2 * sqrt(0.03^2 + 0.03^2) = 0.0849.
    found = compared(tmp_path, put("drift/kl_divergence/mean", mean))
    assert measure(found, "KL divergence").judgement == judgement
    assert bool(found.worse) == (judgement == "worse")


def test_without_a_standard_error_nothing_is_judged(tmp_path: Path) -> None:
    def change(report: dict[str, Any]) -> None:
        report["drift"]["kl_divergence"] = {"mean": 4.0, "standard_error": None, "p99": 20.0}
        report["drift"]["top1_agreement"] = 0.1

    found = compared(tmp_path, change)
    assert measure(found, "KL divergence").judgement == "not judged" and found.worse == ()
    assert measure(found, "top-1 agreement").change == pytest.approx(-0.564)


@pytest.mark.parametrize(
    ("rate", "judgement"),
    [((95.0, 90.0, 98.0), "worse"), ((95.0, 90.0, 99.5), "within the errors"), ((130.0, 111.0, 140.0), "better")],
)
def test_rates_by_their_spread(rate: tuple[float, float, float], judgement: str, tmp_path: Path) -> None:
    median, p10, p90 = rate
    found = compared(tmp_path, put("speed/0/decode_tokens_per_second", {"median": median, "p10": p10, "p90": p90}))
    assert measure(found, "decode on cpu").judgement == judgement


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("environment/cpu", "another", "the processors differ (a cpu, another)"),
        ("environment/cores", 4, "the numbers of cores differ (2, 4)"),
        ("speed/0/threads", 4, "threads differ (2, 4)"),
        ("speed/0/evidence", "emulated", "evidence differ (measured, emulated)"),
        ("speed/0/prompt_tokens", 64, "prompt tokens differ (128, 64)"),
    ],
)
def test_speeds_of_different_things(path: str, value: Any, why: str, tmp_path: Path) -> None:
    def change(report: dict[str, Any]) -> None:
        put(path, value)(report)
        report["speed"][0]["decode_tokens_per_second"] = {"median": 1.0, "p10": 1.0, "p90": 1.0}

    found = compared(tmp_path, change)
    item = measure(found, "decode on cpu")
    assert (item.judgement, item.why) == ("not comparable", why)
    assert (item.a, item.b, item.ratio, item.change) == (107.0, 1.0, None, None) and found.worse == ()
    assert measure(found, "KL divergence").judgement == "same"  # drift does not depend on the machine's speed


def test_another_provider_is_no_pair(tmp_path: Path) -> None:
    found = compared(tmp_path, put("speed/0/provider", "openvino"))
    assert measure(found, "decode on cpu").why == "B has no such measure"
    assert measure(found, "decode on openvino").why == "A has no such measure"


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        ("drift/eval_text", {"name": "mine", "sha256": "1" * 64}, "the evaluation texts differ (evaluation, mine)"),
        ("drift/tokens", 100, "2044 and 100 tokens of the text were measured"),
        ("drift/provider", "openvino", "the providers differ (cpu, openvino)"),
        ("source/revision", "def", "the sources differ"),
    ],
)
def test_drifts_of_different_things(path: str, value: Any, why: str, tmp_path: Path) -> None:
    def change(report: dict[str, Any]) -> None:
        put(path, value)(report)
        report["drift"]["kl_divergence"]["mean"] = 9.0

    found = compared(tmp_path, change)
    item = measure(found, "KL divergence")
    assert (item.judgement, item.why, item.ratio) == ("not comparable", why, None) and found.worse == ()


def test_encoders(tmp_path: Path) -> None:
    base = {**REPORT, "drift": ENCODER_DRIFT, "speed": [ENCODER_SPEED]}

    def change(report: dict[str, Any]) -> None:
        report["drift"]["label_agreement"] = 0.94
        report["drift"]["task_accuracy"] |= {"difference": -0.012, "interval": [-0.022, -0.002]}
        report["speed"][0]["points"][0]["latency_ms"] = {"p50": 6.0, "p95": 7.0}

    found = compared(tmp_path, change, base=base)
    assert measure(found, "same label").judgement == "worse"
    assert measure(found, "accuracy against the source").judgement == "within the errors"
    assert measure(found, "latency on cpu, 1 x 16").judgement == "worse"
    assert [line.split(":")[0] for line in found.worse] == ["same label", "latency on cpu, 1 x 16"]
    other = compared(tmp_path, put("drift/task_accuracy/labels/sha256", "2" * 64), base=base)
    assert measure(other, "accuracy against the source").judgement == "not comparable"


def test_identity_tensors_and_verdict(tmp_path: Path) -> None:
    def change(report: dict[str, Any]) -> None:
        report["verdict"] = {"status": "fail", "reasons": ["kl is 0.5 <b>[bold]"]}
        report["profile"]["resolved"]["quantize"]["bits"] = 8
        report["environment"]["versions"]["onnxruntime"] = "1.32.0"
        report["tensors"][1] |= {"storage": "int8 b32 sym", "bits": 8.5, "relative_error": 0.01}
        report["size"]["artifact_bytes"] += 1

    found = compared(tmp_path, change)
    assert {item.name: (item.a, item.b) for item in found.differences} == {
        "profile.quantize.bits": ("4", "8"),
        "version of onnxruntime": ("1.31.1", "1.32.0"),
        "verdict": ("pass", "fail"),
    }
    assert [(item.name, item.layer) for item in found.tensors] == [("l.1.down", 1)] and found.tensors_same == 1
    assert len(found.worse) == 2 and found.worse[0].startswith("verdict: A passed, B failed (kl is 0.5")
    file = io.StringIO()
    show(found, Console(file=file, width=120))
    text = file.getvalue()
    assert re.search(r"down +int4 b32 sym, 4.50 bits +int8 b32 sym, 8.50 bits +0.1100 +0.0100", text)
    assert "[bold]" in text
    html = page(found)
    assert "&lt;b&gt;" in html and "<b>" not in html and "l.1.down" in html and "<script" not in html


def test_artifacts(tiny_artifact: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = tiny_artifact("llama", "arm-int4")
    b = tmp_path / "b"
    shutil.copytree(a, b)
    (b / "report.json").write_text(json.dumps(REPORT))
    found = compare(read_side(a), read_side(b))
    # A's are known from its graph alone, so B's are too: errors are not made up, and nothing differs.
    assert (found.tensors_from, found.tensors) == ("graphs", ()) and found.tensors_same > 0
    assert found.files == () and found.not_compared["drift"] == "A has no measured drift"
    assert run(["compare", str(a), str(b), "--fail-if-worse", "--json", "--html", str(tmp_path / "page.html")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["worse"] == [] and "not judged, drift: A has no measured drift" in err
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps({**REPORT, "size": {"artifact_bytes": 10**9}}))
    assert run(["compare", str(a), str(worse)]) == 0
    assert run(["compare", str(a), str(worse), "--fail-if-worse"]) == 3
    assert "- size: " in capsys.readouterr().out


def test_what_is_neither_artifact_nor_report(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no such artifact or report"):
        read_side(tmp_path / "missing")
    (tmp_path / "report.json").write_text("[")
    with pytest.raises(CompressError, match="damaged"):
        read_side(tmp_path / "report.json")
