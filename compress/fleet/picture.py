"""A model's artifacts as a picture: what each lost (by its logarithm) against its size, best ones joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from compress.fleet.best import losses_compare
from compress.fleet.model import JobRecord
from compress.fleet.views import MEASURES
from compress.report import frontier
from compress.report.wording import plain, visible
from compress.sizes import format_size

_STYLE = """
  .rejected { fill: var(--surface); stroke: var(--muted); stroke-width: 2; }
  .name { font-size: 12px; }
"""
#: Letters of a name that are drawn, and where labels change their side.
_NAME, _MIDDLE = 28, 0.6


@dataclass(frozen=True)
class Dot:
    """An artifact: its size in bytes, what it lost, and whether it was accepted."""

    name: str
    size: int
    loss: float
    accepted: bool


def dots(jobs: Sequence[JobRecord]) -> tuple[str, list[Dot]]:
    """Return the measure and the artifacts that can be drawn; none where losses cannot be compared."""
    found = [(job, job.outcome, job.outcome.loss) for job in jobs if job.outcome is not None and job.outcome.loss]
    losses = [loss for *_, loss in found]
    if not losses or not losses_compare(losses):
        return "", []
    made = [
        Dot(job.profile, outcome.model_bytes, loss.value, outcome.status == "accepted") for job, outcome, loss in found
    ]
    return MEASURES[losses[0].measure], made


def best_of(found: Sequence[Dot]) -> list[Dot]:
    """Return the artifacts that no accepted one of fewer bytes beats, by size."""
    best: list[Dot] = []
    for dot in sorted((dot for dot in found if dot.accepted), key=lambda dot: (dot.size, dot.loss)):
        if not best or dot.loss < best[-1].loss:
            best.append(dot)
    return best


def sentence(measure: str, found: Sequence[Dot]) -> str:
    """Return what the picture shows, for who cannot see it."""
    told = "; ".join(f"{visible(dot.name)}: {format_size(dot.size)}, {plain(dot.loss)}" for dot in found)
    return f"{measure[:1].upper()}{measure[1:]}, against size. {told}."


def svg(measure: str, found: Sequence[Dot]) -> str:
    """Return the picture as a self-contained SVG document; the same artifacts give the same bytes."""
    largest = max(dot.loss for dot in found)
    floor = largest * frontier.FLOOR if largest > 0 else 1.0
    losses = [max(dot.loss, floor) for dot in found]
    x, y, body = frontier.frame([dot.size / 1e6 for dot in found], losses, measure)
    best = best_of(found)
    if len(best) > 1:
        points = " ".join(f"{x.place(dot.size / 1e6)},{y.place(max(dot.loss, floor))}" for dot in best)
        body.append(f'<polyline class="frontier" points="{points}"/>')
    for dot in found:
        body += _drawn(dot, x, y, floor)
    return frontier.document("Size and loss", sentence(measure, found), body, _STYLE)


def _drawn(dot: Dot, x: frontier.Scale, y: frontier.Scale, floor: float) -> list[str]:
    left, top = x.place(dot.size / 1e6), y.place(max(dot.loss, floor))
    share = (x(dot.size / 1e6) - x.start) / (x.stop - x.start)
    side, anchor = (-10, "end") if share > _MIDDLE else (10, "start")
    name = visible(dot.name)
    shown = escape(name if len(name) <= _NAME else f"{name[: _NAME - 1]}…")
    told = escape(f"{name}: {format_size(dot.size)}, {plain(dot.loss)}" + ("" if dot.accepted else ", rejected"))
    kind = "point" if dot.accepted else "rejected"
    return [
        f'<circle class="{kind}" cx="{left}" cy="{top}" r="5"><title>{told}</title></circle>',
        f'<text class="name" x="{left}" y="{top}" dx="{side}" text-anchor="{anchor}" dominant-baseline="middle">'
        f"{shown}</text>",
    ]
