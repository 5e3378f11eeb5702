"""The frontier of size and loss as a picture: an SVG file without scripts, and a few lines of text.

Size is linear, KL divergence logarithmic: along a frontier every megabyte takes about the same share off the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from compress.report.model import Allocation
from compress.sizes import format_size

_WIDTH, _HEIGHT = 680, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 20, 56, 54
#: Losses below this share of the largest are drawn at it: a loss of 0 has no logarithm.
FLOOR = 1e-6

_STYLE = """
  svg { --surface: #fcfcfb; --text: #1f1f1d; --muted: #6b6a65; --grid: #e5e4df; --line: #2a6fc9; --mark: #c2410c; }
  @media (prefers-color-scheme: dark) {
    svg { --surface: #1a1a19; --text: #efeee9; --muted: #a3a29b; --grid: #34332f; --line: #6aa5f0; --mark: #fb923c; }
  }
  text { font: 13px system-ui, sans-serif; fill: var(--text); }
  .surface { fill: var(--surface); }
  .title { font-size: 16px; font-weight: 600; }
  .tick, .axis { fill: var(--muted); }
  .grid { stroke: var(--grid); stroke-width: 1; }
  .frontier { fill: none; stroke: var(--line); stroke-width: 2; }
  .point { fill: var(--line); }
  .chosen { fill: var(--mark); stroke: var(--surface); stroke-width: 2; }
  .measured { fill: var(--surface); stroke: var(--mark); stroke-width: 2; }
  .budget { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 6 4; }
"""


@dataclass(frozen=True)
class Scale:
    """Where a value lies: ``low`` at ``start``, ``high`` at ``stop``, by value or by its logarithm."""

    low: float
    high: float
    start: float
    stop: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of ``value``; values outside are drawn at the edge."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.logarithmic:
            low, high, at = math.log10(low), math.log10(high), math.log10(at)
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def place(self, value: float) -> str:
        """Return the place of ``value`` as a coordinate."""
        return _place(self(value))


def frontier_svg(allocation: Allocation) -> str:
    """Return the frontier as a self-contained SVG document: KL divergence (log) against megabytes.

    The chosen assignment, what its artifact was measured to lose, and the budget are marked. It follows the viewer's
    light or dark setting; the same allocation gives the same bytes.
    """
    x, y, axes = frame(_sizes(allocation), _losses(allocation), "KL divergence, nats a token")
    body = [
        f'<text class="title" x="{_LEFT}" y="26">Size and loss of the best assignments of bits</text>',
        *axes,
        *_budget_lines(allocation, x, y),
        *_curve(allocation, x, y),
        *_legend(allocation),
    ]
    return document("Predicted KL divergence against size", _sentence(allocation), body)


def frame(sizes: Sequence[float], losses: Sequence[float], measure: str) -> tuple[Scale, Scale, list[str]]:
    """Return the scales that hold sizes and losses, and the drawn axes.

    Args:
        sizes: Megabytes.
        losses: Each above 0.
        measure: What a loss is, for the axis.
    """
    x_ticks = _linear_ticks(min(sizes), max(sizes))
    y_ticks = _log_ticks(min(losses), max(losses))
    x = Scale(x_ticks[0], x_ticks[-1], _LEFT, _WIDTH - _RIGHT)
    y = Scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP, logarithmic=True)
    return x, y, _axes(x, y, x_ticks, y_ticks, measure)


def document(title: str, told: str, body: Sequence[str], style: str = "") -> str:
    """Return an SVG document of the figure's size; ``told`` says in words what is drawn."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(told)}</desc>",
        f"<style>{_STYLE}{style}</style>",
        f'<rect class="surface" width="{_WIDTH}" height="{_HEIGHT}"/>',
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def frontier_text(allocation: Allocation, width: int = 60, height: int = 9) -> list[str]:
    """Return the frontier in plain characters: ``.`` the best assignments, ``O`` the chosen one, ``|`` the byte budget.

    Args:
        allocation: What is drawn.
        width: Columns in all, 24 or more.
        height: Lines of the plot itself; two more name the axis.
    """
    sizes, losses = _sizes(allocation), _losses(allocation)
    labels = [f"{loss:.2g}" for loss in (max(losses), min(losses))]
    margin = max(len("KL"), *map(len, labels)) + 1
    x = Scale(*_apart(min(sizes), max(sizes)), 0, width - margin - 2)
    y = Scale(*_apart(min(losses), max(losses), ratio=2.0), height - 1, 0, logarithmic=True)
    cells = [[" "] * (width - margin - 1) for _ in range(height)]
    if allocation.budget.max_bytes is not None:
        for row in cells:
            row[round(x(allocation.budget.max_bytes / 1e6))] = "|"
    for point in allocation.frontier:
        cells[round(y(point.predicted_kl))][round(x(point.bytes / 1e6))] = "."
    cells[round(y(allocation.predicted_kl))][round(x(allocation.bytes / 1e6))] = "O"
    sides = [""] * height
    sides[0], sides[-1] = labels
    sides[height // 2] = "KL"
    lines = [f"{side:>{margin - 1}} |{''.join(row)}".rstrip() for side, row in zip(sides, cells, strict=True)]
    left, right = format_size(min(sizes) * 1e6), format_size(max(sizes) * 1e6)
    lines.append(" " * margin + "+" + "-" * (width - margin - 1))
    lines.append(" " * (margin + 1) + left + right.rjust(width - margin - 1 - len(left)))
    return lines


def _sizes(allocation: Allocation) -> list[float]:
    """Return all sizes that have to be on the plot, MB."""
    found = [allocation.bytes, *(point.bytes for point in allocation.frontier)]
    return [size / 1e6 for size in (*found, *_given(allocation.budget.max_bytes)) if size > 0] or [1.0]


def _losses(allocation: Allocation) -> list[float]:
    """Return all losses that have to be on the plot, each large enough to have a logarithm."""
    found = [allocation.predicted_kl, *(point.predicted_kl for point in allocation.frontier)]
    found += [*_given(allocation.measured_kl), *_given(allocation.budget.max_kl)]
    largest = max(found)
    return [max(loss, largest * FLOOR) for loss in found] if largest > 0 else [1.0]


def _given(value: float | None) -> list[float]:
    return [] if value is None else [value]


def _apart(low: float, high: float, ratio: float = 1.1) -> tuple[float, float]:
    return (low, high) if high > low * (1 + 1e-9) else (low / ratio, high * ratio)


def _linear_ticks(low: float, high: float) -> list[float]:
    """Return five to eleven round values, the first and last of which enclose ``low`` and ``high``."""
    low, high = _apart(low, high)
    rough = (high - low) / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten with their 2 and 5, or alone over many decades, that enclose ``low`` and ``high``."""
    low, high = _apart(low, high, ratio=2.0)
    factors = (1, 2, 5) if high / low < 1e4 else (1,)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    known = [float(f"{factor}e{decade}") for decade in decades for factor in factors]
    first = max(index for index, value in enumerate(known) if value <= low * (1 + 1e-9))
    last = min(index for index, value in enumerate(known) if value >= high * (1 - 1e-9))
    return known[first : last + 1]


def _axes(x: Scale, y: Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], measure: str) -> list[str]:
    lines = []
    for tick in x_ticks:
        at = _place(x(tick))
        lines.append(f'<line class="grid" x1="{at}" y1="{_place(y.start)}" x2="{at}" y2="{_place(y.stop)}"/>')
        lines.append(f'<text class="tick x" x="{at}" y="{_HEIGHT - 34}" text-anchor="middle">{tick:.6g}</text>')
    for tick in y_ticks:
        at = _place(y(tick))
        lines.append(f'<line class="grid" x1="{_place(x.start)}" y1="{at}" x2="{_place(x.stop)}" y2="{at}"/>')
        lines.append(
            f'<text class="tick y" x="{_LEFT - 8}" y="{at}" text-anchor="end" dominant-baseline="middle">'
            f"{tick:g}</text>"
        )
    middle = (_TOP + _HEIGHT - _BOTTOM) // 2
    lines.append(
        f'<text class="axis" x="{(_LEFT + _WIDTH - _RIGHT) // 2}" y="{_HEIGHT - 12}" text-anchor="middle">MB</text>'
    )
    lines.append(
        f'<text class="axis" x="18" y="{middle}" text-anchor="middle" transform="rotate(-90 18 {middle})">'
        f"{escape(measure)}</text>"
    )
    return lines


def _budget_lines(allocation: Allocation, x: Scale, y: Scale) -> list[str]:
    lines, budget = [], allocation.budget
    if budget.max_bytes is not None:
        at = _place(x(budget.max_bytes / 1e6))
        lines.append(f'<line class="budget bytes" x1="{at}" y1="{_place(y.start)}" x2="{at}" y2="{_place(y.stop)}"/>')
    if budget.max_kl is not None:
        at = _place(y(budget.max_kl))
        lines.append(f'<line class="budget kl" x1="{_place(x.start)}" y1="{at}" x2="{_place(x.stop)}" y2="{at}"/>')
    return lines


def _curve(allocation: Allocation, x: Scale, y: Scale) -> list[str]:
    places = [(_place(x(p.bytes / 1e6)), _place(y(p.predicted_kl))) for p in allocation.frontier]
    lines = []
    if len(places) > 1:
        lines.append(f'<polyline class="frontier" points="{" ".join(f"{a},{b}" for a, b in places)}"/>')
    for point, (a, b) in zip(allocation.frontier, places, strict=True):
        told = f"{format_size(point.bytes)}, KL {point.predicted_kl:.3g}, decode time {point.relative_decode_time:.2f}"
        lines.append(f'<circle class="point" cx="{a}" cy="{b}" r="3"><title>{told}</title></circle>')
    at = _place(x(allocation.bytes / 1e6))
    if allocation.measured_kl is not None:
        lines.append(f'<circle class="measured" cx="{at}" cy="{_place(y(allocation.measured_kl))}" r="6"/>')
    lines.append(f'<circle class="chosen" cx="{at}" cy="{_place(y(allocation.predicted_kl))}" r="7"/>')
    return lines


def _legend(allocation: Allocation) -> list[str]:
    """The upper right of a falling curve is free."""
    entries = [("chosen", f"chosen: {format_size(allocation.bytes)}, predicted KL {allocation.predicted_kl:.3g}")]
    if allocation.measured_kl is not None:
        entries.append(("measured", f"its artifact: measured KL {allocation.measured_kl:.3g}"))
    asked = _asked(allocation)
    if asked:
        entries.append(("budget", f"budget: {asked}"))
    left, width, height = _WIDTH - _RIGHT - 322, 314, 22 * len(entries) + 10
    lines = [f'<rect class="surface" x="{left}" y="{_TOP + 6}" width="{width}" height="{height}" rx="4"/>']
    for index, (kind, words) in enumerate(entries):
        middle = _TOP + 22 + 22 * index
        if kind == "budget":
            lines.append(f'<line class="budget" x1="{left + 8}" y1="{middle}" x2="{left + 30}" y2="{middle}"/>')
        else:
            lines.append(f'<circle class="{kind} key" cx="{left + 19}" cy="{middle}" r="6"/>')
        lines.append(f'<text x="{left + 40}" y="{middle}" dominant-baseline="middle">{words}</text>')
    return lines


def _asked(allocation: Allocation) -> str:
    budget = allocation.budget
    sizes = [] if budget.max_bytes is None else [format_size(budget.max_bytes)]
    return ", ".join([*sizes, *(f"KL {value:.3g}" for value in _given(budget.max_kl))])


def _sentence(allocation: Allocation) -> str:
    asked = _asked(allocation)
    within = f" within {asked}" if asked else ""
    size = format_size(allocation.bytes)
    return f"Chosen{within}: {size} at a predicted KL divergence of {allocation.predicted_kl:.3g}."


def _place(value: float) -> str:
    """Return a coordinate with two digits, ``-0`` never."""
    return f"{value + 0.0:.2f}".removesuffix(".00")
