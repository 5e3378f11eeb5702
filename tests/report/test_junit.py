"""JUnit XML of a report: every budget has its case, every reason is in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_report import REPORT

from compress import cli
from compress.errors import UsageError
from compress.report import junit
from compress.report.model import Report
from compress.validation.gate import judge

BUDGET = {"max_kl": 0.4, "min_top1_agreement": 0.5, "min_cosine": 0.9, "min_speedup_vs_pytorch": 1.0}


def report(reasons: list[str], *, fallback: tuple[str, ...] = (), **changes: Any) -> Report:
    """Return a decoder's report on the CPU with these reasons."""
    verdict = {"status": "fail" if reasons else "pass", "reasons": reasons}
    provider = REPORT["providers"][0] | {"verdict": verdict}
    provider["placement"] = provider["placement"] | {"fallback_nodes": list(fallback)}
    profile = {"name": "arm-int4", "resolved": {"budget": BUDGET}}
    return Report.model_validate(REPORT | {"verdict": verdict, "profile": profile, "providers": [provider]} | changes)


def outcomes(found: Report) -> dict[str, str]:
    """Return what became of each case: passed, skipped, or the failure's message."""
    root = ElementTree.fromstring(junit.dumps(found))
    result = {}
    for case in root.iter("testcase"):
        failures = [item.get("message", "") for item in case.iter("failure")]
        skipped = case.find("skipped") is not None
        result[f"{case.get('classname')} {case.get('name')}"] = "; ".join(failures) or (
            "skipped" if skipped else "passed"
        )
    failed = sum(text not in ("passed", "skipped") for text in result.values())
    assert root.get("failures") == str(failed) and root.get("tests") == str(len(result))
    return result


def test_a_pass_has_no_failure() -> None:
    assert outcomes(report([])) == {
        "compress.budget.cpu max_kl": "passed",
        "compress.budget.cpu min_top1_agreement": "passed",
        "compress.budget.cpu min_cosine": "skipped",  # a decoder has none
        "compress.budget.cpu min_speedup_vs_pytorch": "passed",
        "compress.provider cpu": "passed",
        "compress.placement cpu": "passed",
    }


def test_the_gates_own_sentences_are_in_the_cases() -> None:
    judged = judge(
        BUDGET, {"kl": 0.5, "top1_agreement": 0.8}, missing={"speedup_vs_pytorch": "it is not asked for"},
        fallback={"cpu": ["MatMul_1"]}, decode_self_kl={"cpu": 1.0}, failures=["on cpu: it crashed"],
        task="text-generation",
    )  # fmt: skip
    found = outcomes(report(list(judged.reasons), fallback=("MatMul_1",)))
    assert len(judged.reasons) == 5
    assert "kl is 0.5" in found["compress.budget.cpu max_kl"]
    assert found["compress.budget.cpu min_top1_agreement"] == "passed"
    assert "not measured" in found["compress.budget.cpu min_speedup_vs_pytorch"]
    assert "did not run on cpu" in found["compress.placement cpu"]
    assert "it crashed; " in found["compress.provider cpu"] and "through the cache" in found["compress.provider cpu"]
    told = " ".join(found.values())
    assert all(reason in told for reason in judged.reasons)


def test_two_providers_are_told_apart() -> None:
    bad = "kl is 0.5, the budget asks for at most 0.4"
    providers = [
        REPORT["providers"][0] | {"provider": "cpu", "verdict": {"status": "pass", "reasons": []}},
        REPORT["providers"][0] | {"provider": "qnn", "verdict": {"status": "fail", "reasons": [bad]}},
    ]
    verdict = {"status": "fail", "reasons": [f"qnn: {bad}"]}
    found = outcomes(report([], providers=providers, verdict=verdict))
    assert found["compress.budget.cpu max_kl"] == "passed"
    assert found["compress.budget.qnn max_kl"] == bad
    assert "compress.verdict verdict" not in found


def test_a_fail_is_never_without_a_failure() -> None:
    verdict = {"status": "fail", "reasons": ["something else"]}
    assert outcomes(report([], verdict=verdict))["compress.verdict verdict"] == "something else"
    alone = {"verdict": {"status": "fail", "reasons": []}, "providers": []}
    assert "without a reason" in outcomes(report([], **alone))["compress.verdict verdict"]


def test_what_xml_has_no_character_for() -> None:
    found = outcomes(report(["on cpu: \x1b[2J <&> \udc80 \ufffe \U0001f600"]))
    assert found["compress.provider cpu"] == "on cpu: \ufffd[2J <&> \ufffd \ufffd \U0001f600"


def test_the_file_is_written_whatever_the_verdict(tmp_path: Path) -> None:
    junit.write(report([]), tmp_path / "a.xml")
    assert [path.name for path in tmp_path.iterdir()] == ["a.xml"]
    for place in (tmp_path, tmp_path / "none" / "a.xml"):
        with pytest.raises(UsageError):
            junit.check_place(place)


@pytest.mark.usefixtures("fast_skeletons")
def test_an_export_writes_it_when_it_is_rejected(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = report(["kl is 0.5, the budget asks for at most 0.4"]).model_dump(mode="json")
    monkeypatch.setattr("compress.proof.prove", lambda *arguments, **named: made)
    words = ["export", str(tiny_model("llama")), "--profile", "arm-int4", "-o", str(tmp_path / "out")]
    path = tmp_path / "junit.xml"
    assert cli.run([*words, "--no-validate", "--junit", str(path)]) == 2
    assert cli.run([*words, "--junit", str(tmp_path / "none" / "a.xml")]) == 2
    assert not (tmp_path / "out").exists() and not path.exists()
    assert cli.run([*words, "--junit", str(path)]) == 3
    assert path.read_text().count("<failure") == 1
