"""The profile's budget beside what was measured: what a verdict rests on, line by line.

The verdict itself is the gate's (:mod:`compress.validation.gate`); this only shows what it compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compress.report.model import DecoderDrift, EncoderDrift, Report
from compress.report.wording import Z95, plain, share, times, with_error
from compress.sizes import format_size
from compress.validation.gate import BUDGETS, TASKS_OF

LABELS: Mapping[str, str] = {
    "kl": "KL divergence, nats a token",
    "top1_agreement": "Same most probable token",
    "perplexity_ratio": "Perplexity ratio",
    "cosine": "Cosine, mean",
    "worst_cosine": "Cosine, worst text",
    "neighbour_agreement": "Same nearest text",
    "label_agreement": "Same label",
    "accuracy_drop": "Accuracy lost",
    "accuracy_drop_bound": "Accuracy lost, 95 % bound",
    "speedup_vs_pytorch": "Speed against PyTorch",
    "speedup_vs_onnx_float": "Speed against float ONNX",
    "bytes": "Graph and weights",
}
_SHARES = {"top1_agreement", "neighbour_agreement", "label_agreement", "accuracy_drop", "accuracy_drop_bound"}
#: What cannot be larger than 1: drawn from there downwards.
_BOUNDED = _SHARES - {"accuracy_drop", "accuracy_drop_bound"} | {"cosine", "worst_cosine"}


@dataclass(frozen=True)
class Gauge:
    """Where measure and limit lie on a scale, 0..1 each; ``spread`` is the 95 % interval, ``None`` where unknown."""

    value: float
    limit: float
    allowed: tuple[float, float]
    spread: tuple[float, float] | None


@dataclass(frozen=True)
class Limit:
    """A line of the budget. ``gauge`` is ``None`` where nothing was measured."""

    label: str
    measured: str | None
    asked: str
    state: Literal["within", "outside", "not measured"]
    gauge: Gauge | None


def limits(report: Report) -> list[Limit]:
    """Return the budget's lines that apply to the model, in the gate's order; none where the profile is not known."""
    resolved = report.profile.resolved if report.profile else {}
    budget = resolved.get("budget")
    if not isinstance(budget, dict):
        return []
    found, rows = measures(report), []
    for name in BUDGETS:
        asked, measure = budget.get(name), name.split("_", 1)[1]
        if isinstance(asked, bool) or not isinstance(asked, int | float) or not _applies(measure, report):
            continue
        rows.append(_line(name, float(asked), *found.get(measure, (None, None))))
    return rows


def measures(report: Report) -> dict[str, tuple[float | None, float | None]]:
    """Return what was measured and its standard error, by the budget's name without its direction."""
    found: dict[str, tuple[float | None, float | None]] = {"bytes": (float(report.size.artifact_bytes), None)}
    drift = report.drift
    if isinstance(drift, DecoderDrift):
        found["kl"] = (drift.kl_divergence.mean, drift.kl_divergence.standard_error)
        found["top1_agreement"] = (drift.top1_agreement, None)
        found["perplexity_ratio"] = (drift.perplexity_ratio.value, drift.perplexity_ratio.standard_error)
    elif isinstance(drift, EncoderDrift):
        found |= _encoder_measures(drift)
    timed = next((speed for speed in report.speed if speed.evidence == "measured"), None)
    for name in ("pytorch", "onnx_float"):
        found[f"speedup_vs_{name}"] = (getattr(timed, f"speedup_vs_{name}", None), None)
    return found


def _encoder_measures(drift: EncoderDrift) -> dict[str, tuple[float | None, float | None]]:
    found: dict[str, tuple[float | None, float | None]] = {
        "neighbour_agreement": (drift.neighbour_agreement, drift.neighbour_agreement_error),
        "label_agreement": (drift.label_agreement, drift.label_agreement_error),
    }
    if drift.cosine is not None:
        found["cosine"] = (drift.cosine.mean, drift.cosine.standard_error)
        found["worst_cosine"] = (drift.cosine.min, None)
    if drift.task_accuracy is not None:
        found["accuracy_drop"] = (-drift.task_accuracy.difference, None)
        found["accuracy_drop_bound"] = (-drift.task_accuracy.interval[0], None)
    return found


def _applies(measure: str, report: Report) -> bool:
    drift = report.drift
    if isinstance(drift, EncoderDrift) and measure.startswith("accuracy") and drift.task_accuracy is None:
        return False  # judged only where labels were given
    if drift is None:
        return True
    task: Any = getattr(drift, "task", "text-generation")
    return task in TASKS_OF.get(measure, {task})


def _line(name: str, asked: float, value: float | None, error: float | None) -> Limit:
    direction, measure = name.split("_", 1)
    relation = f"{'≤' if direction == 'max' else '≥'} {_asked(measure, asked)}"
    if value is None:
        return Limit(LABELS[measure], None, relation, "not measured", None)
    kept = value <= asked if direction == "max" else value >= asked
    shown = _shown(measure, value, error)
    gauge = _gauge(measure, direction, asked, value, error)
    return Limit(LABELS[measure], shown, relation, "within" if kept else "outside", gauge)


def _asked(measure: str, asked: float) -> str:
    """Return a limit as it was set."""
    if measure == "bytes":
        return format_size(asked)
    if measure in _SHARES:
        return f"{asked * 100:.6g}%"
    return f"{asked:.6g}×" if measure.startswith("speedup") else f"{asked:.6g}"


def _shown(measure: str, value: float, error: float | None) -> str:
    if measure == "bytes":
        return format_size(value)
    if measure.startswith("accuracy"):
        return f"{value:.2%}"
    if measure in _SHARES:
        return share(value, error)
    if measure.startswith("speedup"):
        return times(value)
    if error is not None:
        return with_error(value, error)
    return f"{value:.4f}" if measure in _BOUNDED else plain(value)


def _gauge(measure: str, direction: str, asked: float, value: float, error: float | None) -> Gauge:
    reach = Z95 * (error or 0.0)
    if measure in _BOUNDED:
        low, high = max(1 - 2 * (1 - min(asked, value - reach)), -1.0), 1.0
        low = min(low, 0.999999)
    else:
        low = min(0.0, value - reach)
        if measure == "perplexity_ratio":
            low = min(1.0, asked, value - reach)
        high = low + 1.25 * (max(asked, value + reach, low + 1e-12) - low)

    def place(at: float) -> float:
        return min(max((at - low) / (high - low), 0.0), 1.0)

    allowed = (0.0, place(asked)) if direction == "max" else (place(asked), 1.0)
    spread = None if error is None else (place(value - reach), place(value + reach))
    return Gauge(place(value), place(asked), allowed, spread)
