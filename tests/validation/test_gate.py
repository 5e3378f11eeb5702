"""The gate: limits, their direction, and that nothing unmeasured passes."""

from __future__ import annotations

import math

import pytest

from compress.errors import UsageError
from compress.profile import Budget
from compress.validation.gate import BUDGETS, MAX_DECODE_SELF_KL, MAX_STORED_ERROR, TASKS_OF, judge, misstored

GOOD = {
    "kl": 0.1,
    "top1_agreement": 0.9,
    "perplexity_ratio": 1.1,
    "cosine": 0.999,
    "worst_cosine": 0.99,
    "neighbour_agreement": 0.97,
    "label_agreement": 0.98,
    "accuracy_drop": 0.001,
    "accuracy_drop_bound": 0.008,
    "speedup_vs_pytorch": 2.0,
    "speedup_vs_onnx_float": 1.5,
    "bytes": 1000.0,
}
LIMITS = {
    "max_kl": 0.2,
    "min_top1_agreement": 0.8,
    "max_perplexity_ratio": 1.2,
    "min_cosine": 0.998,
    "min_worst_cosine": 0.95,
    "min_neighbour_agreement": 0.96,
    "min_label_agreement": 0.97,
    "max_accuracy_drop": 0.005,
    "max_accuracy_drop_bound": 0.01,
    "min_speedup_vs_pytorch": 1.0,
    "min_speedup_vs_onnx_float": 1.0,
    "max_bytes": 2000.0,
}


def test_every_budget_is_tried_below() -> None:
    assert set(LIMITS) == set(BUDGETS) == set(Budget.model_fields)
    assert {f"max_{name}" in BUDGETS or f"min_{name}" in BUDGETS for name in TASKS_OF} == {True}


@pytest.mark.parametrize(
    ("task", "skipped"),
    [
        ("text-generation", {"cosine", "worst_cosine", "neighbour_agreement", "label_agreement", "accuracy_drop",
                             "accuracy_drop_bound"}),
        ("embedding", {"kl", "top1_agreement", "perplexity_ratio", "label_agreement"}),
        ("text-classification", {"kl", "top1_agreement", "perplexity_ratio", "cosine", "worst_cosine",
                                 "neighbour_agreement"}),
        ("fill-mask", {"kl", "top1_agreement", "perplexity_ratio", "cosine", "worst_cosine", "neighbour_agreement",
                       "accuracy_drop", "accuracy_drop_bound"}),
    ],
)  # fmt: skip
def test_budgets_that_a_task_does_not_have_are_skipped_and_no_others(task: str, skipped: set[str]) -> None:
    reasons = judge(LIMITS, {}, task=task).reasons
    asked = {reason.split(" was not measured")[0] for reason in reasons}
    assert asked == {budget.split("_", 1)[1] for budget in BUDGETS} - skipped
    beyond = {name: -1.0 if f"min_{name}" in BUDGETS else 9e9 for name in GOOD}
    assert len(judge(LIMITS, beyond, task=task).reasons) == len(asked)


def test_a_near_miss_is_told_with_enough_digits() -> None:
    assert judge({"min_cosine": 0.998}, {"cosine": 0.997996}).reasons == (
        "cosine is 0.997996, the budget asks for at least 0.998",
    )
    assert "is 0.997999999" in judge({"min_cosine": 0.998}, {"cosine": 0.9979999990}).reasons[0]


def test_everything_within_its_budget_passes() -> None:
    verdict = judge(LIMITS, GOOD, fallback={"cpu": []}, decode_self_kl={"cpu": 0.0})
    assert (verdict.status, verdict.reasons) == ("pass", ())


@pytest.mark.parametrize("budget", BUDGETS)
def test_each_budget_fails_alone_and_on_its_own_side(budget: str) -> None:
    measure = budget.split("_", 1)[1]
    beyond = LIMITS[budget] * (1.01 if budget.startswith("max") else 0.99)
    verdict = judge(LIMITS, {**GOOD, measure: beyond})
    assert verdict.status == "fail" and len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith(f"{measure} is ") and "the budget asks for at " in verdict.reasons[0]
    assert judge(LIMITS, {**GOOD, measure: LIMITS[budget]}).status == "pass"  # the limit itself is within


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_was_not_measured_fails_with_the_reason(budget: str) -> None:
    measure = budget.split("_", 1)[1]
    for value in ({}, {measure: None}):
        measured = {name: number for name, number in GOOD.items() if name != measure} | value
        verdict = judge(LIMITS, measured, missing={measure: "the dog ate it"})
        assert verdict.status == "fail"
        assert verdict.reasons == (verdict.reasons[0],) and "not measured (the dog ate it)" in verdict.reasons[0]


def test_not_a_number_never_passes() -> None:
    assert judge({"max_kl": 1.0}, {"kl": math.nan}).status == "fail"
    assert judge({}, {}, decode_self_kl={"cpu": math.nan}).status == "fail"


def test_no_budget_asks_for_no_measure() -> None:
    assert judge({}, {}).status == "pass"
    assert judge({"max_kl": None}, {}).status == "pass"


def test_a_fallback_fails_whatever_the_budgets() -> None:
    verdict = judge({}, {}, fallback={"npu": ["a (Gather) on CPU", "b (Add) on CPU"]})
    assert verdict.reasons == ("2 nodes did not run on npu, the first is a (Gather) on CPU",)


def test_decoding_that_differs_from_prefill_fails_whatever_the_budgets() -> None:
    assert judge({}, {}, decode_self_kl={"cpu": MAX_DECODE_SELF_KL}).status == "pass"
    verdict = judge({}, {}, decode_self_kl={"cpu": 2 * MAX_DECODE_SELF_KL})
    assert verdict.status == "fail" and "decoding through the cache differs from prefill" in verdict.reasons[0]


def test_a_failure_is_a_reason() -> None:
    assert judge(LIMITS, GOOD, failures=["it crashed"]).reasons == ("it crashed",)


def test_an_unknown_budget_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="unknown budget 'max_kll'") as caught:
        judge({"max_kll": 1.0}, {})
    assert str(caught.value.hint).startswith("did you mean max_kl")


@pytest.mark.parametrize(("size", "shown"), [(95.4e6, "95.40 MB"), (88_000_001.0, "88,000,001 bytes")])
def test_sizes_have_units(size: float, shown: str) -> None:
    (reason,) = judge({"max_bytes": 88e6}, {"bytes": size}).reasons
    assert reason == f"bytes is {shown}, the budget asks for at most 88.00 MB"


def test_a_weight_that_is_not_what_it_was() -> None:
    kept = {"a": 0.11, "b": None, "c": MAX_STORED_ERROR}
    assert misstored(kept) == []
    (reason,) = misstored({**kept, "layers.3.o": 1.41})
    assert reason == "the weight layers.3.o is stored 141% off, rounding costs at most 70%"
    assert len(misstored({"a": float("nan")})) == 1
