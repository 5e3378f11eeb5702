"""The geometry of a report page's figures: shares of a width or height, labels, and words for who cannot see them.

No markup: the template draws them (``templates/report.html.jinja``).
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from compress.report.model import Histogram, TensorRecord
from compress.report.wording import count, plain

#: Shades of the heat strip.
LEVELS = 7
#: Errors at most this many times the smallest look like it.
_ALIKE = 1.01
#: Marks further right have their text on the left.
_MIDDLE = 0.6


@dataclass(frozen=True)
class Bar:
    """A bar: ``share`` of the figure's width, ``spread`` the shares of its slow and fast tenths.

    ``share`` is ``None`` where there is nothing to draw; ``text`` says why then. ``own`` is the artifact's.
    """

    name: str
    text: str
    share: float | None = None
    spread: tuple[float, float] | None = None
    own: bool = False
    note: str = ""


#: Name, value, its text, its slow and fast tenths, and a note beside the name.
BarRow = tuple[str, float | None, str, tuple[float, float] | None, str]


def bars(rows: Sequence[BarRow], own: str) -> list[Bar]:
    """Return bars on one scale that begins at 0.

    Args:
        rows: What is drawn; without a value only its text is shown.
        own: The name of the artifact's.
    """
    top = max((value for _, value, _, _, _ in rows if value is not None), default=0.0)
    top = max([top, *(spread[1] for _, _, _, spread, _ in rows if spread)])
    return [
        Bar(
            name,
            text,
            None if value is None or top <= 0 else value / top,
            None if spread is None or top <= 0 else (spread[0] / top, spread[1] / top),
            name == own,
            note,
        )
        for name, value, text, spread, note in rows
    ]


@dataclass(frozen=True)
class Column:
    """A column of a histogram: its share of the highest, and how many lie in which range."""

    share: float
    count: int
    label: str


@dataclass(frozen=True)
class Mark:
    """Something at a place of an axis, 0..1; of several, ``row`` is where its text goes, and ``left`` on which side."""

    place: float
    text: str
    left: bool = False
    row: int = 1


@dataclass(frozen=True)
class HistogramFigure:
    """A histogram with equally wide columns; ``summary`` says in a sentence what is seen."""

    columns: tuple[Column, ...]
    ticks: tuple[Mark, ...]
    marks: tuple[Mark, ...]
    highest: int
    total: int
    summary: str


def histogram(found: Histogram, unit: str, marks: Sequence[tuple[str, float]]) -> HistogramFigure | None:
    """Return the figure of a distribution, ``None`` of an empty one.

    Args:
        found: The distribution.
        unit: What is counted, in the plural.
        marks: Values to mark, with what they are.
    """
    edges, counts = found.edges, found.counts
    total, highest = sum(counts), max(counts, default=0)
    if highest < 1:
        return None
    ranges = [f"{plain(low)} to {plain(high)}" for low, high in itertools.pairwise(edges)]
    if len(ranges) > 1:
        ranges[0], ranges[-1] = f"below {plain(edges[1])}", f"{plain(edges[-2])} and above"
    fullest = counts.index(highest)
    below = sum(counts[: fullest + 1]) / total
    what = "KL divergence" if found.measure == "kl" else "cosine distance"
    told = ", ".join(f"{text} {plain(value)}" for text, value in marks)
    return HistogramFigure(
        columns=tuple(Column(n / highest, n, where) for n, where in zip(counts, ranges, strict=True)),
        ticks=tuple(Mark(place_of(edges, value), axis_label(value)) for value in _ticks(edges)),
        marks=_marks(edges, marks),
        highest=highest,
        total=total,
        summary=f"Histogram of the {what} of {total:,} {unit}: most, {highest:,}, lie at {ranges[fullest]}; "
        f"{below:.0%} lie there or below. {told[:1].upper()}{told[1:]}.",
    )


def _marks(edges: Sequence[float], marks: Sequence[tuple[str, float]]) -> tuple[Mark, ...]:
    """Return marks whose texts cross none of their lines: each begins below the text of the one before it."""
    found = [(place_of(edges, value), f"{text} {plain(value)}") for text, value in marks]
    right = sorted(item for item in found if item[0] <= _MIDDLE)
    left = sorted((item for item in found if item[0] > _MIDDLE), reverse=True)
    return tuple(Mark(place, text, place > _MIDDLE, row) for row, (place, text) in enumerate([*right, *left], 1))


def place_of(edges: Sequence[float], value: float) -> float:
    """Return where a value lies on an axis of equally wide bins, 0..1: by its logarithm within a bin above 0."""
    bins = len(edges) - 1
    if value <= edges[0]:
        return 0.0
    if value >= edges[-1]:
        return 1.0
    index = bisect_right(edges, value) - 1
    low, high = edges[index], edges[index + 1]
    inside = math.log(value / low) / math.log(high / low) if low > 0 else (value - low) / (high - low)
    return (index + inside) / bins


def axis_label(value: float) -> str:
    """Return a tick's label: powers of ten as such where they are small."""
    if 0 < value < 0.0095:
        mantissa, exponent = f"{value:.0e}".split("e")
        raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"10{raised}" if mantissa == "1" else f"{mantissa}·10{raised}"
    return f"{value:g}"


