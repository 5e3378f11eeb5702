"""What a report page says, section by section, as rows and figures; the template only lays it out.

What was not measured has no row, or says so with the reason.
"""

from __future__ import annotations

import base64
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.report.chain import chain_svg, lost
from compress.report.frontier import frontier_svg
from compress.report.model import (
    Allocation,
    AnyDrift,
    DecoderDrift,
    Environment,
    ProviderVerdict,
    Pruning,
    Report,
    Sample,
    TensorRecord,
)
from compress.report.wording import EVIDENCE, NOT_MEASURED, STATES, count, plain, seconds
from compress.sizes import format_size

#: Entries of a list of nodes that are shown; the rest is counted.
_NODES = 20


@dataclass(frozen=True)
class Row:
    """A line of a table: what it is about, a note below it, and its cells."""

    name: str
    cells: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; ``head`` names the first column and the cells'. ``numeric`` says that cells are numbers."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    numeric: bool = True


@dataclass(frozen=True)
class Picture:
    """An SVG file as a data URI, with its text alternative."""

    uri: str
    alt: str


def picture(svg: str, alt: str) -> Picture:
    """Return a picture that is isolated from the page: its styles stay in it."""
    return Picture("data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii"), alt)


@dataclass(frozen=True)
class ProviderView:
    """A provider's share: sentences by what they are about, reasons of its verdict, nodes that ran elsewhere."""

    name: str
    facts: tuple[tuple[str, str], ...]
    passed: bool
    reasons: tuple[str, ...]
    fallback: tuple[str, ...]
    more: int
    on_provider: float | None


def providers(report: Report) -> list[ProviderView]:
    """Return every provider that was tried; of an older report, which names none, its placements."""
    if report.providers:
        return [_provider(item) for item in report.providers]
    return [
        ProviderView(
            item.provider,
            (("Nodes", f"{item.nodes_on_provider:,} of {item.nodes_total:,} on {item.provider}"),),
            True,
            (),
            item.fallback_nodes[:_NODES],
            max(0, len(item.fallback_nodes) - _NODES),
            item.nodes_on_provider / item.nodes_total if item.nodes_total else None,
        )
        for item in report.placement
    ]


def _provider(item: ProviderVerdict) -> ProviderView:
    facts = [("State", STATES[item.state]), ("Evidence", EVIDENCE[item.evidence])]
    if item.device:
        facts.append(("Device", item.device))
    fallback: tuple[str, ...] = ()
    on_provider = None
    if item.placement is not None:
        place, fallback = item.placement, item.placement.fallback_nodes
        facts.append(("Nodes", f"{place.nodes_on_provider:,} of {place.nodes_total:,} on {place.provider}"))
        on_provider = place.nodes_on_provider / place.nodes_total if place.nodes_total else None
    for name, drift in (("From the source", item.drift), ("From the CPU", item.drift_from_cpu)):
        if drift is not None:
            facts.append((name, far(drift)))
    facts += [
        (name.replace("_", " ").capitalize(), f"{NOT_MEASURED}: {why}") for name, why in item.not_measured.items()
    ]
    if item.versions:
        facts.append(("Versions", ", ".join(f"{name} {version}" for name, version in sorted(item.versions.items()))))
    return ProviderView(
        item.provider,
        tuple(facts),
        item.verdict.status == "pass",
        item.verdict.reasons,
        fallback[:_NODES],
        max(0, len(fallback) - _NODES),
        on_provider,
    )


def far(drift: AnyDrift) -> str:
    """Return how far a measure's two sides are from each other, in a few words."""
    if isinstance(drift, DecoderDrift):
        kl = drift.kl_divergence
        same = f"same most probable token {drift.top1_agreement:.1%}"
        return f"KL {plain(kl.mean)} nats a token (p99 {plain(kl.p99)}), {same}"
    if drift.cosine is not None:
        return f"cosine {drift.cosine.mean:.6f}, worst {drift.cosine.min:.6f}"
    return lost(drift) or f"{drift.items:,} {drift.unit} compared"


@dataclass(frozen=True)
class Written:
    """What one side writes from the first difference on: the first word of it, and the rest."""

    first: str
    rest: str


@dataclass(frozen=True)
class SampleView:
    """A sample: what both sides write alike, and how each goes on, ``None`` where they never part; ``note`` says it."""

    prompt: str
    chat: bool
    common: str
    source: Written | None
    artifact: Written | None
    note: str


