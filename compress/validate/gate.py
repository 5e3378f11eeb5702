"""The gate: budgets against what was measured. What was not measured cannot pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from compress.errors import UsageError, did_you_mean

# A budget's name is its direction and the name of a measure.
BUDGETS = (
    "max_kl",
    "min_top1_agreement",
    "max_perplexity_ratio",
    "min_speedup_vs_pytorch",
    "min_speedup_vs_onnx_float",
    "max_bytes",
)

# The most nats by which an artifact's decoding may differ from its own prefill. Both run the same weights, but kernels
# for one row and for many differ, and rounding activations to int8 amplifies that: 0.0014 on SmolLM2-135M in int4,
# 1e-15 on tiny float32 models. A mixed-up cache is off by 0.35 or more (tests/validate/test_planted_bugs.py).
MAX_DECODE_SELF_KL = 0.05


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
) -> Judgement:
    """Compare budgets with measures.

    Args:
        budgets: Limits by name (``BUDGETS``); ``None`` is no limit.
        measured: Measures by the budget's name without its ``max_`` or ``min_``; absent or ``None``: not measured.
        missing: Why a measure is absent, by its name.
        fallback: Nodes that did not run on the provider, by provider.
        decode_self_kl: Mean KL of decoding against prefill in nats, by provider.
        failures: What went wrong altogether; each is a reason.

    Raises:
        UsageError: A budget has an unknown name.
    """
    reasons = list(failures)
    for budget, limit in budgets.items():
        if budget not in BUDGETS:
            raise UsageError(f"unknown budget {budget!r}", hint=did_you_mean(budget, BUDGETS))
        if limit is None:
            continue
        direction, measure = budget.split("_", 1)
        value = measured.get(measure)
        if value is None:
            why = (missing or {}).get(measure, "no reason is known")
            reasons.append(f"{measure} was not measured ({why}), and the budget asks for {_relation(direction, limit)}")
        elif not (value <= limit if direction == "max" else value >= limit):  # so that NaN fails
            reasons.append(f"{measure} is {value:.4g}, the budget asks for {_relation(direction, limit)}")
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


def _relation(direction: str, limit: float) -> str:
    return f"at {'most' if direction == 'max' else 'least'} {limit:.4g}"
