"""The documentation says what is so: commands that exist, code that parses, files that are there, every key."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
import site_hooks

from compress.cli import cli
from compress.profile import parse_profile
from tiny_models import PLAIN_INT8

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, *languages: str) -> Iterator[str]:
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        if language in languages:
            yield body


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the words of every ``compress`` command of a page, continued lines joined."""
    for body in blocks(page, "sh", "console", "text"):
        for line in body.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith("compress ") and not line.startswith("compress COMMAND"):
                words = shlex.split(line, comments=True)[1:]
                # What the shell does with it afterwards is no argument.
                yield list(itertools.takewhile(lambda word: word not in ("|", ">", ">>", "&&", ";"), words))


def parse(words: list[str]) -> None:
    """Parse a command line as click does, nothing run."""
    name, *rest = words
    if name.startswith("-"):
        return
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"there is no command {name}"
    command.make_context(name, list(rest))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    for words in command_lines(page):
        try:
            parse(words)
        except click.ClickException as error:
            raise AssertionError(f"{shlex.join(words)}: {error.format_message()}") from None


def test_commands_are_found_and_a_wrong_one_is_seen(tmp_path: Path) -> None:
    assert sum(len(list(command_lines(page))) for page in PAGES) > 30
    page = tmp_path / "page.md"
    page.write_text("```sh\ncompress export smollm2 --profil x  # a slip\n```\n")
    ((first, *rest),) = command_lines(page)
    assert (first, rest) == ("export", ["smollm2", "--profil", "x"])
    with pytest.raises(click.NoSuchOption):
        parse([first, *rest])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_parses_and_profiles_are_valid(page: Path) -> None:
    for body in blocks(page, "python"):
        ast.parse(body)
    for body in blocks(page, "toml"):
        if body.startswith("name = "):
            parse_profile(tomllib.loads(body), where=page.name)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    content = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", content):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), target


def test_links_out_of_the_site_become_names() -> None:
    class Here:
        class file:  # noqa: N801 - as mkdocs has it
            src_uri = "decisions/0001-places-before-bytes.md"

    text = "[a](../../compress/cli.py) [b](../accuracy.md) [c](../../compress/no_such.py)"
    expected = "`compress/cli.py` [b](../accuracy.md) [c](../../compress/no_such.py)"
    assert site_hooks.on_page_markdown(text, page=Here) == expected


def test_every_key_of_a_manifest_is_told(tiny_artifact: Callable[..., Path]) -> None:
    page = (ROOT / "docs" / "artifact.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `(\w+)", page.split("## manifest.json")[1], re.MULTILINE))
    for artifact in (tiny_artifact("llama"), tiny_artifact("bert:embedding", PLAIN_INT8)):
        assert set(json.loads((artifact / "manifest.json").read_text())) <= told
    assert {"calibration", "allocation", "pruning"} <= told
    assert "no_such_key" not in told
