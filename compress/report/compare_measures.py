"""The measured values of two sides, whether they may be compared, and which side is better."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

from compress.report import compare_paired
from compress.report.compare_model import Judgement, Measure, Side
from compress.report.model import (
    AnyDrift,
    AnySpeed,
    DecoderDrift,
    EncoderDrift,
    EncoderSpeed,
    Environment,
    Report,
    Speed,
    TaskAccuracy,
)

#: Standard errors of the difference that it must exceed.
ERRORS = 2.0
#: Half the width of a 95 % interval, in standard errors.
_HALF_INTERVAL = 1.96
_Better = Literal["lower", "higher"]


def measures(a: Side, b: Side) -> tuple[Measure, ...]:
    """Return size, drift and speed of both sides."""
    return (_size(a, b), *_drift(a, b), *_speed(a.report, b.report))


def _judge(a: float, b: float, margin: float, better: _Better) -> Judgement:
    change = b - a if better == "lower" else a - b
    if a == b:
        return "same"
    return "worse" if change > margin else "better" if -change > margin else "within the errors"


def _measure(
    name: str,
    unit: str,
    a: float | None,
    b: float | None,
    *,
    better: _Better,
    errors: tuple[float | None, float | None] | None = None,
    spread: Callable[[], Judgement] | None = None,
    apart: str | None = None,
) -> Iterator[Measure]:
    """Yield a measure that a side has; ``apart`` says why the two cannot be compared."""
    if a is None and b is None:
        return
    found: dict[str, Any] = {"name": name, "unit": unit, "a": a, "b": b, "better": better}
    if errors is not None:
        found |= {"a_error": errors[0], "b_error": errors[1]}
    if a is None or b is None:
        apart = f"{'A' if a is None else 'B'} has no such measure"
    if apart is not None or a is None or b is None:
        yield Measure(**found, judgement="not comparable", why=apart)
        return
    found |= {"change": b - a, "ratio": b / a if a > 0 and b >= 0 else None}
    if spread is not None:
        yield Measure(**found, judgement=spread())
    elif errors is None or errors[0] is None or errors[1] is None:
        yield Measure(**found, judgement="not judged", why="it has no standard error")
    else:
        margin = ERRORS * float(errors[0] ** 2 + errors[1] ** 2) ** 0.5
        yield Measure(**found, judgement=_judge(a, b, margin, better))


def _size(a: Side, b: Side) -> Measure:
    (made,) = _measure(
        "size",
        "bytes",
        a.artifact_bytes,
        b.artifact_bytes,
        better="lower",
        spread=lambda: _judge(a.artifact_bytes, b.artifact_bytes, 0, "lower"),
    )
    return made


def _drift(left: Side, right: Side) -> Iterator[Measure]:
    one, other = left.report, right.report
    a, b = (None if side is None else side.drift for side in (one, other))
    if a is None or b is None:
        return
    assert one is not None and other is not None
    apart = _drift_apart(one, other, a, b)
    if isinstance(a, DecoderDrift) and isinstance(b, DecoderDrift):
        for item in _decoder_drift(a, b, apart):
            yield _by_position(item, left, right)
    elif isinstance(a, EncoderDrift) and isinstance(b, EncoderDrift):
        yield from _encoder_drift(a, b, apart)


def _drift_apart(one: Report, other: Report, a: AnyDrift, b: AnyDrift) -> str | None:
    """Return in words why two drifts are of different things."""
    reasons = []
    if one.source is not None and other.source is not None:
        origin, theirs = ((s.identifier, s.revision, s.adapter) for s in (one.source, other.source))
        if origin != theirs:
            reasons.append("the sources differ")
    if a.eval_text.sha256 != b.eval_text.sha256:
        reasons.append(f"the evaluation texts differ ({a.eval_text.name}, {b.eval_text.name})")
    elif a.tokens != b.tokens:
        reasons.append(f"{a.tokens} and {b.tokens} tokens of the text were measured")
    for key, what in (("provider", "providers"), ("reference", "references"), ("max_length", "longest texts")):
        mine, yours = getattr(a, key, None), getattr(b, key, None)
        if mine != yours:
            reasons.append(f"the {what} differ ({mine}, {yours})")
    return "; ".join(reasons) or None


def _decoder_drift(a: DecoderDrift, b: DecoderDrift, apart: str | None) -> Iterator[Measure]:
    kl, ratio = (a.kl_divergence, b.kl_divergence), (a.perplexity_ratio, b.perplexity_ratio)
    yield from _measure(
        "KL divergence",
        "nats a token",
        kl[0].mean,
        kl[1].mean,
        better="lower",
        errors=(kl[0].standard_error, kl[1].standard_error),
        apart=apart,
    )
    yield from _measure(
        "perplexity ratio",
        "",
        ratio[0].value,
        ratio[1].value,
        better="lower",
        errors=(ratio[0].standard_error, ratio[1].standard_error),
        apart=apart,
    )
    yield from _measure("KL divergence, p99", "nats a token", kl[0].p99, kl[1].p99, better="lower", apart=apart)
    yield from _measure("top-1 agreement", "share", a.top1_agreement, b.top1_agreement, better="higher", apart=apart)
    yield from _measure(
        "KL divergence, decoding",
        "nats a token",
        a.decode.kl_mean if a.decode else None,
        b.decode.kl_mean if b.decode else None,
        better="lower",
        apart=apart,
    )


def _by_position(item: Measure, a: Side, b: Side) -> Measure:
    """Return a measure that both sides have position by position judged by that; or say why it is not."""
    which = {"KL divergence": "kl", "perplexity ratio": "nll"}.get(item.name)
    if which is None or item.judgement == "not comparable":
        return item
    found, why = None, _unpaired(a, b)
    if a.losses is not None and b.losses is not None and why is None:
        found = compare_paired.paired(getattr(a.losses, which), getattr(b.losses, which))
        why = None if found is not None else "too few positions"
    if found is None:
        return item.model_copy(
            update={"why": f"{item.why}; not by position: {why}" if item.why else f"not by position: {why}"}
        )
    return item.model_copy(update={"judgement": compare_paired.judge(found), "paired": found, "why": None})


def _unpaired(a: Side, b: Side) -> str | None:
    """Return why two sides' losses cannot be compared position by position."""
    if a.losses is None or b.losses is None:
        return "; ".join(f"{name}: {side.no_losses}" for name, side in (("A", a), ("B", b)) if side.losses is None)
    if a.losses.windows_sha256 != b.losses.windows_sha256 or a.losses.nll.shape != b.losses.nll.shape:
        return "the text was cut into other tokens"
    return None


