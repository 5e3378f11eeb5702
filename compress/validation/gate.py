"""The gate: budgets against what was measured. What was not measured cannot pass.

A budget on something that a model's task does not have is skipped: one profile serves decoders and encoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from compress.errors import UsageError, did_you_mean
from compress.sizes import format_size

# A budget's name is its direction and the name of a measure.
BUDGETS = (
    "max_kl",
    "min_top1_agreement",
    "max_perplexity_ratio",
    "min_cosine",
    "min_worst_cosine",
    "min_neighbour_agreement",
    "min_label_agreement",
    "max_accuracy_drop",
    "max_accuracy_drop_bound",
    "min_speedup_vs_pytorch",
    "min_speedup_vs_onnx_float",
    "max_bytes",
)

_DECODING = frozenset({"text-generation"})
_EMBEDDING = frozenset({"embedding"})
_LABELLED = frozenset({"embedding", "text-classification"})
# Which tasks a measure exists for; those that are not here exist for all.
TASKS_OF: Mapping[str, frozenset[str]] = {
    "kl": _DECODING,
    "top1_agreement": _DECODING,
    "perplexity_ratio": _DECODING,
    "cosine": _EMBEDDING,
    "worst_cosine": _EMBEDDING,
    "neighbour_agreement": _EMBEDDING,
    "label_agreement": frozenset({"text-classification", "token-classification", "question-answering", "fill-mask"}),
    "accuracy_drop": _LABELLED,
    "accuracy_drop_bound": _LABELLED,
}

# The most nats by which an artifact's decoding may differ from its own prefill. Both run the same weights, but kernels
# for one row and for many differ, and rounding activations to int8 amplifies that: 0.0014 on SmolLM2-135M in int4,
# 1e-15 on tiny float32 models. A mixed-up cache is off by 0.35 or more (tests/validation/test_planted_bugs.py).
MAX_DECODE_SELF_KL = 0.05

# The most that a stored weight may be off, as a share of its norm. Rounding to 4 bits costs 0.1 (docs/reliability.md);
# a weight in another order, without its scales or left out is off by 1 or more, and where it is one of many, a budget
# on the whole model can be too wide to see it.
MAX_STORED_ERROR = 0.7


@dataclass(frozen=True)
class Judgement:
    """``pass`` without reasons, or ``fail`` with one sentence a reason."""

    status: Literal["pass", "fail"]
    reasons: tuple[str, ...]


def judge(
    budgets: Mapping[str, float | None],
    measured: Mapping[str, float | None],
    *,
    missing: Mapping[str, str] | None = None,
    fallback: Mapping[str, Sequence[str]] | None = None,
    decode_self_kl: Mapping[str, float] | None = None,
    failures: Sequence[str] = (),
    task: str | None = None,
) -> Judgement:
    """Compare budgets with measures.

    Args:
        budgets: Limits by name (``BUDGETS``); ``None`` is no limit.
        measured: Measures by the budget's name without its ``max_`` or ``min_``; absent or ``None``: not measured.
        missing: Why a measure is absent, by its name.
        fallback: Nodes that did not run on the provider, by provider.
        decode_self_kl: Mean KL of decoding against prefill in nats, by provider.
        failures: What went wrong altogether; each is a reason.
        task: The model's task: budgets that it does not have are skipped. ``None`` skips none.

    Raises:
        UsageError: A budget has an unknown name.
    """
    reasons = list(failures)
    for budget, limit in budgets.items():
        if budget not in BUDGETS:
            raise UsageError(f"unknown budget {budget!r}", hint=did_you_mean(budget, BUDGETS))
        direction, measure = budget.split("_", 1)
        if limit is None or (task is not None and task not in TASKS_OF.get(measure, {task})):
            continue
        value = measured.get(measure)
        if value is None:
            why = (missing or {}).get(measure, "no reason is known")
            reasons.append(f"{measure} was not measured ({why}), and the budget asks for {_relation(budget, limit)}")
        elif not (value <= limit if direction == "max" else value >= limit):  # so that NaN fails
            reasons.append(
                f"{measure} is {_beside(measure, value, limit)}, the budget asks for {_relation(budget, limit)}"
            )
    for provider, nodes in (fallback or {}).items():
        if nodes:
            reasons.append(f"{len(nodes)} nodes did not run on {provider}, the first is {nodes[0]}")
    for provider, value in (decode_self_kl or {}).items():
        if not value <= MAX_DECODE_SELF_KL:
            reasons.append(
                f"on {provider}, decoding through the cache differs from prefill by a KL of {value:.4g}, "
                f"at most {MAX_DECODE_SELF_KL:g} is rounding"
            )
    return Judgement("fail" if reasons else "pass", tuple(reasons))


def misstored(errors: Mapping[str, float | None]) -> list[str]:
    """Return a reason for each weight that is stored further than :data:`MAX_STORED_ERROR` from what it was.

    Args:
        errors: Relative errors by the weight's name; ``None`` was not measured.
    """
    return [
        f"the weight {name} is stored {error:.0%} off, rounding costs at most {MAX_STORED_ERROR:.0%}"
        for name, error in errors.items()
        if error is not None and not error <= MAX_STORED_ERROR
    ]


def concerns(budget: str, reason: str) -> bool:
    """Return whether a reason of :func:`judge` is about a budget."""
    measure = budget.split("_", 1)[1]
    bound = "most" if budget.startswith("max") else "least"
    return reason.startswith((f"{measure} is ", f"{measure} was not measured ")) and f" asks for at {bound} " in reason


def _beside(measure: str, value: float, limit: float) -> str:
    """Return a value with as many digits as tell it from the limit that it misses."""
    if measure == "bytes":
        return format_size(value) if format_size(value) != format_size(limit) else f"{value:,.0f} bytes"
    for digits in (4, 6, 9):
        if f"{value:.{digits}g}" != f"{limit:.4g}":
            return f"{value:.{digits}g}"
    return repr(value)


def _relation(budget: str, limit: float) -> str:
    shown = format_size(limit) if budget == "max_bytes" else f"{limit:.4g}"
    return f"at {'most' if budget.startswith('max') else 'least'} {shown}"
