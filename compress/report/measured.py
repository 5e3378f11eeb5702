"""Size, drift and speed as a report page shows them: readings, tables and bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from compress.report.figures import Bar, BarRow, HistogramFigure, bars, histogram
from compress.report.model import (
    AnyDrift,
    AnySpeed,
    Baseline,
    DecoderDrift,
    EncoderBaseline,
    EncoderDrift,
    EncoderSpeed,
    Point,
    Report,
    Speed,
    TaskAccuracy,
)
from compress.report.sheet import Row, Table
from compress.report.wording import EVIDENCE, NOT_MEASURED, count, interval, plain, seconds, share, times, with_error
from compress.sizes import format_size

OWN = "This artifact"
BASELINES: dict[Literal["onnx_float", "pytorch"], str] = {"onnx_float": "Float ONNX", "pytorch": "PyTorch"}


@dataclass(frozen=True)
class Reading:
    """A number to be read from afar: its value and unit, and what it is beside something else."""

    label: str
    value: str
    unit: str
    note: str


@dataclass(frozen=True)
class BarFigure:
    """Bars on one scale, with what they show and which way is better."""

    title: str
    unit: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class SpeedView:
    """One provider's speed; ``refused`` says why its times are not shown."""

    title: str
    device: str
    conditions: str
    refused: str | None
    figures: tuple[BarFigure, ...]
    tables: tuple[Table, ...]


def readings(report: Report) -> list[Reading]:
    """Return the three or four numbers that matter most: size, drift, speed."""
    size = report.size
    note = "" if size.ratio is None else f"{times(size.ratio)} smaller than the source's weights"
    value, unit = format_size(size.artifact_bytes).split(" ")
    found = [Reading("Graph and weights", value, unit, note)]
    drift = report.drift
    if isinstance(drift, DecoderDrift):
        kl = drift.kl_divergence
        value, _, error = with_error(kl.mean, kl.standard_error).partition(" ± ")
        found.append(
            Reading("KL divergence", value, "nats/token", f"± {error}, standard error" if error else "one window only")
        )
        note = f"of {drift.tokens:,} tokens, as the source's"
        found.append(Reading("Same top token", f"{drift.top1_agreement * 100:.1f}", "%", note))
    elif isinstance(drift, EncoderDrift):
        found += _encoder_readings(drift)
    speed = next((speed for speed in report.speed if speed.evidence == "measured"), None)
    if isinstance(speed, Speed):
        rate = speed.decode_tokens_per_second.median
        found.append(Reading("Decoding", plain(rate), "tokens/s", _beside(speed)))
    elif isinstance(speed, EncoderSpeed):
        what = f"Latency, {speed.batch} × {speed.length} tokens"
        found.append(Reading(what, plain(speed.latency_ms.p50), "ms", _beside(speed)))
    return found


def _encoder_readings(drift: EncoderDrift) -> list[Reading]:
    found = []
    if drift.cosine is not None:
        found.append(Reading("Cosine, mean", f"{drift.cosine.mean:.4f}", "", f"worst text {drift.cosine.min:.4f}"))
    for label, value in (("Same nearest text", drift.neighbour_agreement), ("Same label", drift.label_agreement)):
        if value is not None:
            found.append(Reading(label, f"{value * 100:.1f}", "%", f"of {drift.items:,} {drift.unit}"))
    return found


def _beside(speed: AnySpeed) -> str:
    ratios = [
        (name, getattr(speed, f"speedup_vs_{key}"))
        for key, name in (("pytorch", "PyTorch"), ("onnx_float", "float ONNX"))
    ]
    return ", ".join(f"{times(ratio)} {name}" for name, ratio in ratios if ratio is not None)


def size_figure(report: Report) -> BarFigure:
    """Return the artifact's size beside the source's."""
    size = report.size
    rows: list[BarRow] = [
        (OWN, float(size.artifact_bytes), format_size(size.artifact_bytes), None, "graph and weights")
    ]
    if size.source_bytes is not None:
        rows.append(("Source", float(size.source_bytes), format_size(size.source_bytes), None, "weights"))
    return BarFigure("Size", "shorter is smaller", tuple(bars(rows, OWN)))


