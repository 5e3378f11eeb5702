"""The report as a few tables on a terminal; readable without colour and at 40 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compress.report.allocation import role_rows
from compress.report.chain import lost
from compress.report.frontier import frontier_text
from compress.report.model import (
    Allocation,
    AnyDrift,
    AnySpeed,
    Baseline,
    Calibration,
    DecoderDrift,
    EncoderDrift,
    EncoderSpeed,
    Latency,
    MeasuredPoint,
    ProviderVerdict,
    Pruning,
    Rate,
    Report,
    Sample,
    Size,
    Speed,
    TaskAccuracy,
    Verdict,
)


def show(report: Report, console: Console) -> None:
    """Print what the report has, in its order; what was not measured has no line."""
    show_verdict(report.verdict, console)
    _print(console, "size", size_rows(report.size))
    if report.drift is not None:
        rows = [*drift_rows(report.drift), *sample_rows(report.samples)]
        _print(console, f"drift on {report.drift.provider}", rows)
    if report.calibration is not None:
        _show_calibration(report.calibration, console)
    for speed in report.speed:
        _print(console, f"speed on {speed.provider} ({speed.evidence}, {speed.threads} threads)", speed_rows(speed))
    if report.pruning is not None:
        _print(console, "pruned, then quantized", chain_rows(report.pruning))
    if report.providers:
        _print(console, "providers", provider_rows(report.providers))
    if report.allocation is not None:
        _show_allocation(report.allocation, console)
    if report.fusions:
        _print(console, "fusions", ((name, f"{count}x") for name, count in sorted(report.fusions.items())))
    if report.stages:
        peaks = (
            (s.name, f"{s.seconds:.1f} s" + ("" if s.peak_rss_bytes is None else f", {size(s.peak_rss_bytes)}"))
            for s in report.stages
        )
        _print(console, "stages (time, peak memory)", peaks)


def chain_rows(pruning: Pruning) -> list[tuple[str, str]]:
    """Return a line a step: its size, its speed beside the source's float graph, and what is lost since the source."""
    rows: list[tuple[str, str]] = []
    for item in pruning.chain:
        parts = [size(item.bytes)]
        if item.speedup_vs_source and item.step != "source":
            parts.append(f"{item.speedup_vs_source:.2f}x as fast")
        parts.append(lost(item.drift))
        rows.append((item.step, ", ".join(part for part in parts if part)))
    return rows


def provider_rows(found: Iterable[ProviderVerdict]) -> list[tuple[str, str]]:
    """Return a line a provider: where it ran, what that proves, how many nodes it took, how far it is from the CPU.

    A line more says why something was not measured.
    """
    rows = []
    for item in found:
        parts = [item.state.replace("_", " "), item.evidence]
        if item.placement is not None:
            parts.append(f"{item.placement.nodes_on_provider} of {item.placement.nodes_total} nodes")
        far = item.drift_from_cpu
        if isinstance(far, DecoderDrift):
            parts.append(f"KL {far.kl_divergence.mean:.2g} from cpu")
        elif isinstance(far, EncoderDrift) and far.cosine is not None:
            parts.append(f"cosine {far.cosine.mean:.6f} to cpu")
        elif isinstance(far, EncoderDrift) and far.label_agreement is not None:
            parts.append(f"{far.label_agreement:.1%} of labels as on cpu")
        rows.append((item.provider, ", ".join(parts) + (f"; {item.device}" if item.device else "")))
        rows += [(f"  no {name.replace('_', ' ')}", why) for name, why in item.not_measured.items()]
    return rows


def show_verdict(verdict: Verdict, console: Console) -> None:
    """Print the verdict as a word, and its reasons as sentences."""
    colour = "green" if verdict.status == "pass" else "red"
    console.print(f"[bold {colour}]{verdict.status.upper()}[/]")
    for reason in verdict.reasons:
        console.print(f"- {escape(reason)}")


def _show_calibration(calibration: Calibration, console: Console) -> None:
    _print(console, "calibration", calibration_rows(calibration))
    warning = calibration.warning()
    if warning is not None:
        console.print(f"[yellow]{escape(warning)}[/]", highlight=False)


