"""Stages: timed and recorded, shown on standard error when asked to, silent otherwise."""

from __future__ import annotations

import pytest

from compress.progress import Stage, Stages


def test_stages_are_recorded_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages()
    with stages.stage("weights", unit="weights") as meter:
        meter(1, 2)
    stages.add("worker", 1.23456, 10)
    first, second = stages.done
    assert first.name == "weights" and 0 <= first.seconds < 5
    assert first.peak_rss_bytes > 10_000_000, "the kernel counts in KiB, this in bytes"
    assert second == Stage("worker", 1.235, 10)
    with stages.follow() as report:
        report("speed", 0.5)
    assert capsys.readouterr() == ("", "")


def test_stages_are_shown_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    stages = Stages(show=True)
    with stages.stage("weights", unit="weights") as meter:
        meter(1_000_000, 2_000_000)
    with stages.follow() as report:
        report("speed", 0.5)
        report("speed", 1.0)
    out, err = capsys.readouterr()
    assert out == ""
    assert "weights" in err and "100%" in err and "speed" in err


def test_a_failed_stage_is_not_recorded() -> None:
    stages = Stages()
    with pytest.raises(ValueError, match="no"), stages.stage("graph"):
        raise ValueError("no")
    assert stages.done == []
