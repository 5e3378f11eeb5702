"""Two artifacts side by side: a document that says what differs, and what of it may be compared at all.

Requires two :class:`Side`; ensures that no ratio stands where the evaluation text, the machine, the threads or the
provider differ: such a measure keeps both values and says why in words. What is judged, and by how much:

- KL and perplexity of decoders whose losses by position are there: by the differences (:mod:`.compare_paired`);
- else with standard errors (those two, cosine, agreements, accuracy): worse beyond twice the two errors' root sum of
  squares. Both sides are measured on the same text, so their errors are correlated and this asks for more than needed;
- rates and latencies have a spread instead: worse where the two spreads do not touch (p10..p90, p50..p95);
- size is exact: any growth is worse;
- the rest is shown and not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from compress.report.compare_measures import measures
from compress.report.compare_model import Comparison, Difference, FileChange, Measure, Side, TensorChange
from compress.report.model import Report

_PARTS: tuple[tuple[str, Callable[[Side], bool], str], ...] = (
    ("drift", lambda side: side.report is not None and side.report.drift is not None, "no measured drift"),
    ("speed", lambda side: side.report is not None and bool(side.report.speed), "no measured speed"),
    ("tensors", lambda side: bool(side.tensors or side.graph_tensors), "no list of tensors"),
    ("files", lambda side: bool(side.files), "no manifest"),
)


def compare(a: Side, b: Side) -> Comparison:
    """Return how B differs from A."""
    found = measures(a, b)
    tensors_from, tensors, same = _tensors(a, b)
    return Comparison(
        a=a.summary(),
        b=b.summary(),
        differences=tuple(_differences(a, b)),
        measures=found,
        tensors_from=tensors_from,
        tensors=tensors,
        tensors_same=same,
        files=_files(a, b),
        not_compared=_not_compared(a, b),
        worse=tuple(_worse(a.report, b.report, found)),
    )


def _worse(a: Report | None, b: Report | None, found: Sequence[Measure]) -> Iterator[str]:
    if a is not None and b is not None and (a.verdict.status, b.verdict.status) == ("pass", "fail"):
        yield f"verdict: A passed, B failed ({'; '.join(b.verdict.reasons)})"
    for item in found:
        if item.judgement == "worse":
            change = "" if item.paired is None else f", by position {item.shown_paired}"
            yield f"{item.name}: {item.shown_a} in A, {item.shown_b} in B{change}"


def _not_compared(a: Side, b: Side) -> dict[str, str]:
    """Return what is missing on a side, by what would have been compared."""
    missing = {}
    for key, found, what in _PARTS:
        without = [name for name, side in (("A", a), ("B", b)) if not found(side)]
        if without:
            missing[key] = f"{' and '.join(without)} {'has' if len(without) == 1 else 'have'} {what}"
    if "tensors" not in missing and _tensors(a, b)[0] is None:
        missing["tensors"] = "one side's are known from its report, the other's from its graph"
    return missing


# -------------------------------------------------------------------------------------------------------- identity


def _differences(a: Side, b: Side) -> Iterator[Difference]:
    for name in ("status", "source", "revision", "adapter", "task", "profile", "seed"):
        yield from _difference(name, getattr(a, name), getattr(b, name))
    if a.source_files and b.source_files and a.source_files != b.source_files:
        changed = sorted(name for name, digest in b.source_files.items() if a.source_files.get(name) != digest)
        gone = sorted(set(a.source_files) - set(b.source_files))
        yield Difference(name="source files", a=", ".join(gone) or None, b=", ".join(changed) or None)
    yield from _nested("profile.", a.resolved, b.resolved)
    yield from _nested("version of ", a.versions, b.versions)
    if a.report is not None and b.report is not None:
        yield from _difference("verdict", a.report.verdict.status, b.report.verdict.status)
        for key in ("cpu", "cores", "architecture", "os"):
            yield from _difference(key, getattr(a.report.environment, key), getattr(b.report.environment, key))


def _difference(name: str, a: object, b: object) -> Iterator[Difference]:
    if a != b:
        yield Difference(name=name, a=None if a is None else str(a), b=None if b is None else str(b))


def _nested(prefix: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare mappings key by key, where both sides have one: a side that says nothing differs in nothing."""
    if not a or not b:
        return
    for key in sorted({*a, *b}):
        # Both are in the line above: as the profile's name, and as words that change with no meaning.
        if prefix == "profile." and key in ("name", "description"):
            continue
        one, other = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _nested(f"{prefix}{key}.", one, other)
        else:
            yield from _difference(f"{prefix}{key}", one, other)


# ----------------------------------------------------------------------------------------------- tensors and files


def _tensors(a: Side, b: Side) -> tuple[Literal["reports", "graphs"] | None, tuple[TensorChange, ...], int]:
    """Return where tensors are known from on both sides, those that differ, and how many are the same."""
    origin: Literal["reports", "graphs"] | None = None
    lists = (a.tensors, b.tensors)
    if all(lists):
        origin = "reports"
    elif a.graph_tensors and b.graph_tensors:
        origin, lists = "graphs", (a.graph_tensors, b.graph_tensors)
    else:
        return None, (), 0
    mine, yours = ({item.name: item for item in side} for side in lists)
    changed, same = [], 0
    for name in dict.fromkeys((*mine, *yours)):
        one, other = mine.get(name), yours.get(name)
        if one == other:
            same += 1
            continue
        known = one or other
        assert known is not None
        changed.append(TensorChange(name=name, role=known.role, layer=known.layer, a=one, b=other))
    return origin, tuple(changed), same


def _files(a: Side, b: Side) -> tuple[FileChange, ...]:
    if not a.files or not b.files:
        return ()
    return tuple(
        FileChange(
            name=name,
            a_bytes=a.files[name].bytes if name in a.files else None,
            b_bytes=b.files[name].bytes if name in b.files else None,
        )
        for name in sorted({*a.files, *b.files})
        if a.files.get(name) != b.files.get(name)
    )
