"""``sweep.json``, ``README.md`` and ``sweep.html``: one comparison three times, for programs and for people.

Names, errors and versions are hostile text: they are escaped.
"""

from __future__ import annotations

from compress.fleet import journal, picture, views
from compress.fleet.best import models_of
from compress.fleet.model import Sweep
from compress.fleet.place import Place
from compress.package.staging import write_file
from compress.report import html
from compress.report.card import code, escaped
from compress.report.sheet import Row, Table
from compress.report.sheet import picture as drawing
from compress.report.wording import moment

CARD_NAME, PAGE_NAME = "README.md", "sweep.html"


def write(sweep: Sweep, place: Place) -> None:
    """Write all three, to the store as well where there is one.

    Raises:
        CompressError: The store does not take them.
    """
    files = {journal.NAME: journal.dumps(sweep), CARD_NAME: card(sweep), PAGE_NAME: page(sweep)}
    for name, content in files.items():
        write_file(place.desk / name, content)
    if place.store is not None:
        for name, content in files.items():
            place.store.write(name, content.encode())


def card(sweep: Sweep) -> str:
    """Return the comparison as Markdown."""
    lines = [f"# {escaped(sweep.grid)}", "", f"{views.summary(sweep)[:1].upper()}{views.summary(sweep)[1:]}.", ""]
    lines += [line for told in views.conditions(sweep) for line in (told, "")]
    for model in views.models(sweep):
        lines += [f"## {escaped(model.name)}", "", _line(views.HEADS), _line(["---"] * len(views.HEADS))]
        # A digest and a profile's name are copied; the rest is read.
        lines += [_line([code(row[0]), *map(escaped, row[1:-1]), code(row[-1])]) for row in model.rows]
        lines += [""]
        lines += [f"- {escaped(what)}: {escaped(told)}" for what, told in model.best]
        lines += [f"- {escaped(profile)}: {escaped(problem)}" for profile, problem in model.problems]
        lines += [f"- {escaped(note)}" for note in model.notes]
        lines += [""] if model.best or model.problems or model.notes else []
    lines += [
        "A digest is one SHA-256 over an artifact's files that are no measurements; `sweep.json` has it whole. Each "
        "artifact is a directory beside this file, with a report of its own; `sweep.html` has the pictures.",
        "",
    ]
    return "\n".join(lines)


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def page(sweep: Sweep) -> str:
    """Return the comparison as an HTML document that needs nothing else."""
    failed = sweep.exit_code
    shown = [
        {"view": view, "table": _table(view), "picture": _picture(sweep, view.name)} for view in views.models(sweep)
    ]
    context = {
        "sweep": sweep,
        "created": moment(sweep.created) if sweep.created else "",
        "summary": views.summary(sweep),
        "passed": failed == 0,
        "word": {0: "PASS", 1: "FAILED"}.get(failed, "REJECTED") if sweep.complete else "UNFINISHED",
        "conditions": views.conditions(sweep),
        "models": shown,
        "css": html.styles(),
    }
    return str(html.environment().get_template("sweep.html.jinja").render(context))


def _table(view: views.ModelView) -> Table:
    rows = tuple(Row(row[0], row[1:]) for row in view.rows)
    return Table(f"{view.name} under every profile", tuple(head.capitalize() for head in views.HEADS), rows)


def _picture(sweep: Sweep, model: str) -> object:
    measure, dots = picture.dots(models_of(sweep.jobs)[model])
    if not dots:
        return None
    return drawing(picture.svg(measure, dots), picture.sentence(measure, dots))
