"""Write docs/cli.md from the ``--help`` of every command; ``--check`` exits 1 when it is stale."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import click

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
WIDTH = 100
HEADER = """# Command line

<!-- Written by tools/cli_reference.py (`make docs`) from each command's --help. Do not edit. -->
"""


def commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield a command and all its subcommands, depth first, hidden ones left out."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=" ".join(path))
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                yield from commands(child, (*path, name))


def reference(root: click.Command, name: str) -> str:
    """Return the page for ``root``, whose program is called ``name``."""
    sections = [HEADER]
    for path, command in commands(root, (name,)):
        title = " ".join(path)
        # A fixed width: the page must not depend on the terminal it is made in.
        context = click.Context(command, info_name=title, terminal_width=WIDTH, max_content_width=WIDTH, color=False)
        text = "\n".join(line.rstrip() for line in command.get_help(context).strip().splitlines())
        sections.append(f"## `{title}`\n\n```text\n{text}\n```\n")
    return "\n".join(sections)


def _stale(found: str, expected: str) -> str:
    lines = zip(found.splitlines(), expected.splitlines(), strict=False)
    number = next((number for number, (a, b) in enumerate(lines, start=1) if a != b), None)
    return f"from line {number}" if number else "its length differs"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    options = parser.parse_args(arguments)
    cli = importlib.import_module("compress.cli")  # here, so that the page's parts can be tested without it
    root = next(
        (item for item in (getattr(cli, "main", None), getattr(cli, "cli", None)) if isinstance(item, click.Command)),
        None,
    )
    if root is None:
        raise SystemExit("compress.cli has no click command called main or cli")
    expected = reference(root, "compress")
    if not options.check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(expected, encoding="utf-8")
        return 0
    found = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if found == expected:
        return 0
    print(
        f"{PAGE.relative_to(PAGE.parent.parent)} is stale ({_stale(found, expected)})\n  try: make docs",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