def drift_table(drift: AnyDrift) -> Table:
    """Return every measure of drift with its 95 % interval."""
    rows = _decoder_rows(drift) if isinstance(drift, DecoderDrift) else _encoder_rows(drift)
    head = ("Measure", "Measured", "95 % interval")
    return Table(f"Difference from the source, on {drift.provider}", head, tuple(rows))


def _row(name: str, value: str, spread: str | None = None, note: str = "") -> Row:
    return Row(name, (value, spread or ""), note)


def _decoder_rows(drift: DecoderDrift) -> list[Row]:
    kl, ratio = drift.kl_divergence, drift.perplexity_ratio
    rows = [
        _row(
            "KL divergence",
            with_error(kl.mean, kl.standard_error),
            interval(kl.mean, kl.standard_error, lowest=0),
            "nats a token, from the source's predictions to the artifact's; 0 is no change",
        ),
        _row("KL divergence, 99th percentile", plain(kl.p99), None, "one token in a hundred is further off"),
        _row(
            "Perplexity ratio",
            with_error(ratio.value, ratio.standard_error),
            interval(ratio.value, ratio.standard_error, lowest=0),
            f"the artifact's over the source's, which is {drift.reference_perplexity:.2f}",
        ),
        _row("Same most probable token", share(drift.top1_agreement)),
        _row(
            "Flips where the source is sure",
            f"{drift.confident_flips:,} of {drift.confident_tokens:,}",
            None,
            "tokens whose most probable next token became another one",
        ),
        _row("Largest change of a score", plain(drift.logit_max_abs)),
    ]
    if drift.decode is not None:
        own = drift.decode
        rows += [
            _row(
                "KL divergence, decoding",
                plain(own.kl_mean),
                None,
                f"token by token through the cache, {count(own.tokens, 'token')}; "
                f"all at once {plain(own.prefill_kl_mean)}",
            ),
            _row(
                "Decoding against own prefill",
                plain(own.self_kl_mean),
                None,
                f"nats a token, {plain(own.self_kl_max)} at most: rounding of other kernels",
            ),
        ]
    return rows


def _encoder_rows(drift: EncoderDrift) -> list[Row]:
    rows = []
    if drift.cosine is not None:
        cosine = drift.cosine
        spread = interval(cosine.mean, cosine.standard_error, highest=1)
        rows.append(_row("Cosine, mean", with_error(cosine.mean, cosine.standard_error), spread, "1 is no change"))
        rows.append(_row("Cosine, worst text", f"{cosine.min:.4f}"))
    for name, value, error in (
        ("Same nearest text", drift.neighbour_agreement, drift.neighbour_agreement_error),
        ("Same label", drift.label_agreement, drift.label_agreement_error),
    ):
        if value is not None:
            spread = interval(value, error, lowest=0, highest=1, scale=100)
            rows.append(_row(name, share(value, error), spread, f"of {drift.items:,} {drift.unit}"))
    if drift.kl_divergence is not None:
        kl = drift.kl_divergence
        spread = interval(kl.mean, kl.standard_error, lowest=0)
        rows.append(_row("KL divergence", with_error(kl.mean, kl.standard_error), spread, "nats; 0 is no change"))
        rows.append(_row("KL divergence, 99th percentile", plain(kl.p99)))
    if drift.logit_max_abs is not None:
        rows.append(_row("Largest change of a score", plain(drift.logit_max_abs)))
    if drift.task_accuracy is not None:
        rows += _accuracy_rows(drift.task_accuracy)
    return rows