def _encoder_drift(a: EncoderDrift, b: EncoderDrift, apart: str | None) -> Iterator[Measure]:
    if a.task != b.task:
        apart = f"the tasks differ ({a.task}, {b.task})"
    rows: tuple[tuple[str, str, _Better, Callable[[EncoderDrift], tuple[float | None, float | None]]], ...] = (
        ("cosine", "", "higher", lambda d: (d.cosine.mean, d.cosine.standard_error) if d.cosine else (None, None)),
        ("worst cosine", "", "higher", lambda d: (d.cosine.min if d.cosine else None, None)),
        ("same neighbour", "share", "higher", lambda d: (d.neighbour_agreement, d.neighbour_agreement_error)),
        ("same label", "share", "higher", lambda d: (d.label_agreement, d.label_agreement_error)),
        (
            "KL divergence",
            "nats",
            "lower",
            lambda d: (d.kl_divergence.mean, d.kl_divergence.standard_error) if d.kl_divergence else (None, None),
        ),
        ("largest change of a score", "", "lower", lambda d: (d.logit_max_abs, None)),
    )
    for name, unit, better, get in rows:
        (one, error), (other, other_error) = get(a), get(b)
        yield from _measure(name, unit, one, other, better=better, errors=(error, other_error), apart=apart)
    yield from _accuracy(a.task_accuracy, b.task_accuracy, apart)


def _accuracy(a: TaskAccuracy | None, b: TaskAccuracy | None, apart: str | None) -> Iterator[Measure]:
    if a is None and b is None:
        return
    if (
        a is not None
        and b is not None
        and (a.labels.sha256, a.metric, a.max_length)
        != (
            b.labels.sha256,
            b.metric,
            b.max_length,
        )
    ):
        apart = "the labelled examples, the metric or the longest text differ"
    errors = tuple(
        None if item is None else (item.interval[1] - item.interval[0]) / 2 / _HALF_INTERVAL for item in (a, b)
    )
    yield from _measure(
        f"{(a or b).metric.replace('_', ' ')} against the source",  # type: ignore[union-attr]
        "difference",
        a.difference if a else None,
        b.difference if b else None,
        better="higher",
        errors=(errors[0], errors[1]),
        apart=apart,
    )