def samples(found: Iterable[Sample]) -> list[SampleView]:
    """Return samples with the text that both sides share split from what differs."""
    return [_sample(item) for item in found]


def _sample(item: Sample) -> SampleView:
    if item.first_difference is None:
        note = f"the artifact writes what the source writes, {item.tokens} new tokens at most"
        return SampleView(item.prompt, item.chat, item.artifact, None, None, note)
    alike = count(item.first_difference, "token")
    note = (
        f"alike for {alike} of at most {item.tokens}, then different"
        if item.first_difference
        else (f"different from the first of at most {item.tokens} tokens")
    )
    if not item.source_complete:
        note += "; the source was only asked for the next token there"
    length = _alike(item.source, item.artifact)
    source, artifact = _first_word(item.source[length:]), _first_word(item.artifact[length:])
    if not item.source_complete:
        source = Written(source.first, source.rest + " …")
    return SampleView(item.prompt, item.chat, item.source[:length], source, artifact, note)


def _alike(left: str, right: str) -> int:
    """Return how many characters two texts begin with alike, no part of a word counted."""
    length = len(os.path.commonprefix([left, right]))
    inside = (text[length : length + 1].isalnum() for text in (left, right))
    if any(inside):
        while length and left[length - 1].isalnum():
            length -= 1
    return length


def _first_word(text: str) -> Written:
    found = re.match(r"\s*\S*", text)
    end = found.end() if found else 0
    return Written(text[:end], text[end:])


def tensor_table(tensors: Sequence[TensorRecord]) -> Table:
    """Return every weight with how it is stored and its error."""
    rows = [
        Row(
            item.name,
            (
                item.role,
                "" if item.layer is None else str(item.layer),
                item.storage,
                plain(item.bits),
                format_size(item.bytes),
                NOT_MEASURED if item.relative_error is None else f"{item.relative_error:.3%}",
            ),
        )
        for item in tensors
    ]
    head = ("Weight", "Role", "Layer", "Stored as", "Bits a weight", "Size", "Relative error")
    return Table("Every weight: how it is stored, and how far it is from the source's", head, tuple(rows))


def allocation_tables(allocation: Allocation) -> tuple[Table, Table]:
    """Return what the bits were chosen for, and every tensor's choice."""
    budget = allocation.budget
    asked = [f"at most {format_size(budget.max_bytes)}"] if budget.max_bytes is not None else []
    asked += [f"KL at most {plain(budget.max_kl)}"] if budget.max_kl is not None else []
    measured = NOT_MEASURED if allocation.measured_kl is None else plain(allocation.measured_kl)
    rows = (
        Row("Asked for", (" and ".join(asked) or "nothing",)),
        Row("Chosen", (format_size(allocation.bytes),)),
        Row("KL divergence, predicted", (plain(allocation.predicted_kl),), "the sum of what each tensor loses alone"),
        Row("KL divergence, measured", (measured,), "of the artifact, nats a token"),
        Row("Left to gain", (f"at most {allocation.gap:.2%}",), "by a better search"),
    )
    chosen = tuple(
        Row(item.name, (item.role, item.storage, format_size(item.bytes), plain(item.predicted_kl), item.why))
        for item in allocation.tensors
    )
    head = ("Tensor", "Role", "Stored as", "Size", "KL alone", "Why")
    return Table("How the bits were chosen", ("", ""), rows), Table("Every tensor's choice", head, chosen)


def allocation_picture(allocation: Allocation) -> Picture:
    """Return the frontier of size and loss."""
    alt = (
        f"Predicted KL divergence against size of {count(len(allocation.frontier), 'assignment')} of bits; chosen: "
        f"{format_size(allocation.bytes)} at a predicted KL divergence of {plain(allocation.predicted_kl)}."
    )
    return picture(frontier_svg(allocation), alt)


def frontier_table(allocation: Allocation) -> Table:
    """Return the frontier's points."""
    rows = tuple(
        Row(format_size(point.bytes), (plain(point.predicted_kl), f"{point.relative_decode_time:.2f}"))
        for point in allocation.frontier
    )
    return Table("The best assignments of bits", ("Size", "Predicted KL", "Decode time beside the chosen"), rows)


