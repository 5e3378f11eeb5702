"""A comparison as titled tables of words: what terminal and page both show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from compress.report.compare_model import Comparison, FileChange, Measure, SideSummary, StoredTensor, TensorChange
from compress.sizes import format_size

_ALL = 1 << 30


@dataclass(frozen=True)
class Table:
    """A table: its title, the columns' heads, and the rows; ``note`` is said below it."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def tables(found: Comparison, *, every_tensor: bool = False, most: int = _ALL) -> Iterator[Table]:
    """Yield what there is to show.

    Args:
        found: The comparison.
        every_tensor: A row a tensor; else a row a role, and how it is stored on both sides.
        most: The most differences to list of identity and files; a note says how many more there are.
    """
    yield Table("", ("", "A", "B"), tuple(_sides(found.a, found.b)))
    rows = [(item.name, item.a or "-", item.b or "-") for item in found.differences]
    yield Table(
        "what differs", ("", "A", "B"), tuple(rows[:most]), _more(len(rows), most) or ("" if rows else "nothing")
    )
    yield Table(
        "measured",
        ("", "A", "B", "B against A", ""),
        tuple(map(_measured, found.measures)),
        _missing(found, "drift", "speed"),
    )
    tensors = map(_one_tensor, found.tensors) if every_tensor else _by_role(found.tensors)
    source = f" (from the {found.tensors_from})" if found.tensors_from else ""
    note = _alike(found.tensors_same) if found.tensors_from else ""
    yield Table(
        f"tensors{source}",
        ("tensor" if every_tensor else "role", "A", "B", "error in A", "error in B"),
        tuple(tensors),
        note or _missing(found, "tensors"),
    )
    files = tuple(map(_file, found.files))
    same = "" if found.files or "files" in found.not_compared else "all files are the same"
    yield Table(
        "files that differ", ("", "A", "B"), files[:most], _more(len(files), most) or same or _missing(found, "files")
    )


def _alike(count: int) -> str:
    return "1 tensor is stored alike" if count == 1 else f"{count} tensors are stored alike"


def _more(count: int, most: int) -> str:
    return f"and {count - most} more: --json has all" if count > most else ""


def _missing(found: Comparison, *keys: str) -> str:
    return "; ".join(f"{key} not compared: {found.not_compared[key]}" for key in keys if key in found.not_compared)


def _sides(a: SideSummary, b: SideSummary) -> Iterator[tuple[str, str, str]]:
    for name in ("name", "status", "source", "profile", "created"):
        one, other = getattr(a, name), getattr(b, name)
        if one is not None or other is not None:
            yield name, one or "-", other or "-"
    if a.verdict is not None or b.verdict is not None:
        one, other = (side.verdict.status if side.verdict else "-" for side in (a, b))
        yield "verdict", one, other


def _measured(item: Measure) -> tuple[str, str, str, str, str]:
    unit = f", {item.unit}" if item.unit in ("nats", "nats a token", "difference") else ""
    change = "" if item.ratio is None else f"{item.ratio:.3f}x"
    if item.change is not None and item.unit not in ("bytes", "tokens/s", "ms", "s"):
        change = f"{item.change:+.2%}" if item.unit == "share" else f"{item.change:+.4f}"
    if item.paired is not None:
        change = item.shown_paired or ""
    judged = item.judgement if item.why is None else f"{item.judgement}: {item.why}"
    return f"{item.name}{unit}", item.shown_a, item.shown_b, change, judged


def _stored(item: StoredTensor | None) -> str:
    return "-" if item is None else f"{item.storage}, {item.bits:.2f} bits"


def _error(errors: Iterable[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{sum(known) / len(known):.4f}" if known else "-"


def _one_tensor(item: TensorChange) -> tuple[str, str, str, str, str]:
    one, other = item.a, item.b
    errors = (_error([side.relative_error if side else None]) for side in (one, other))
    return (item.name, _stored(one), _stored(other), *errors)  # type: ignore[return-value]


def _by_role(changes: Iterable[TensorChange]) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield a row for each role and pair of storages: bits and errors are means over its tensors."""
    groups: dict[tuple[str, str, str], list[TensorChange]] = {}
    for item in changes:
        storages = (side.storage if side else "-" for side in (item.a, item.b))
        groups.setdefault((item.role, *storages), []).append(item)  # type: ignore[arg-type]
    for (role, *_), items in groups.items():
        counted = f"{role} ({len(items)})" if len(items) > 1 else role
        cells, errors = [], []
        for sides in ([item.a for item in items], [item.b for item in items]):
            present = [side for side in sides if side is not None]
            bits = sum(side.bits for side in present) / len(present) if present else 0
            cells.append(f"{present[0].storage}, {bits:.2f} bits" if present else "-")
            errors.append(_error(side.relative_error for side in present))
        yield counted, cells[0], cells[1], errors[0], errors[1]


def _file(item: FileChange) -> tuple[str, str, str]:
    one, other = (("-" if size is None else format_size(size)) for size in (item.a_bytes, item.b_bytes))
    return item.name, one, other
