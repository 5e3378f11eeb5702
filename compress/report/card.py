"""``README.md``: the model card of an artifact in the Hugging Face hub's format, from its manifest and its report.

Without a report it says that nothing was measured. Text from manifests and reports is hostile: it is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.package.staging import write_file
from compress.package.tree import sha256
from compress.report import html, measured, slower
from compress.report.model import Report
from compress.report.origin import CARD_NAME, Origin, origin
from compress.report.reproduce import reproduction
from compress.report.snippets import snippets
from compress.report.wording import EVIDENCE, NOT_MEASURED, count, times, visible
from compress.sizes import format_size

NAME = CARD_NAME
_SPECIAL = re.compile(r"([\\`*_{}\[\]|~$])")
#: What begins a list, a heading or an underline at the start of a line or of an item.
_LEADING = re.compile(r"^(\d*)(?=[-+#=.)]+(?:\s|$))")
#: The hub's names of tasks that are called otherwise here.
_TASKS = {"embedding": "feature-extraction"}
_FLOATS = {"float16": "fp16", "float32": "fp32"}


def card(directory: Path, record: Mapping[str, Any], report: Report | None, source: Path | None) -> str:
    """Return an artifact's model card.

    Args:
        directory: The artifact, whose files say how it can be run.
        record: Its manifest.
        report: Its report; ``None`` where nothing was measured.
        source: The source's directory, whose own card may name licence and languages; ``None`` without one.
    """
    from huggingface_hub import ModelCard, ModelCardData

    known = origin(record["source"], source)
    data: Any = ModelCardData(**metadata(directory, record, known), ignore_metadata_errors=False)
    body = "\n".join(_body(directory, record, report, known))
    text = f"---\n{data.to_yaml()}\n---\n\n{body}"
    again: Any = ModelCard(text)  # what cannot be read back is no card
    assert again.data.to_dict() == data.to_dict(), "front matter is read back as it was written"
    return text


def write(directory: Path, record: Mapping[str, Any], report: Report | None, source: Path | None) -> None:
    """Write the card into an artifact, unless somebody has changed the one that is there."""
    path = directory / NAME
    if path.exists() and not _is_ours(path, record):
        return
    write_file(path, card(directory, record, report, source))


def _is_ours(path: Path, record: Mapping[str, Any]) -> bool:
    listed = {item.get("name"): item.get("sha256") for item in record.get("files", []) if isinstance(item, Mapping)}
    return listed.get(NAME) == sha256(path)


def metadata(directory: Path, record: Mapping[str, Any], known: Origin) -> dict[str, Any]:
    """Return the front matter's keys; what is not known is left out."""
    task = str(record.get("task") or "text-generation")
    name = _TASKS.get(task, task)
    if known.task == "sentence-similarity" and task == "embedding":
        name = known.task
    found: dict[str, Any] = {
        "library_name": "transformers.js" if _for_the_web(directory, record) else "onnx",
        "pipeline_tag": name,
        "tags": tags(directory, record),
    }
    if known.languages:
        found["language"] = list(known.languages)
    if known.base_model is not None:
        found["base_model"] = known.base_model
    if record["source"].get("adapter"):  # it has a licence of its own, and makes more of the model than a quantized one
        return found
    if known.base_model is not None:
        found["base_model_relation"] = "quantized"
    if known.licence is not None:
        found["license"] = known.licence
        found |= {key: value for key, value in (("license_name", known.licence_name),) if value}
        found |= {key: value for key, value in (("license_link", known.licence_link),) if value}
    return found


def _for_the_web(directory: Path, record: Mapping[str, Any]) -> bool:
    return any(item.language == "js" for item in snippets(directory, record))


def tags(directory: Path, record: Mapping[str, Any]) -> list[str]:
    """Return the tags: the format, the runtimes, and how weights are stored."""
    quantize, graph = (record["profile"].get(key) or {} for key in ("quantize", "graph"))
    bits = quantize.get("bits")
    stored = _FLOATS.get(str(graph.get("float_type")), "fp32") if bits == 32 else f"int{8 if bits == 7 else bits}"
    found = ["onnx", "onnxruntime", stored]
    if (directory / "genai_config.json").is_file():
        found.append("onnxruntime-genai")
    if _for_the_web(directory, record):
        found.append("transformers.js")
    if record.get("pruning"):
        found.append("pruned")
    return [*found, "compress"]


def escaped(text: str) -> str:
    """Return text for Markdown outside of code: no markup of its own, on one line."""
    flat = " ".join(visible(text).split())
    quoted = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _LEADING.sub(r"\1\\", _SPECIAL.sub(r"\\\1", quoted))


def code(text: str) -> str:
    """Return text as a code span, in a table too; escaped where a span cannot hold it."""
    flat = " ".join(visible(text).split())
    return f"`{flat}`" if flat and not set(flat) & set("`|") else escaped(flat)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table's lines; cells are Markdown already."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _body(directory: Path, record: Mapping[str, Any], report: Report | None, known: Origin) -> Iterator[str]:
    source, profile = record["source"], record["profile"]
    title = (known.base_model or str(source["id"])).rpartition("/")[2]
    yield from (f"# {escaped(title)} for ONNX Runtime, {escaped(str(profile.get('name')))}", "")
    yield from _verdict(report)
    yield from _what(record, known)
    yield from _measurements(report)
    yield from ("## How to run it", "", "In this directory:", "")
    for item in snippets(directory, record):
        yield from (f"**{item.title}** (`{item.needs}`)", "", f"```{item.language}", item.code.rstrip("\n"), "```", "")
    yield from _made(record, report)
    yield from _limits(record, report)
    yield from _licence(record, known)