def _accuracy_rows(found: TaskAccuracy) -> list[Row]:
    name, (low, high) = found.metric.replace("_", " ").capitalize(), found.interval
    cut = f", {found.truncated:,} of them cut to {found.max_length} tokens" if found.truncated else ""
    examples = f"{count(found.examples, 'labelled example')} of {found.labels.name}{cut}"
    if found.metric == "spearman":
        sides, change = f"{found.reference:.4f} → {found.artifact:.4f}", f"{found.difference:+.4f}"
        spread = f"{low:+.4f} to {high:+.4f}"
    else:
        sides, change = f"{found.reference:.2%} → {found.artifact:.2%}", f"{found.difference * 100:+.2f} points"
        spread = f"{low * 100:+.2f} to {high * 100:+.2f}"
    rows = [
        _row(name, sides, None, f"source → artifact; {examples}"),
        _row(f"{name}, change", change, spread, found.interval_method),
    ]
    if found.flips is not None:
        flips = found.flips
        told = f"{flips.right_to_wrong} lost, {flips.wrong_to_right} won"
        rows.append(_row("Answers that changed", f"{flips.changed}", None, told))
    return rows


def drift_facts(drift: AnyDrift) -> list[tuple[str, str]]:
    """Return what drift was measured on."""
    if isinstance(drift, DecoderDrift):
        amount = f"{count(drift.tokens, 'token')} in {count(drift.windows, 'window')}"
    else:
        amount = f"{count(drift.texts, 'text')}, {count(drift.tokens, 'token')}"
        if drift.unit != "texts":
            amount += f", {drift.items:,} {drift.unit}"
        amount += f"; cut at {drift.max_length} tokens, {drift.batch} padded together"
    facts = [
        ("Text", drift.eval_text.name),
        ("SHA-256", drift.eval_text.sha256),
        ("Amount", amount),
        ("Reference", drift.reference),
    ]
    if isinstance(drift, EncoderDrift):
        facts.append(("Task", drift.task))
        if drift.task_accuracy is not None:
            facts.append(("Labels, SHA-256", drift.task_accuracy.labels.sha256))
    return facts


def distribution(drift: AnyDrift) -> HistogramFigure | None:
    """Return how the loss is spread over tokens or texts, ``None`` where that was not kept."""
    if drift.distribution is None:
        return None
    if isinstance(drift, DecoderDrift):
        kl = drift.kl_divergence
        return histogram(drift.distribution, "tokens", [("mean", kl.mean), ("p99", kl.p99)])
    if drift.distribution.measure == "kl" and drift.kl_divergence is not None:
        kl = drift.kl_divergence
        return histogram(drift.distribution, drift.unit, [("mean", kl.mean), ("p99", kl.p99)])
    if drift.cosine is None:
        return histogram(drift.distribution, drift.unit, [])
    ends = [("mean", 1 - drift.cosine.mean), ("worst", 1 - drift.cosine.min)]
    return histogram(drift.distribution, drift.unit, ends)


def speeds(report: Report) -> list[SpeedView]:
    """Return every provider's speed; times that are not the device's own are refused."""
    return [_decoder_speed(item) if isinstance(item, Speed) else _encoder_speed(item) for item in report.speed]


def _conditions(speed: AnySpeed) -> str:
    amounts = f"{count(speed.threads, 'thread')}, {count(speed.repeats, 'repeat')}"
    return f"{amounts}, medians, in alternation with the baselines"


