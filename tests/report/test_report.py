"""The report's schema, its JSON and its tables."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError
from rich.console import Console

from compress.errors import CompressError, UsageError
from compress.report import environment, terminal
from compress.report import json as report_json
from compress.report.chain import chain_svg
from compress.report.model import EncoderDrift, EncoderSpeed, Report

REPORT: dict[str, Any] = {
    "schema_version": 2,
    "verdict": {"status": "fail", "reasons": ["kl is 0.5, the budget asks for at most 0.4 [bold]"]},
    "source": {"identifier": "owner/model", "kind": "hub", "revision": "abc", "adapter": None},
    "profile": {"name": "arm-int4", "resolved": {"quantize": {"bits": 4}}},
    "size": {"source_bytes": 540_000_000, "artifact_bytes": 86_500_000, "ratio": 6.243},
    "drift": {
        "provider": "cpu",
        "tokens": 2044,
        "windows": 4,
        "eval_text": {"name": "python-language-reference/evaluation", "sha256": "0" * 64},
        "reference": "PyTorch float32 of BF16 weights",
        "reference_perplexity": 13.3,
        "perplexity_ratio": {"value": 1.349, "standard_error": 0.007},
        "kl_divergence": {"mean": 0.4125, "standard_error": None, "p99": 2.5},
        "top1_agreement": 0.664,
        "confident_tokens": 900,
        "confident_flips": 31,
        "logit_max_abs": 9.5,
        "decode": {"tokens": 64, "kl_mean": 0.4, "prefill_kl_mean": 0.4, "self_kl_mean": 0.001, "self_kl_max": 0.01},
    },
    "speed": [
        {
            "provider": "cpu",
            "device": "a processor",
            "evidence": "measured",
            "threads": 2,
            "prompt_tokens": 128,
            "new_tokens": 32,
            "repeats": 3,
            "load_seconds": 0.3,
            "peak_rss_bytes": 200_000_000,
            "prefill_tokens_per_second": 551.0,
            "decode_tokens_per_second": {"median": 107.0, "p10": 99.0, "p90": 110.0},
            "baselines": {
                "pytorch": {"skipped": "the float32 model needs about 18 GB of memory, 8 GB are available"},
                "onnx_float": {
                    "load_seconds": 0.9,
                    "peak_rss_bytes": 900_000_000,
                    "prefill_tokens_per_second": 671.0,
                    "decode_tokens_per_second": {"median": 34.0, "p10": 30.0, "p90": 35.0},
                },
            },
            "speedup_vs_onnx_float": 3.147,
            "prefill_speedup_vs_onnx_float": 0.82,
        }
    ],
    "placement": [{"provider": "cpu", "nodes_total": 339, "nodes_on_provider": 339, "fallback_nodes": []}],
    "providers": [
        {
            "provider": "cpu",
            "device": "a processor",
            "evidence": "measured",
            "state": "ran",
            "verdict": {"status": "fail", "reasons": ["kl is 0.5, the budget asks for at most 0.4"]},
            "placement": {"provider": "cpu", "nodes_total": 339, "nodes_on_provider": 339, "fallback_nodes": []},
            "drift": None,
            "drift_from_cpu": None,
            "not_measured": {},
            "versions": {"onnxruntime": "1.31.1"},
        }
    ],
    "fusions": {"skip_layer_norm": 12},
    "allocation": {
        "budget": {"max_bytes": 88_000_000.0, "max_kl": None},
        "bytes": 87_999_000,
        "predicted_kl": 0.0925,
        "measured_kl": 0.1011,
        "gap": 0.0001,
        "frontier": [
            {"bytes": 60_000_000, "predicted_kl": 1.5, "relative_decode_time": 0.8},
            {"bytes": 90_000_000, "predicted_kl": 0.0625, "relative_decode_time": 1.05},
            {"bytes": 140_000_000, "predicted_kl": 0.001, "relative_decode_time": 1.5},
        ],
        "tensors": [
            {
                "name": "layer.0.down",
                "role": "down",
                "storage": "int4 b64 sym",
                "bytes": 30_000_000,
                "predicted_kl": 0.09,
                "why": "no option is smaller",
            },
            {
                "name": "layer.1.down",
                "role": "down",
                "storage": "int8 b32 asym",
                "bytes": 57_000_000,
                "predicted_kl": 0.0025,
                "why": "no option loses less",
            },
        ],
    },
    "calibration": {
        "source": "text",
        "name": "domain.txt",
        "sha256": "2" * 64,
        "tokens": 8192,
        "window": 512,
        "seed": None,
        "overlap": 0.2535,
    },
    "stages": [{"name": "quantize", "seconds": 12.5, "peak_rss_bytes": 400_000_000}, {"name": "plan", "seconds": 0.1}],
    "environment": {
        "versions": {"python": "3.11.7"},
        "cpu": "a processor",
        "cores": 2,
        "instruction_sets": ["avx2"],
        "os": "Linux 6",
        "architecture": "x86_64",
        "memory_bytes": 1,
    },
}


POINT = {
    "batch": 1,
    "length": 128,
    "runs": 90,
    "latency_ms": {"p50": 4.125, "p95": 4.75},
    "sequences_per_second": 242.4,
    "tokens_per_second": 31030.0,
}
ACCURACY: dict[str, Any] = {
    "labels": {"name": "labels.jsonl", "sha256": "1" * 64},
    "metric": "accuracy",
    "examples": 872,
    "truncated": 3,
    "max_length": 512,
    "reference": 0.9106,
    "artifact": 0.9083,
    "difference": -0.0023,
    "interval": [-0.0085, 0.0038],
    "interval_method": "paired 95 % score interval (Tango 1998)",
    "flips": {"right_to_wrong": 5, "wrong_to_right": 3, "changed": 9},
}
EMBEDDING: dict[str, Any] = {
    "provider": "cpu",
    "task": "embedding",
    "texts": 256,
    "tokens": 11213,
    "items": 256,
    "unit": "texts",
    "max_length": 256,
    "batch": 8,
    "eval_text": {"name": "python-language-reference/evaluation", "sha256": "0" * 64},
    "reference": "PyTorch float32 of F32 weights",
    "cosine": {"mean": 0.99852, "min": 0.98765, "standard_error": 0.00012},
    "neighbour_agreement": 0.9648,
    "neighbour_agreement_error": 0.0115,
    "task_accuracy": {**ACCURACY, "metric": "spearman", "flips": None, "truncated": 0, "difference": -0.0012},
}
CLASSIFIER: dict[str, Any] = {
    **EMBEDDING,
    "task": "token-classification",
    "unit": "tokens",
    "items": 10701,
    "cosine": None,
    "neighbour_agreement": None,
    "neighbour_agreement_error": None,
    "label_agreement": 0.9912,
    "label_agreement_error": 0.0031,
    "kl_divergence": {"mean": 0.0123, "standard_error": 0.0004, "p99": 0.21},
    "logit_max_abs": 0.75,
    "task_accuracy": ACCURACY,
}
ENCODER: dict[str, Any] = {
    **REPORT,
    "drift": EMBEDDING,
    "speed": [
        {
            "provider": "cpu",
            "device": "a processor",
            "evidence": "measured",
            "threads": 2,
            "repeats": 3,
            "load_seconds": 0.1,
            "peak_rss_bytes": 90_000_000,
            "batch": 1,
            "length": 128,
            "latency_ms": {"p50": 4.125, "p95": 4.75},
            "points": [
                {**POINT, "length": 16, "speedup_vs_onnx_float": 1.5},
                {**POINT, "speedup_vs_onnx_float": 3.25},
            ],
            "baselines": {"onnx_float": {"points": [POINT]}, "pytorch": {"skipped": "it was not asked for"}},
            "speedup_vs_onnx_float": 3.25,
        }
    ],
}


@pytest.fixture
def report() -> Report:
    return Report.model_validate(REPORT)


def shown(report: Report, width: int) -> str:
    stream = io.StringIO()
    terminal.show(report, Console(file=stream, width=width, no_color=True, force_terminal=False))
    return stream.getvalue()


def test_it_survives_the_round_trip_byte_by_byte(report: Report, tmp_path: Path) -> None:
    report_json.write(report, tmp_path / "report.json")
    assert report_json.read(tmp_path / "report.json") == report
    assert (tmp_path / "report.json").read_text() == report_json.dumps(report)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_chain_has_a_line_a_step(report: Report) -> None:
    drift = REPORT["drift"]
    source, less = (
        {
            "step": step,
            "bytes": size,
            "size_factor": None,
            "speedup_vs_source": speed,
            "speed_factor": None,
            "drift": lost,
        }
        for step, size, speed, lost in (("source", 4000, 1.0, None), ("pruned", 2500, 1.5, drift))
    )
    sizes = {"inner": 8, "heads": 2, "kv_heads": 1, "layers": 2}
    pruning = {
        "before": sizes,
        "after": {**sizes, "inner": 4},
        "layers": [0, 1],
        "algorithm": "surgeon",
        "recover": "refit",
        "chain": [source, less],
    }
    made = Report.model_validate({**REPORT, "pruning": pruning})
    text = shown(made, 100)
    assert "pruned, then quantized" in text and "2.5 kB, 1.50x as fast, KL " in text
    assert "pruned, then quantized" not in shown(report, 100)
    picture = chain_svg(made.pruning.chain if made.pruning is not None else ())
    assert picture.count("<rect") == 5 and "1.50x as fast" in picture
    ElementTree.fromstring(picture)


def test_keys_are_sorted_and_complete(report: Report) -> None:
    document = json.loads(report_json.dumps(report))
    assert list(document) == sorted(document)
    assert list(document["drift"]) == sorted(document["drift"])
    assert {*REPORT, "pruning", "created", "tensors", "samples"} == set(document)
    assert document["speed"][0]["speedup_vs_pytorch"] is None  # not measured is said, not left out


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValidationError):
        Report.model_validate({**REPORT, "size": {"artifact_bytes": 1, "ratio": value}})


def test_an_allocations_keys_are_checked_and_it_may_be_absent(tmp_path: Path) -> None:
    older = {key: value for key, value in REPORT.items() if key != "allocation"}
    assert Report.model_validate(older).allocation is None, "reports made before bits were chosen are still read"
    changed = {**REPORT, "allocation": {**REPORT["allocation"], "bits": 4}}
    (tmp_path / "report.json").write_text(json.dumps(changed))
    with pytest.raises(CompressError, match=r"allocation\.bits"):
        report_json.read(tmp_path / "report.json")


def test_unknown_keys_and_versions_are_refused(tmp_path: Path) -> None:
    for change, key in (
        ({"colour": "red"}, "colour"),
        ({"schema_version": 3}, "version 3.*upgrade"),
        ({"schema_version": "2"}, "schema_version"),
    ):
        (tmp_path / "report.json").write_text(json.dumps({**REPORT, **change}))
        with pytest.raises(CompressError, match=f"(?s){key}"):
            report_json.read(tmp_path / "report.json")
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(CompressError, match="damaged"):
        report_json.read(tmp_path / "report.json")
    with pytest.raises(CompressError, match="cannot be read"):
        report_json.read(tmp_path / "absent.json")


def test_a_report_of_an_older_version_is_read_as_this_version_has_it(report: Report, tmp_path: Path) -> None:
    older = {key: value for key, value in REPORT.items() if key not in ("created", "tensors", "samples")}
    (tmp_path / "report.json").write_text(json.dumps({**older, "schema_version": 1}))
    assert report_json.read(tmp_path / "report.json") == Report.model_validate({**older, "schema_version": 2})


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_tables_say_everything_at_any_width(report: Report, width: int) -> None:
    output = shown(report, width)
    assert max(map(len, output.splitlines())) <= width
    assert "\x1b" not in output
    flat = "".join(output.split())
    for fact in (
        "FAIL", "kl is 0.5, the budget asks for at most 0.4 [bold]", "86.5 MB", "6.24x", "0.4125", "1.3490 ± 0.0070",
        "66.4%", "31 of 900", "107 (99 to 110)", "decode 3.15x, prefill 0.82x", "not measured: the float32 model",
        "339 of 339 nodes", "12.5 s, 400 MB", "0.1 s", "measured, 2 threads", "chosen for 88 MB",
        "1 in 4 bits, 1 in 8; KL 0.092", "predicted 0.0925, measured 0.1011", "60.00 MB",
    ):  # fmt: skip
        assert "".join(fact.split()) in flat, fact


@pytest.mark.parametrize("width", [40, 80, 200])
def test_an_encoders_tables_say_everything_at_any_width(width: int) -> None:
    facts = {
        "embedding": (
            "0.9985 ± 0.0001", "0.9877", "96.5% ± 1.1%", "0.9106 -> 0.9083", "-0.0012 (95 %: -0.0085 to +0.0038)",
            "872 examples of labels.jsonl", "256 texts, 11213 tokens of", "4.12 ms (p95 4.75), 242/s, 31030 tok/s",
            "3.25x at 1 x 128, 1.50x at 1 x 16", "not measured: it was not asked for", "skip_layer_norm", "12x",
        ),
        "token-classification": (
            "99.1% ± 0.3%", "0.0123 ± 0.0004 (p99 0.21)", "0.75 of a score", "91.06% -> 90.83%", "10701 tokens",
            "-0.23 points (95 %: -0.85 to +0.38)", "5 lost, 3 won, 9 changed", "3 cut to 512 tokens",
        ),
    }  # fmt: skip
    for drift in (EMBEDDING, CLASSIFIER):
        output = shown(Report.model_validate({**ENCODER, "drift": drift}), width)
        assert max(map(len, output.splitlines())) <= width and "\x1b" not in output
        flat = "".join(output.split())
        for fact in facts[drift["task"]]:
            assert "".join(fact.split()) in flat, fact
    assert "KL" not in shown(Report.model_validate({**ENCODER, "allocation": None}), width)


def test_an_encoders_report_is_read_back_and_its_errors_name_the_key(tmp_path: Path) -> None:
    made = Report.model_validate(ENCODER)
    report_json.write(made, tmp_path / "report.json")
    again = report_json.read(tmp_path / "report.json")
    assert again == made and isinstance(again.drift, EncoderDrift) and isinstance(again.speed[0], EncoderSpeed)
    document = json.loads((tmp_path / "report.json").read_text())
    assert set(document["drift"]["cosine"]) >= {"mean", "min"} and document["drift"]["label_agreement"] is None
    document["drift"]["cosin"] = 1
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises(CompressError, match=r"drift\.encoder\.cosin"):
        report_json.read(tmp_path / "report.json")


def test_a_warning_needs_more_in_common_than_chance_gives(report: Report) -> None:
    assert report.calibration is not None
    for overlap, warned in ((None, False), (0.0, False), (0.01, False), (0.011, True), (1.0, True)):
        calibration = report.calibration.model_copy(update={"overlap": overlap})
        assert (calibration.warning() is not None) == warned, overlap
        output = "".join(shown(report.model_copy(update={"calibration": calibration}), 80).split())
        assert ("themodelwascalibratedon" in output) == warned
        assert ("incommon" in output) == (overlap is not None)


def test_text_that_the_model_wrote_is_shown_with_its_seed(report: Report) -> None:
    written = {"source": "self", "name": "text that the model wrote", "sha256": "3" * 64, "tokens": 8192, "seed": 7}
    made = Report.model_validate({**REPORT, "calibration": written})
    output = shown(made, 100)
    assert "8192 tokens of text that the model wrote (seed 7)" in output and "in common" not in output
    assert "tokens of" not in shown(report.model_copy(update={"calibration": None, "drift": None}), 100)


@pytest.mark.parametrize("change", [{"overlap": 1.1}, {"overlap": -0.1}, {"source": "dream"}, {"colour": "red"}])
def test_a_calibration_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Report.model_validate({**REPORT, "calibration": {**REPORT["calibration"], **change}})


def test_what_was_not_measured_has_no_line(report: Report) -> None:
    nothing = {"drift": None, "speed": (), "placement": (), "providers": (), "stages": (), "allocation": None}
    bare = report.model_copy(update=nothing)
    output = shown(bare, 80)
    assert "KL" not in output and "tok/s" not in output and "nodes" not in output


@pytest.mark.parametrize(
    ("places", "line"),
    [
        ((None, None), "2 of 2 texts as the source's"),
        ((None, 12, None, 30), "2 of 4 texts as the source's; first difference after 12 tokens"),
        ((1,), "0 of 1 texts as the source's; first difference after 1 token"),
    ],
)
def test_samples_have_one_line(report: Report, places: tuple[int | None, ...], line: str) -> None:
    text = {"prompt": "p", "chat": False, "source": "a", "artifact": "b", "tokens": 32, "source_complete": True}
    samples = [{**text, "first_difference": place} for place in places]
    with_samples = Report.model_validate({**REPORT, "samples": samples})
    made, plain = ([row.rstrip() for row in shown(one, 120).splitlines()] for one in (with_samples, report))
    (new,) = (row for row in made if row not in plain)
    assert new.split(maxsplit=1) == ["samples", line] and len(made) == len(plain) + 1


def test_the_date_is_the_epochs_where_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert environment.created() == "2023-11-14T22:13:20+00:00"
    for wrong in ("", "yesterday", "1.5", "9" * 30):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH is no time"):
            environment.created()
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    now = datetime.fromisoformat(environment.created())
    assert abs((datetime.now(UTC) - now).total_seconds()) < 60 and not now.microsecond


def test_a_passing_verdict_is_a_word(report: Report) -> None:
    passed = report.model_copy(update={"verdict": report.verdict.model_copy(update={"status": "pass", "reasons": ()})})
    assert shown(passed, 80).startswith("PASS\n")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (86.5e6, "86.5 MB"), (2.72e9, "2.72 GB")]
)
def test_sizes_are_decimal(count: float, text: str) -> None:
    assert terminal.size(count) == text


def test_the_environment_names_what_is_installed() -> None:
    found = environment.environment()
    assert {"python", "compress", "onnxruntime", "torch", "transformers", "numpy"} <= set(found.versions)
    assert found.cpu and found.cores >= 1 and (found.memory_bytes or 0) > 1 << 28


def test_processors_are_read_from_what_the_kernel_says() -> None:
    assert environment.cpu("model name\t: A 1\nflags\t\t: fpu avx2\n\nmodel name\t: B\nflags : none\n") == (
        "A 1",
        frozenset({"fpu", "avx2"}),
    )
    assert environment.cpu("Features\t: asimd i8mm\nModel\t\t: Pi") == ("Pi", frozenset({"asimd", "i8mm"}))
    assert environment.cpu("") == ("", frozenset())


def test_reports_load_no_runtime() -> None:
    code = (
        "import sys, compress.report.terminal, compress.report.environment as e; e.environment();"
        "print([m for m in ('torch', 'transformers', 'onnxruntime') if m in sys.modules])"
    )
    root = str(Path(environment.__file__).parents[2])
    output = subprocess.check_output([sys.executable, "-c", code], env={"PYTHONPATH": root})
    assert output.decode().strip() == "[]"