def _verdict(report: Report | None) -> Iterator[str]:
    if report is None:
        yield from ("**Nothing was measured**: the export was asked not to validate. `compress validate` does.", "")
        return
    if report.verdict.status == "pass":
        yield from ("**PASS**: what was measured is within the profile's budget.", "")
        return
    yield from ("**FAIL**: the artifact is outside what its profile asks for.", "")
    for reason in report.verdict.reasons:
        yield f"- {escaped(reason)}"
    yield ""


def _what(record: Mapping[str, Any], known: Origin) -> Iterator[str]:
    source, profile = record["source"], record["profile"]
    rows = [["Source", code(str(source["id"])) + f" ({escaped(str(source['kind']))})"]]
    if source.get("revision"):
        rows.append(["Revision", code(str(source["revision"]))])
    if source.get("adapter"):
        rows.append(["Adapter", code(str(source["adapter"].get("directory")))])
    if known.base_model is not None and known.base_model != source["id"]:
        rows.append(["On the hub", code(known.base_model)])
    rows.append(["Task", escaped(str(record.get("task") or "text-generation"))])
    rows.append(["Profile", f"{code(str(profile.get('name')))}: {escaped(str(profile.get('description')))}"])
    yield from ("## What it is", "")
    yield from table(("", ""), rows)


def _measurements(report: Report | None) -> Iterator[str]:
    if report is None:
        return
    rows = [["Graph and weights", format_size(report.size.artifact_bytes), ""]]
    if report.size.source_bytes is not None and report.size.ratio is not None:
        beside = f"source {format_size(report.size.source_bytes)}, {times(report.size.ratio)} smaller"
        rows[0][2] = escaped(beside)
    if report.drift is not None:
        for row in measured.drift_table(report.drift).rows:
            value, interval = row.cells
            notes = [f"95 %: {interval}"] * bool(interval) + [row.note] * bool(row.note)
            rows.append([escaped(row.name), escaped(value), escaped("; ".join(notes))])
    for view in measured.speeds(report):
        if view.refused is not None:
            rows.append([f"Speed {escaped(view.title)}", NOT_MEASURED, escaped(view.refused)])
        for figure in view.figures:
            for bar in figure.bars:
                rows.append(
                    [f"{escaped(figure.title)}: {bar.name}", escaped(bar.text), escaped(figure.unit.partition(";")[0])]
                )
    if not report.speed:
        rows.append(["Speed", NOT_MEASURED, ""])
    yield from ("## Measurements", "")
    yield from table(("Measure", "Value", ""), rows)
    machine = report.environment
    cores = count(machine.cores, "core")
    name = machine.cpu or machine.architecture or "a processor"
    yield f"Measured on {escaped(name)}, {cores}; times are this machine's."
    yield from (f"All of it, with figures: {code(html.NAME)}; for programs: `report.json`.", "")


def _made(record: Mapping[str, Any], report: Report | None) -> Iterator[str]:
    yield from ("## How it was made", "")
    again = None if report is None else reproduction(report, record)
    if again is not None:
        lines = [visible(line) for line in again.lines]
        fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", "".join(lines))), 3)
        yield from (f"{fence}sh", *(line if not index else f"  {line}" for index, line in enumerate(lines)), fence, "")
        yield from (f"- {escaped(note)}" for note in again.notes)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(record["tools"].items()))
    yield from (f"- Versions: {escaped(versions)}; seed {escaped(str(record['seed']))}.",)
    yield from ("- Digests of the source's files and of every file here are in `manifest.json`.", "")


def _limits(record: Mapping[str, Any], report: Report | None) -> Iterator[str]:
    yield from ("## Limits", "")
    yield "- What the source does wrong, this does wrong too: its card, biases and terms of use apply."
    drift = report.drift if report else None
    if drift is not None:
        text = code(drift.eval_text.name)
        yield f"- Drift was measured on {count(drift.tokens, 'token')} of {text}; it may be larger on other texts."
    else:
        yield "- How far its answers are from the source's was not measured."
    warning = report.calibration.warning() if report and report.calibration else None
    if warning is not None:
        yield f"- {escaped(warning)}."
    for speed in report.speed if report else ():
        slow = slower.sentence(slower.measured(speed))
        if slow is not None:
            yield f"- On {code(speed.provider)} {slow}."
    for item in report.providers if report else ():
        if item.evidence != "measured":
            yield f"- {code(item.provider)}: {escaped(EVIDENCE[item.evidence])}."
    length = (record["profile"].get("graph") or {}).get("static_length")
    if isinstance(length, int):
        yield f"- The graph's shapes are fixed: {length} tokens at a time."
    yield ""


def _licence(record: Mapping[str, Any], known: Origin) -> Iterator[str]:
    yield from ("## Licence", "")
    by = "the catalog of compress" if known.told_by == "catalog" else "the source's own card"
    if known.licence is None:
        yield "The source's licence is not known here. Read it where you got the model before you pass this on."
    else:
        name = known.licence_name or known.licence
        yield f"The source's licence is {code(name)}, as {by} says. Read it before you pass this on."
    if record["source"].get("adapter"):
        yield "The adapter's licence is not known here."
    yield ""