# ----------------------------------------------------------------------------------------------------------- speed


def _speed(one: Report | None, other: Report | None) -> Iterator[Measure]:
    if one is None or other is None:
        return
    theirs = {item.provider: item for item in other.speed}
    for a in one.speed:
        b = theirs.pop(a.provider, None)
        if b is not None and type(a) is type(b):
            yield from _pair(a, b, _speed_apart(one.environment, other.environment, a, b))
        elif b is None:
            yield from _alone(a, "A", one.environment)
    for b in theirs.values():
        yield from _alone(b, "B", other.environment)


def _alone(speed: AnySpeed, side: str, environment: Environment) -> Iterator[Measure]:
    """Yield the speed on a provider that only one side was timed on, as what cannot be compared."""
    value = speed.decode_tokens_per_second.median if isinstance(speed, Speed) else speed.latency_ms.p50
    name, unit = ("decode", "tokens/s") if isinstance(speed, Speed) else ("latency", "ms")
    yield from _measure(
        f"{name} on {speed.provider}",
        unit,
        value if side == "A" else None,
        value if side == "B" else None,
        better="higher" if isinstance(speed, Speed) else "lower",
    )


def _speed_apart(one: Environment, other: Environment, a: AnySpeed, b: AnySpeed) -> str | None:
    """Return in words why two speeds are of different things: machine, threads, work, or no hardware at all."""
    reasons = []
    for key, what in (("cpu", "processors"), ("cores", "numbers of cores"), ("architecture", "architectures")):
        mine, yours = getattr(one, key), getattr(other, key)
        if mine != yours:
            reasons.append(f"the {what} differ ({mine}, {yours})")
    keys = ("device", "threads", "prompt_tokens", "new_tokens", "evidence")
    for key in keys:
        mine, yours = getattr(a, key, None), getattr(b, key, None)
        if mine != yours:
            reasons.append(f"{key.replace('_', ' ')} differ ({mine}, {yours})")
    if a.evidence != "measured" and a.evidence == b.evidence:
        reasons.append(f"times that are {a.evidence} say nothing of speed")
    return "; ".join(reasons) or None


def _pair(a: AnySpeed, b: AnySpeed, apart: str | None) -> Iterator[Measure]:
    on = f" on {a.provider}"
    if isinstance(a, Speed) and isinstance(b, Speed):
        mine, yours = a.decode_tokens_per_second, b.decode_tokens_per_second
        yield from _measure(
            f"decode{on}",
            "tokens/s",
            mine.median,
            yours.median,
            better="higher",
            spread=lambda: _apart_by_spread((mine.p10, mine.p90), (yours.p10, yours.p90), "higher"),
            apart=apart,
        )
        yield from _measure(
            f"prefill{on}",
            "tokens/s",
            a.prefill_tokens_per_second,
            b.prefill_tokens_per_second,
            better="higher",
            apart=apart,
        )
    elif isinstance(a, EncoderSpeed) and isinstance(b, EncoderSpeed):
        yield from _latencies(a, b, on, apart)
    yield from _measure(f"load{on}", "s", a.load_seconds, b.load_seconds, better="lower", apart=apart)
    yield from _measure(f"peak memory{on}", "bytes", a.peak_rss_bytes, b.peak_rss_bytes, better="lower", apart=apart)


def _latencies(a: EncoderSpeed, b: EncoderSpeed, on: str, apart: str | None) -> Iterator[Measure]:
    others = {(point.batch, point.length): point.latency_ms for point in b.points}
    for point in a.points:
        mine, yours = point.latency_ms, others.get((point.batch, point.length))
        if yours is None:
            continue
        judged = _apart_by_spread((mine.p50, mine.p95), (yours.p50, yours.p95), "lower")
        yield from _measure(
            f"latency{on}, {point.batch} x {point.length}",
            "ms",
            mine.p50,
            yours.p50,
            better="lower",
            spread=lambda judged=judged: judged,  # type: ignore[misc]
            apart=apart,
        )


def _apart_by_spread(a: tuple[float, float], b: tuple[float, float], better: _Better) -> Judgement:
    """Judge by two spreads ``(low, high)``: only where they do not touch does one side win."""
    if a == b:
        return "same"
    if b[1] < a[0]:
        return "worse" if better == "higher" else "better"
    if a[1] < b[0]:
        return "better" if better == "higher" else "worse"
    return "within the errors"
