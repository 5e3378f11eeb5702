"""What a provider can do wrong is told, with whose fault it is, and never taken for a pass."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress import doctor, proof, providers, validation
from compress.contracts import Evidence
from compress.errors import EXIT_OK, EXIT_OUTSIDE_BUDGET, EXIT_PROVIDER, CompressError, ProviderError
from compress.validation import on_provider, speed
from compress.validation.run import Measured, measure_from_cpu, output_of
from faulty_provider import planted

PLAN = speed.SpeedPlan(prompt_tokens=8, new_tokens=3, repeats=1, timeout=60)


@pytest.fixture(scope="module")
def source(tiny_model: Callable[[str], Path]) -> Path:
    """The tiny Llama."""
    return tiny_model("llama")


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory, make_float_graph: Callable[[Path], Path]) -> Path:
    """It as a float graph, in the layout of an artifact."""
    directory = tmp_path_factory.mktemp("faults") / "artifact"
    directory.mkdir()
    graph = make_float_graph(shutil.copytree(source, directory.parent / "copy"))
    for path in (graph, graph.with_name("model.onnx.data"), source / "config.json", source / "tokenizer.json"):
        shutil.copy(path, directory)
    (directory / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"filename": "model.onnx"}}}))
    return directory


def run(artifact: Path, source: Path | None, **changes: Any) -> validation.Validation:
    """Validate on the CPU and on the faulty provider."""
    settings: dict[str, Any] = {
        "checkpoint_spec": None if source is None else validation.CheckpointSpec(str(source)),
        "budgets": {"max_kl": 1e-6},
        "providers": ("cpu", "faulty"),
        "tokens": 64,
        "window": 32,
        "pytorch_baseline": False,
        "speed_plan": PLAN,
    }
    return validation.run_validation(artifact, **{**settings, **changes})


def exit_code(found: validation.Validation) -> int:
    """Return what the command line ends with."""
    made = {
        "verdict": found.verdict.model_dump(),
        "providers": [item.model_dump() for item in found.providers],
    }
    return proof.exit_code(made)


@pytest.mark.parametrize(
    ("fault", "state", "words"),
    [
        ("crash", "failed", "crashed with SIGABRT"),
        ("killed", "failed", "SIGKILL: out of memory"),
        ("refuse", "failed", "operators that it does not take: Softmax, Gather"),
        ("fallback", "fell_back", "nodes did not run on faulty"),
    ],
)
def test_a_fault_is_a_reason_and_the_other_provider_is_judged_by_itself(
    fault: str, state: str, words: str, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "load", planted(fault))
    found = run(artifact, None, budgets={})
    cpu, faulty = found.providers
    assert (cpu.provider, cpu.state, cpu.verdict.status) == ("cpu", "ran", "pass")
    assert (faulty.provider, faulty.state, faulty.verdict.status) == ("faulty", state, "fail")
    assert exit_code(found) == EXIT_PROVIDER
    assert words in "; ".join(found.verdict.reasons)


@pytest.mark.parametrize(("fault", "code"), [("garbage", EXIT_OUTSIDE_BUDGET), ("none", EXIT_OK)])
def test_drift_is_told_from_the_source_and_from_the_cpu(
    fault: str, code: int, artifact: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "load", planted(fault))
    found = run(artifact, source)
    cpu, faulty = found.providers
    assert exit_code(found) == code and (found.verdict.status == "pass") == (fault == "none")
    assert (cpu.verdict.status, cpu.drift_from_cpu, faulty.state) == ("pass", None, "ran")
    assert faulty.drift_from_cpu is not None and faulty.drift_from_cpu.reference.endswith("cpu provider")
    assert (faulty.drift_from_cpu.kl_divergence.mean < 1e-9) == (fault == "none")
    assert fault == "none" or "faulty: kl is" in found.verdict.reasons[0]


def test_a_hang_is_ended(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "load", planted("hang"))
    settings = {"providers": ("faulty",), "budgets": {}}
    found = run(artifact, None, **settings, speed_plan=speed.SpeedPlan(8, 3, 1, timeout=3))
    assert found.providers[0].state == "failed" and exit_code(found) == EXIT_PROVIDER
    assert "hung: no answer within 3 s" in found.verdict.reasons[0]


def test_a_fallback_that_the_profile_allows_passes(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "load", planted("fallback"))
    settings = {"providers": ("faulty",), "budgets": {}}
    placement = run(artifact, None, **settings).providers[0].placement
    assert placement is not None
    kinds = sorted({node.split("(")[1].split(")")[0] for node in placement.fallback_nodes})
    allowed = run(artifact, None, **settings, terms=on_provider.Terms(allowed_fallback=tuple(kinds)))
    assert allowed.verdict.status == "pass" and allowed.providers[0].state == "ran"
    one_less = run(artifact, None, **settings, terms=on_provider.Terms(allowed_fallback=tuple(kinds[1:])))
    assert one_less.verdict.status == "fail" and one_less.providers[0].state == "fell_back"


def test_a_nodes_name_does_not_pass_for_its_type() -> None:
    terms = on_provider.Terms(allowed_fallback=("Cast",))
    entries = ["a (Cast) on CPUExecutionProvider", "(Cast) (MatMul) on CPUExecutionProvider"]
    assert terms.forbidden(entries) == entries[1:]


def test_what_a_failed_run_left_is_no_reference(tmp_path: Path) -> None:
    measured, base = Measured(), output_of(tmp_path, "cpu")

    def broken(path: Path) -> None:
        path.write_bytes(b"half")
        raise CompressError("it crashed")

    measure_from_cpu(measured, tmp_path, broken, lambda path: pytest.fail("half a file was compared with"))
    assert measured.drift_from_cpu is None and measured.not_measured == {"drift_from_cpu": "it crashed"}
    assert not base.exists()


@pytest.mark.parametrize("evidence", ["simulated", "emulated"])
def test_a_simulators_time_is_no_speed(evidence: Evidence, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "load", planted("none", evidence))
    budgets = {"min_speedup_vs_onnx_float": 1e-6}
    found = run(artifact, None, budgets=budgets)
    assert [item.provider for item in found.speed] == ["cpu"]
    assert found.providers[1].evidence == evidence and evidence in found.providers[1].not_measured["speed"]
    alone = run(artifact, None, budgets=budgets, providers=("faulty",))
    assert alone.verdict.status == "fail" and f"the run is {evidence}" in alone.verdict.reasons[0]


def test_a_missing_provider_is_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "load", planted("missing"))
    with pytest.raises(ProviderError, match="faulty provider does not work here: its library") as caught:
        on_provider.require(["cpu", "faulty"])
    assert caught.value.exit_code == EXIT_PROVIDER and caught.value.hint == "compress doctor --install faulty"


def test_a_graph_is_checked_where_it_cannot_run(artifact: Path) -> None:
    found = run(artifact, None, providers=("coreml",), budgets={})
    (coreml,) = found.providers
    if coreml.evidence == "measured":
        pytest.skip("this is a Mac: the session itself ran")
    assert (coreml.evidence, coreml.state, coreml.drift) == ("static", "fell_back", None)
    assert coreml.placement is not None and 0 < coreml.placement.nodes_on_provider < coreml.placement.nodes_total
    assert any("GroupQueryAttention" in node for node in coreml.placement.fallback_nodes)
    assert found.speed == () and exit_code(found) == EXIT_PROVIDER


class TestDoctor:
    """What ``compress doctor`` finds out."""

    @pytest.mark.parametrize(
        ("fault", "words"),
        [
            ("crash", "crashed with SIGABRT"),
            ("refuse", "does not take"),
            ("fallback", "left a product and a sum to another one"),
            ("garbage", "computes a product and a sum wrongly"),
            ("missing", "is not installed"),
        ],
    )
    def test_a_fault_is_no_evidence(self, fault: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(providers, "load", planted(fault))
        found = doctor.examine("faulty")
        assert (found.works, found.evidence, found.device) == (False, "none", None)
        assert found.reason is not None and words in found.reason

    def test_a_hang_is_ended(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(providers, "load", planted("hang"))
        found = doctor.examine("faulty", timeout=3)
        assert not found.works and found.reason is not None and "hung" in found.reason
        assert found.remedy is not None and "waiting for a device" in found.remedy

    def test_what_works_says_where(self) -> None:
        found = doctor.examine("cpu")
        assert found.works and found.evidence == "measured" and found.device and found.versions["onnxruntime"]
        document = doctor.document([found])
        assert json.loads(json.dumps(document))["providers"][0]["provider"] == "cpu"
        assert "measured" in doctor.text([found])
