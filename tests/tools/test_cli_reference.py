from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import cli_reference
import click
import pytest


@click.group()
def root() -> None:
    """Do something."""


@root.command()
@click.option("--size", help="How large.")
def grow(size: str) -> None:
    """Grow it."""


@root.command(hidden=True)
def secret() -> None:
    """Not for the page."""


@root.group()
def nested() -> None:
    """More."""


@nested.command()
def leaf() -> None:
    """A leaf."""


@pytest.fixture(autouse=True)
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    module = ModuleType("compress.cli")
    module.main = root  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "compress.cli", module)
    path = tmp_path / "docs" / "cli.md"
    monkeypatch.setattr(cli_reference, "PAGE", path)
    return path


def test_every_visible_command_has_a_section() -> None:
    text = cli_reference.reference(root, "compress")
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles == ["## `compress`", "## `compress grow`", "## `compress nested`", "## `compress nested leaf`"]
    assert "--size TEXT" in text
    assert "Usage: compress nested leaf" in text


@pytest.mark.parametrize("columns", ["40", "200"])
def test_the_page_does_not_depend_on_the_terminal(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cli_reference.reference(root, "compress")
    monkeypatch.setenv("COLUMNS", columns)
    assert cli_reference.reference(root, "compress") == before


def test_check_passes_only_on_a_fresh_page(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_reference.main(["--check"]) == 1  # missing
    assert cli_reference.main([]) == 0
    assert cli_reference.main(["--check"]) == 0
    page.write_text(page.read_text().replace("How large", "How small"))
    assert cli_reference.main(["--check"]) == 1
    assert "make docs" in capsys.readouterr().err
