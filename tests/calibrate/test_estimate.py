"""What calibrating is predicted to take grows with what is asked, and is what the arithmetic says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from compress import pipeline
from compress.calibrate.estimate import Estimate, estimate, measured_rate
from compress.planning import make_plan
from compress.profile import load_profile
from compress.source import open_checkpoint


@pytest.fixture
def predicted(tiny_model: Callable[[str], Path]) -> Callable[..., Estimate | None]:
    def get(*overrides: str, threads: int = 1, rate: float = 1e9) -> Estimate | None:
        profile = load_profile("x86-int4", overrides)
        with open_checkpoint(str(tiny_model("llama"))) as checkpoint:
            plan = make_plan(pipeline.describe(checkpoint), profile, checkpoint)
        return estimate(plan, profile, threads, rate)

    return get


def known(found: Estimate | None) -> Estimate:
    assert found is not None
    return found


def test_nothing_is_predicted_where_nothing_is_calibrated(predicted: Callable[..., Estimate | None]) -> None:
    assert predicted("quantize.effort=fast") is None
    assert predicted("quantize.effort=balanced", "quantize.bits=32", "quantize.roles={}") is None


def test_more_tokens_take_more_of_both(predicted: Callable[..., Estimate | None]) -> None:
    few = known(predicted("quantize.effort=balanced", "calibration.tokens=4096"))
    many = known(predicted("quantize.effort=balanced", "calibration.tokens=65536"))
    assert many.nbytes > few.nbytes and many.seconds > 8 * few.seconds


def test_a_budget_takes_longer_than_roles(predicted: Callable[..., Estimate | None]) -> None:
    roles = known(predicted("quantize.effort=balanced"))
    budget = known(predicted("quantize.effort=balanced", "budget.max_bytes=130KB"))
    assert budget.seconds > roles.seconds and budget.nbytes >= roles.nbytes


def test_time_goes_with_the_machine_and_its_threads(predicted: Callable[..., Estimate | None]) -> None:
    slow = known(predicted("quantize.effort=balanced", rate=1e8))
    fast = known(predicted("quantize.effort=balanced", rate=1e9))
    two = known(predicted("quantize.effort=balanced", threads=2, rate=1e8))
    assert slow.seconds > 5 * fast.seconds and two.seconds == pytest.approx(slow.seconds / 2)
    assert two.nbytes > slow.nbytes


def test_the_machines_rate_is_that_of_a_processor() -> None:
    assert 1e8 < measured_rate(256) < 1e14
