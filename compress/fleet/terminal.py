"""A sweep on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compress.fleet import views
from compress.fleet.model import Sweep
from compress.report.wording import visible

_COLOURS = {"accepted": "green", "rejected": "red", "failed": "red", "refused": "red"}
_LEFT = {"profile", "status", "digest"}


def show(sweep: Sweep, console: Console) -> None:
    """Print a table a model, its best artifacts, and what failed."""
    for model in views.models(sweep):
        grid = Table(title=_plain(model.name), title_justify="left", box=None, pad_edge=False)
        for head in views.HEADS:
            grid.add_column(head, justify="left" if head in _LEFT else "right", no_wrap=head in _LEFT)
        for row in model.rows:
            colour = _COLOURS.get(row[1])
            status = f"[{colour}]{row[1]}[/]" if colour else row[1]
            grid.add_row(_plain(row[0]), status, *map(_plain, row[2:]))
        console.print(grid, highlight=False)
        for what, told in (*model.best, *model.problems):
            console.print(f"  {_plain(what)}: {_plain(told)}", highlight=False, soft_wrap=True)
        for note in model.notes:
            console.print(f"  {_plain(note)}", highlight=False, soft_wrap=True)
        console.print()
    for line in views.conditions(sweep):
        console.print(_plain(line), highlight=False, soft_wrap=True)
    console.print(_plain(views.summary(sweep)), highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    return escape(visible(text))