def calibration_rows(calibration: Calibration) -> list[tuple[str, str]]:
    """Return the lines about the calibration text."""
    counted = "" if calibration.tokens is None else f"{calibration.tokens} tokens of "
    seeded = "" if calibration.seed is None else f" (seed {calibration.seed})"
    rows = [("calibrated on", f"{counted}{calibration.name}{seeded}")]
    if calibration.overlap is not None:
        rows.append(("in common", f"{calibration.overlap:.1%} of the evaluation text"))
    return rows


def _show_allocation(allocation: Allocation, console: Console) -> None:
    rows = role_rows(allocation)
    measured = "" if allocation.measured_kl is None else f", measured {allocation.measured_kl:.4f}"
    rows.append(("KL divergence", f"predicted {allocation.predicted_kl:.4f}{measured}"))
    _print(console, f"bits by role, chosen for {size(allocation.bytes)}", rows)
    for line in frontier_text(allocation, width=max(24, min(console.width, 64))):
        console.print(escape(line), highlight=False, soft_wrap=True)


def sample_rows(samples: Sequence[Sample]) -> list[tuple[str, str]]:
    """Return the line about what both sides write, if they did: how many texts are the same, and how far at least."""
    if not samples:
        return []
    different = [sample.first_difference for sample in samples if sample.first_difference is not None]
    said = f"{len(samples) - len(different)} of {len(samples)} texts as the source's"
    if different:
        said += f"; first difference after {min(different)} token{'' if min(different) == 1 else 's'}"
    return [("samples", said)]


def size(count: float) -> str:
    """Return bytes in the decimal unit that leaves one to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def size_rows(sizes: Size) -> list[tuple[str, str]]:
    """Return the lines of the size table."""
    rows = [("artifact", size(sizes.artifact_bytes))]
    if sizes.source_bytes is not None:
        rows.append(("source", size(sizes.source_bytes)))
    if sizes.ratio is not None:
        rows.append(("smaller by", f"{sizes.ratio:.2f}x"))
    return rows


def drift_rows(drift: AnyDrift) -> list[tuple[str, str]]:
    """Return the lines of the drift table."""
    return _decoder_drift(drift) if isinstance(drift, DecoderDrift) else _encoder_drift(drift)


def _decoder_drift(drift: DecoderDrift) -> list[tuple[str, str]]:
    kl, ratio = drift.kl_divergence, drift.perplexity_ratio
    rows = [
        ("KL divergence", f"{_with_error(kl.mean, kl.standard_error)} (p99 {kl.p99:.3g})"),
        (
            "perplexity ratio",
            f"{_with_error(ratio.value, ratio.standard_error)} (source {drift.reference_perplexity:.2f})",
        ),
        ("top-1 agreement", f"{drift.top1_agreement:.1%}"),
        ("flips where sure", f"{drift.confident_flips} of {drift.confident_tokens}"),
    ]
    if drift.decode is not None:
        rows.append(("KL, decoding", f"{drift.decode.kl_mean:.3g} (to own prefill {drift.decode.self_kl_mean:.1g})"))
    rows.append(("measured on", f"{drift.tokens} tokens of {drift.eval_text.name}"))
    rows.append(("reference", drift.reference))
    return rows


def _encoder_drift(drift: EncoderDrift) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if drift.cosine is not None:
        rows.append(("cosine", f"{_with_error(drift.cosine.mean, drift.cosine.standard_error)}"))
        rows.append(("worst cosine", f"{drift.cosine.min:.4f}"))
    for name, share, error in (
        ("same neighbour", drift.neighbour_agreement, drift.neighbour_agreement_error),
        ("same label", drift.label_agreement, drift.label_agreement_error),
    ):
        if share is not None:
            rows.append((name, _share(share, error)))
    if drift.kl_divergence is not None:
        kl = drift.kl_divergence
        rows.append(("KL divergence", f"{_with_error(kl.mean, kl.standard_error)} (p99 {kl.p99:.3g})"))
    if drift.logit_max_abs is not None:
        rows.append(("largest change", f"{drift.logit_max_abs:.3g} of a score"))
    if drift.task_accuracy is not None:
        rows += accuracy_rows(drift.task_accuracy)
    counted = f"{drift.texts} texts, {drift.tokens} tokens"
    if drift.unit != "texts":
        counted += f", {drift.items} {drift.unit}"
    rows.append(("measured on", f"{counted} of {drift.eval_text.name}"))
    rows.append(("reference", drift.reference))
    return rows


def accuracy_rows(accuracy: TaskAccuracy) -> list[tuple[str, str]]:
    """Return the lines about labelled examples: both sides, the difference with its interval, flips.

    Shares are shown in per cent, their differences in points of a hundred; a rank correlation as it is.
    """
    low, high = accuracy.interval
    if accuracy.metric == "spearman":
        both = f"{accuracy.reference:.4f} -> {accuracy.artifact:.4f}"
        change = f"{accuracy.difference:+.4f} (95 %: {low:+.4f} to {high:+.4f})"
    else:
        both = f"{accuracy.reference:.2%} -> {accuracy.artifact:.2%}"
        change = f"{accuracy.difference * 100:+.2f} points (95 %: {low * 100:+.2f} to {high * 100:+.2f})"
    rows = [(accuracy.metric.replace("_", " "), both), ("change", change)]
    if accuracy.flips is not None:
        flips = accuracy.flips
        rows.append(("flips", f"{flips.right_to_wrong} lost, {flips.wrong_to_right} won, {flips.changed} changed"))
    cut = f", {accuracy.truncated} cut to {accuracy.max_length} tokens" if accuracy.truncated else ""
    rows.append(("labelled", f"{accuracy.examples} examples of {accuracy.labels.name}{cut}"))
    return rows


def speed_rows(speed: AnySpeed) -> list[tuple[str, str]]:
    """Return the lines of the speed table: the artifact's, then a line a baseline."""
    return _decoder_speed(speed) if isinstance(speed, Speed) else _encoder_speed(speed)