def pruning_picture(pruning: Pruning) -> Picture | None:
    """Return the chain source, pruned, quantized as a picture, ``None`` where it was not measured."""
    if not pruning.chain:
        return None
    parts = []
    for item in pruning.chain:
        words = [format_size(item.bytes)]
        if item.speedup_vs_source and item.step != "source":
            words.append(f"{item.speedup_vs_source:.2f} times as fast")
        words.append(lost(item.drift))
        parts.append(f"{item.step} {', '.join(word for word in words if word)}")
    return picture(chain_svg(pruning.chain), "; ".join(parts) + ".")


def pruning_tables(pruning: Pruning) -> tuple[Table, Table]:
    """Return the model's sizes before and after, and what every step of the chain contributed."""
    keys = dict.fromkeys((*pruning.before, *pruning.after))
    sizes = [
        Row(
            key.replace("_", " "),
            tuple(f"{side[key]:,}" if key in side else "" for side in (pruning.before, pruning.after)),
        )
        for key in keys
    ]
    chain = []
    for item in pruning.chain:
        smaller = "" if item.size_factor is None else f"{item.size_factor:.2f}×"
        speedup = NOT_MEASURED if item.speedup_vs_source is None else f"{item.speedup_vs_source:.2f}×"
        faster = "" if item.speed_factor is None else f"{item.speed_factor:.2f}×"
        chain.append(Row(item.step, (format_size(item.bytes), smaller, speedup, faster, lost(item.drift))))
    head = ("Step", "Size", "Smaller by", "Speed beside the source", "Faster by", "Lost since the source")
    return (
        Table("Sizes before and after pruning", ("Size", "Before", "After"), tuple(sizes)),
        Table("What every step contributed", head, tuple(chain)),
    )


def pruning_facts(pruning: Pruning) -> list[tuple[str, str]]:
    """Return how was pruned."""
    facts = [("Algorithm", pruning.algorithm)]
    if pruning.depth:
        facts.append(("Depth by", pruning.depth))
    facts.append(("Recovery", pruning.recover))
    facts.append(("Blocks kept", ", ".join(map(str, pruning.layers))))
    return facts


def calibration_facts(report: Report) -> list[tuple[str, str]]:
    """Return what the model was calibrated on."""
    found = report.calibration
    if found is None:
        return []
    source = "a text" if found.source == "text" else "text that the model wrote itself"
    facts = [("Calibrated on", f"{found.name} ({source})"), ("SHA-256", found.sha256)]
    if found.tokens is not None:
        windows = f" in windows of {found.window:,}" if found.window is not None else ""
        facts.append(("Tokens", f"{found.tokens:,}{windows}"))
    if found.seed is not None:
        facts.append(("Seed", str(found.seed)))
    if found.overlap is not None:
        facts.append(("In common", f"{found.overlap:.1%} of the evaluation text"))
    return facts


def stage_table(report: Report) -> Table:
    """Return how long each step took, and the peak memory of the largest process that did it."""
    rows = tuple(
        Row(item.name, (seconds(item.seconds), "" if item.peak_rss_bytes is None else format_size(item.peak_rss_bytes)))
        for item in report.stages
    )
    return Table("Steps of the run", ("Step", "Time", "Peak memory"), rows)


def environment_facts(found: Environment) -> list[tuple[str, str]]:
    """Return what the run ran on."""
    facts = [
        ("Processor", found.cpu),
        ("Cores", str(found.cores)),
        ("Architecture", found.architecture),
        ("System", found.os),
    ]
    if found.instruction_sets:
        facts.append(("Instructions", ", ".join(found.instruction_sets)))
    if found.memory_bytes is not None:
        facts.append(("Memory", format_size(found.memory_bytes)))
    return [(name, value) for name, value in facts if value]


def profile_rows(resolved: Mapping[str, Any]) -> Table:
    """Return every key of a profile with its value."""
    rows = tuple(Row(key, (value,)) for key, value in flat(resolved))
    return Table("The profile as it was resolved", ("Key", "Value"), rows, numeric=False)


def flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested tables as dotted keys and values in TOML's words; empty tables have no keys."""
    found: list[tuple[str, str]] = []
    for key, value in sorted(data.items()):
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", _value(value)))
    return found


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value)) or "none"
    return str(value)


def storage_summary(tensors: Sequence[TensorRecord]) -> str:
    """Return how many weights are stored how, the commonest first."""
    found = Counter(item.storage for item in tensors)
    return ", ".join(f"{number} as {storage}" for storage, number in sorted(found.items(), key=lambda x: (-x[1], x[0])))
