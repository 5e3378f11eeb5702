"""A comparison on a terminal, and as one HTML page that needs nothing else."""

from __future__ import annotations

from html import escape

from rich.console import Console
from rich.markup import escape as plain
from rich.table import Table as Grid

from compress.report.compare_model import Comparison
from compress.report.compare_rows import Table, tables

_MOST_LISTED = 20
_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%;margin:.5rem 0 1.5rem}
th,td{text-align:left;padding:.25rem .75rem .25rem 0;border-bottom:1px solid #8884;vertical-align:top}
td{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.worse{color:#c0392b;font-weight:600}
"""


def show(found: Comparison, console: Console) -> None:
    """Print a comparison; what is worse comes last, where a reader looks first."""
    for table in tables(found, most=_MOST_LISTED):
        _print(table, console)
    if found.worse:
        console.print("B is worse in", style="bold red")
        for line in found.worse:
            console.print(f"- {plain(line)}", highlight=False, soft_wrap=True)
    else:
        console.print("B is worse in nothing that could be judged", highlight=False)


def _print(table: Table, console: Console) -> None:
    if table.rows:
        grid = Grid(title=plain(table.title) or None, title_justify="left", box=None, pad_edge=False)
        for index, head in enumerate(table.heads):
            grid.add_column(plain(head), overflow="fold", no_wrap=index == 0)
        for row in table.rows:
            grid.add_row(*map(plain, row))
        console.print(grid, highlight=False)
    elif table.note:
        console.print(plain(table.title), style="italic")
    if table.note:
        console.print(plain(table.note), highlight=False, soft_wrap=True)
    if table.rows or table.note:
        console.print()


def page(found: Comparison) -> str:
    """Return a comparison as an HTML page: every tensor and every file, no script, nothing loaded from elsewhere."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(found.a.name)} and {escape(found.b.name)}</title><style>{_STYLE}</style></head><body>",
        "<h1>Comparison</h1>",
    ]
    if found.worse:
        items = "".join(f"<li>{escape(line)}</li>" for line in found.worse)
        parts.append(f'<p class="worse">B is worse in</p><ul>{items}</ul>')
    else:
        parts.append("<p>B is worse in nothing that could be judged.</p>")
    parts += [_section(table) for table in tables(found, every_tensor=True)]
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _section(table: Table) -> str:
    title = f"<h2>{escape(table.title.capitalize())}</h2>" if table.title else ""
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    if not table.rows:
        return title + note
    heads = "".join(f"<th>{escape(head)}</th>" for head in table.heads)
    rows = "\n".join(
        "<tr>" + "".join(f"<td{_mark(cell)}>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return f"{title}<table><thead><tr>{heads}</tr></thead><tbody>\n{rows}\n</tbody></table>{note}"


def _mark(cell: str) -> str:
    return ' class="worse"' if cell == "worse" else ""
