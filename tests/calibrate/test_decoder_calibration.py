"""The side that asks for a decoder's calibration: what it takes along, what it keeps, and what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import pipeline
from compress.calibrate.decoder import DecoderCalibration, wanted
from compress.contracts import Scheme
from compress.errors import CompressError
from compress.package.writer import DataFile
from compress.planning import Plan, make_plan
from compress.profile import load_profile
from compress.report.calibrated import of_export, of_manifest
from compress.source import OpenCheckpoint, open_checkpoint
from compress.validation import text
from same_process import calibrate_here

SMALL = ("quantize.effort=balanced", "calibration.tokens=2048", "calibration.window=64")
Asked = tuple[DecoderCalibration, Plan]


@pytest.fixture
def asked(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Asked]:
    calibrate_here(monkeypatch)
    (tmp_path / "work").mkdir()

    def get(checkpoint: OpenCheckpoint, *overrides: str) -> Asked:
        profile = load_profile("x86-int4", (*SMALL, *overrides))
        plan = make_plan(pipeline.describe(checkpoint), profile, checkpoint)
        source = pipeline.ModelReference(checkpoint.reference).as_request()
        return DecoderCalibration(source, checkpoint, profile, tmp_path / "work"), plan

    return get


def test_the_best_assignment_is_what_is_quantized(
    asked: Callable[..., Asked], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    seen: list[float] = []
    with open_checkpoint(str(tiny_model("llama"))) as checkpoint:
        calibration, plan = asked(checkpoint, "budget.max_bytes=130KB")
        calibration.read(plan.decoder, seen.append)
        chosen = calibration.measure(plan, seen.append)
        assert chosen.predicted_bytes <= 130_000 and chosen.predicted_bytes != plan.predicted_bytes
        assert {name: chosen.by_name[name].scheme for name in calibration.schemes} == calibration.schemes
        data = tmp_path / "data"
        with DataFile(data, chosen.data_bytes):
            written = calibration.quantize(data, seen.append)
    assert set(written.names) == set(calibration.schemes) and seen[-1] == 1.0
    assert written.errors == calibration.errors and all(0 < error < 1 for error in written.errors.values())
    assert set(written.inline) <= {item.name for fate in chosen.fates for item in fate.stored if item.offset is None}
    assert list((tmp_path / "work").iterdir()) == []
    record = json.loads(json.dumps(calibration.record))
    assert (record["algorithm"], record["effort"], record["text"]["tokens"]) == ("gptq", "balanced", 2048)
    assert record["predicted_kl"] == pytest.approx(
        calibration.allocation.loss if calibration.allocation else 0, rel=1e-3
    )


def test_codes_outside_the_blocks_are_written_too(
    asked: Callable[..., Asked], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """The head's weight, or the tied table: bytes where the plan put them, others left alone."""
    for name in ("llama", "mistral"):
        with open_checkpoint(str(tiny_model(name))) as checkpoint:
            calibration, plan = asked(checkpoint)
            calibration.read(plan.decoder, lambda fraction: None)
            with DataFile(tmp_path / name, plan.data_bytes):
                written = calibration.quantize(tmp_path / name, lambda fraction: None)
        data = np.fromfile(tmp_path / name, np.uint8)
        for fate in plan.fates:
            for stored in fate.stored:
                if stored.offset is not None:
                    inside = data[stored.offset : stored.offset + stored.nbytes]
                    assert inside.any() == (fate.name in written.names), stored.name
        assert ("lm_head" in written.names) == (name == "mistral")


def test_a_worker_that_fails_leaves_no_files(
    asked: Callable[..., Asked], tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **named: Any) -> Any:
        assert list((tmp_path / "work").iterdir()) != []
        raise CompressError("by design")

    with open_checkpoint(str(tiny_model("llama"))) as checkpoint:
        calibration, plan = asked(checkpoint)
        calibration.read(plan.decoder, lambda fraction: None)
        monkeypatch.setattr("compress.calibrate.decoder.run_worker", fail)
        for work in (lambda: calibration.measure(plan, print), lambda: calibration.quantize(tmp_path / "data", print)):
            with pytest.raises(CompressError, match="by design"):
                work()
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("profile", "overrides", "calibrated"),
    [
        ("x86-int4", ("quantize.effort=balanced",), True),
        ("x86-int4", ("quantize.effort=max",), True),
        ("x86-int4", (), False),
        ("float", ("quantize.effort=balanced",), False),
    ],
)
def test_what_is_calibrated(
    profile: str, overrides: tuple[str, ...], calibrated: bool, tiny_model: Callable[[str], Path]
) -> None:
    recipe = load_profile(profile, overrides)
    with open_checkpoint(str(tiny_model("gpt2"))) as checkpoint:
        assert wanted(make_plan(pipeline.describe(checkpoint), recipe, checkpoint), recipe) == calibrated
    with open_checkpoint(str(tiny_model("bert:embedding"))) as checkpoint:
        assert not wanted(make_plan(pipeline.describe(checkpoint), recipe, checkpoint), recipe)


def test_reports_know_the_text_from_an_export_and_from_its_manifest(
    asked: Callable[..., Asked], tiny_model: Callable[[str], Path]
) -> None:
    with open_checkpoint(str(tiny_model("llama"))) as checkpoint:
        calibration, plan = asked(checkpoint)
        calibration.read(plan.decoder, lambda fraction: None)
    found = of_export(calibration)
    kept = of_manifest({"calibration": json.loads(json.dumps(calibration.record))})
    assert kept is not None and kept.content == found.content and found.allocation is None
    own = text.embedded("calibration").content
    for half, share in ((own[:5000], 1.0), (text.embedded("evaluation").content[:5000], 0.0)):
        assert found.describe(half) == kept.describe(half)
        assert found.describe(half).overlap == pytest.approx(share, abs=0.02)
    assert found.describe(None).overlap is None
    other = of_manifest({"calibration": {**calibration.record, "text": {**found.record, "sha256": "0" * 64}}})
    assert other is not None and other.describe(own).overlap is None  # whose content nobody has
    assert of_manifest({}) is None and of_manifest({"calibration": {"text": {"name": "x"}, "kept_float": []}}) is None


def test_the_part_of_a_text_that_windows_take(tiny_model: Callable[[str], Path]) -> None:
    whole, model = text.embedded("evaluation"), tiny_model("llama")
    part = text.beginning(whole, model, length=64, tokens=300)
    _, ids = text.tokenize(part, model)
    windows = text.windows(whole, model, length=64, tokens=300, vocab_size=384)
    assert whole.content.startswith(part) and windows.size == 256
    assert ids[:250] == windows.reshape(-1)[:250].tolist() and len(ids) < 256 + 10


def test_schemes_travel_whole() -> None:
    from compress.calibrate.decoder import _listed

    for scheme in (Scheme(4, 32, symmetric=True), Scheme(8, 0, symmetric=True, activations="dynamic")):
        assert Scheme(*json.loads(json.dumps(_listed(scheme)))) == scheme