def _ticks(edges: Sequence[float]) -> list[float]:
    positive = [edge for edge in edges if edge > 0]
    if len(positive) > 1 and positive[-1] / positive[0] >= 100:
        first, last = math.ceil(math.log10(positive[0]) - 1e-9), math.floor(math.log10(positive[-1]) + 1e-9)
        step = max(1, math.ceil((last - first + 1) / 12))
        return [float(f"1e{power}") for power in range(first, last + 1, step)]
    step = max(1, (len(edges) - 1) // 5)
    return list(edges[::step])


@dataclass(frozen=True)
class Cell:
    """Weights of a role in a layer: bits a weight, and the error as text and as one of :data:`LEVELS` shades."""

    bits: str
    error: str
    level: int | None
    label: str


@dataclass(frozen=True)
class HeatRow:
    """A role: how it is stored, and a cell a layer, ``None`` where the layer has no such weight."""

    role: str
    storage: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class HeatStrip:
    """The weights as a picture: a row a role, a column a layer; ``others`` lie outside the blocks.

    ``legend`` has every shade with the smallest and largest of its errors; none where no error was measured.
    """

    layers: tuple[int, ...]
    rows: tuple[HeatRow, ...]
    others: tuple[HeatRow, ...]
    legend: tuple[tuple[int, str], ...]
    summary: str


def heat_strip(tensors: Sequence[TensorRecord]) -> HeatStrip | None:
    """Return the picture of how weights are stored and how far they are from the source's; ``None`` without any."""
    if not tensors:
        return None
    errors = [item.relative_error for item in tensors if item.relative_error is not None]
    scale = _Shades(errors)
    layers = tuple(sorted({item.layer for item in tensors if item.layer is not None}))
    groups: dict[tuple[str, int | None], list[TensorRecord]] = {}
    for item in tensors:
        groups.setdefault((item.role, item.layer), []).append(item)
    roles = dict.fromkeys(item.role for item in tensors)
    rows, others = [], []
    for role in roles:
        if (role, None) in groups:
            found = groups[role, None]
            others.append(HeatRow(role, _storage(found), (_cell(role, None, found, scale),)))
        cells = tuple(_cell(role, at, groups.get((role, at), []), scale) for at in layers)
        if any(cells):
            inside = [item for at in layers for item in groups.get((role, at), [])]
            rows.append(HeatRow(role, _storage(inside), cells))
    summary = f"{count(len(tensors), 'weight')} of {count(len(layers), 'layer')}"
    if errors:
        worst = max((item for item in tensors if item.relative_error is not None), key=lambda item: _error_of([item]))
        where = "" if worst.layer is None else f" of layer {worst.layer}"
        summary += f"; relative errors from {min(errors):.2%} to {max(errors):.2%}, the largest in {worst.role}{where}"
    return HeatStrip(layers, tuple(rows), tuple(others), scale.legend, summary)


def _cell(role: str, layer: int | None, found: Sequence[TensorRecord], scale: _Shades) -> Cell | None:
    """Return what weights of one place have together: their bits on average, the largest of their errors."""
    if not found:
        return None
    weights = sum(item.bytes / item.bits for item in found if item.bits > 0)
    bits = sum(item.bytes for item in found) / weights if weights else 0.0
    error = max((item.relative_error for item in found if item.relative_error is not None), default=None)
    shown = "error not measured" if error is None else f"error {error:.2%}"
    where = role if layer is None else f"{role}, layer {layer}"
    return Cell(
        _bits(bits), shown, scale.level(error), f"{where}: {_storage(found)}, {bits:.3g} bits a weight, {shown}"
    )


def _bits(bits: float) -> str:
    return f"{math.floor(bits * 10 + 0.5) / 10:.1f}".removesuffix(".0")


def _storage(found: Sequence[TensorRecord]) -> str:
    return ", ".join(dict.fromkeys(item.storage for item in found))


def _error_of(found: Sequence[TensorRecord]) -> float:
    return max((item.relative_error or 0.0 for item in found), default=0.0)


class _Shades:
    """Errors to shades, each of which has about as many weights: an outlier does not make all others look alike."""

    def __init__(self, errors: Sequence[float]) -> None:
        ranked = sorted(errors)
        at = (ranked[index * len(ranked) // LEVELS] for index in range(1, LEVELS)) if ranked else ()
        self._borders = sorted({error for error in at if error > ranked[0] * _ALIKE})
        levels: dict[int, list[float]] = {}
        for error in ranked:
            levels.setdefault(self.level(error) or 0, []).append(error)
        self.legend = tuple((level, f"{found[0]:.2%} to {found[-1]:.2%}") for level, found in sorted(levels.items()))

    def level(self, error: float | None) -> int | None:
        if error is None:
            return None
        if not self._borders:
            return LEVELS // 2
        return bisect_right(self._borders, error) * (LEVELS - 1) // len(self._borders)