def _encoder_speed(speed: EncoderSpeed) -> list[tuple[str, str]]:
    rows = [(f"{point.batch} x {point.length}", _point(point)) for point in speed.points]
    rows += [("load", f"{speed.load_seconds:.2f} s"), ("peak memory", size(speed.peak_rss_bytes))]
    for name, baseline in speed.baselines.items():
        ratio = getattr(speed, f"speedup_vs_{name}")
        if baseline.skipped is not None or ratio is None:
            rows.append((f"vs {name}", f"not measured: {baseline.skipped}"))
            continue
        others = [
            f"{getattr(point, f'speedup_vs_{name}'):.2f}x at {point.batch} x {point.length}"
            for point in speed.points
            if (point.batch, point.length) != (speed.batch, speed.length)
        ]
        shown = [f"{ratio:.2f}x at {speed.batch} x {speed.length}", *others]
        rows.append((f"vs {name}", ", ".join(shown)))
    return rows


def _point(point: MeasuredPoint) -> str:
    return f"{_latency(point.latency_ms)}, {_plain(point.sequences_per_second)}/s, {point.tokens_per_second:.0f} tok/s"


def _latency(latency: Latency) -> str:
    return f"{_plain(latency.p50)} ms (p95 {_plain(latency.p95)})"


def _plain(value: float) -> str:
    """Return three digits, or all before the point; never an exponent."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def _decoder_speed(speed: Speed) -> list[tuple[str, str]]:
    rows = [
        ("prefill", f"{speed.prefill_tokens_per_second:.0f} tok/s ({speed.prompt_tokens} tokens)"),
        ("decode", f"{_rate(speed.decode_tokens_per_second)} tok/s ({speed.new_tokens} tokens)"),
        ("load", f"{speed.load_seconds:.2f} s"),
        ("peak memory", size(speed.peak_rss_bytes)),
    ]
    for name, baseline in speed.baselines.items():
        rows.append((f"vs {name}", _versus(baseline, getattr(speed, f"speedup_vs_{name}"), speed, name)))
    return rows


def _versus(baseline: Baseline, speedup: float | None, speed: Speed, name: str) -> str:
    if baseline.skipped is not None or speedup is None:
        return f"not measured: {baseline.skipped}"
    prefill = getattr(speed, f"prefill_speedup_vs_{name}")
    text = f"decode {speedup:.2f}x"
    return text if prefill is None else f"{text}, prefill {prefill:.2f}x"


def _rate(rate: Rate) -> str:
    return f"{rate.median:.3g} ({rate.p10:.3g} to {rate.p90:.3g})"


def _share(share: float, error: float | None) -> str:
    return f"{share:.1%}" if error is None else f"{share:.1%} ± {error:.1%}"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _print(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table(title=escape(title), title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    console.print(table)