def _decoder_speed(speed: Speed) -> SpeedView:
    title = f"On {speed.provider}"
    if speed.evidence != "measured":
        return SpeedView(title, speed.device, "", EVIDENCE[speed.evidence], (), ())
    rate = speed.decode_tokens_per_second
    decode: list[BarRow] = [(OWN, rate.median, plain(rate.median), (rate.p10, rate.p90), "")]
    prefill: list[BarRow] = [(OWN, speed.prefill_tokens_per_second, plain(speed.prefill_tokens_per_second), None, "")]
    rows = [Row(OWN, (seconds(speed.load_seconds), format_size(speed.peak_rss_bytes), "", ""))]
    for name, label in BASELINES.items():
        found = speed.baselines.get(name)
        if found is None:
            continue
        missing = None if found.skipped is None else f"{NOT_MEASURED}: {found.skipped}"
        other = found.decode_tokens_per_second
        if missing or other is None:
            decode.append((label, None, missing or NOT_MEASURED, None, ""))
        else:
            decode.append((label, other.median, plain(other.median), (other.p10, other.p90), ""))
        if not missing and found.prefill_tokens_per_second is not None:
            prefill.append((label, found.prefill_tokens_per_second, plain(found.prefill_tokens_per_second), None, ""))
        ratios = (getattr(speed, f"{part}speedup_vs_{name}") for part in ("", "prefill_"))
        if not missing:
            rows.append(Row(label, (*_costs(found), *("" if ratio is None else times(ratio) for ratio in ratios))))
    figures = (
        BarFigure("Decoding, tokens a second", _tenths(speed.new_tokens), tuple(bars(decode, OWN))),
        BarFigure(
            "Prefill, tokens a second", f"{count(speed.prompt_tokens, 'token')} of prompt", tuple(bars(prefill, OWN))
        ),
    )
    head = ("", "Load", "Peak memory", "Decoding, artifact ÷ this", "Prefill, artifact ÷ this")
    table = Table(f"What a run costs on {speed.provider}", head, tuple(rows))
    return SpeedView(title, speed.device, _conditions(speed), None, figures, (table,))


def _tenths(tokens: int) -> str:
    return f"{count(tokens, 'new token')}; the line spans the slow and the fast tenth"


def _costs(found: Baseline | EncoderBaseline) -> tuple[str, str]:
    return (
        "" if found.load_seconds is None else seconds(found.load_seconds),
        "" if found.peak_rss_bytes is None else format_size(found.peak_rss_bytes),
    )


def _encoder_speed(speed: EncoderSpeed) -> SpeedView:
    title = f"On {speed.provider}"
    if speed.evidence != "measured":
        return SpeedView(title, speed.device, "", EVIDENCE[speed.evidence], (), ())
    main: list[BarRow] = [(OWN, speed.latency_ms.p50, f"{plain(speed.latency_ms.p50)} ms", None, "")]
    costs = [Row(OWN, (seconds(speed.load_seconds), format_size(speed.peak_rss_bytes)))]
    for name, label in BASELINES.items():
        found = speed.baselines.get(name)
        if found is None:
            continue
        point = _at(found.points, speed.batch, speed.length)
        if found.skipped is not None or point is None:
            reason = "" if found.skipped is None else f": {found.skipped}"
            main.append((label, None, f"{NOT_MEASURED}{reason}", None, ""))
        else:
            main.append((label, point.latency_ms.p50, f"{plain(point.latency_ms.p50)} ms", None, ""))
        if any(_costs(found)):
            costs.append(Row(label, _costs(found)))
    where = f"{speed.batch} × {speed.length} tokens; shorter is faster"
    figures = (BarFigure("Time of a run, median", where, tuple(bars(main, OWN))),)
    tables = (
        _points_table(speed),
        Table(f"What a run costs on {speed.provider}", ("", "Load", "Peak memory"), tuple(costs)),
    )
    return SpeedView(title, speed.device, _conditions(speed), None, figures, tables)


def _at(points: Sequence[Point], batch: int, length: int) -> Point | None:
    return next((point for point in points if (point.batch, point.length) == (batch, length)), None)


def _points_table(speed: EncoderSpeed) -> Table:
    rows = []
    for point in speed.points:
        ratios = tuple(getattr(point, f"speedup_vs_{name}") for name in BASELINES)
        cells = (
            plain(point.latency_ms.p50),
            plain(point.latency_ms.p95),
            plain(point.sequences_per_second),
            plain(point.tokens_per_second),
            *("" if ratio is None else times(ratio) for ratio in ratios),
        )
        rows.append(Row(f"{point.batch} × {point.length}", cells, f"{count(point.runs, 'run')}"))
    head = ("Batch × length", "Median, ms", "95th percentile", "Texts/s", "Tokens/s", "vs float ONNX", "vs PyTorch")
    return Table("By batch and length", head, tuple(rows))
