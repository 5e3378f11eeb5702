"""What a shell offers behind ``compress``: names of profiles, models and providers, and artifacts' directories.

Runs at every press of the tab key: reads file names and one TOML file, and imports none of the libraries that do the
work.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem

_PACKAGE = Path(__file__).resolve().parent
SHELLS = ("bash", "zsh", "fish")
#: Where ``compress export`` puts what it makes.
_OUTPUT = Path("artifacts")
_MARKS = ("manifest.json", "report.json")


def _beginning(words: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(word) for word in sorted(words) if word.startswith(incomplete)]


def complete_profiles(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the shipped profiles, and files."""
    folders = (_PACKAGE / "_profiles", _PACKAGE.parent / "profiles")
    found = _beginning({path.stem for folder in folders for path in folder.glob("*.toml")}, incomplete)
    return found or [CompletionItem(incomplete, type="file")]


def complete_models(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the catalog's short names, and files."""
    models = tomllib.loads((_PACKAGE / "catalog.toml").read_text(encoding="utf-8"))["model"]
    names = {name for model in models for name in (model["name"], *model.get("aliases", ()))}
    return _beginning(names, incomplete) or [CompletionItem(incomplete, type="file")]


def complete_providers(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the providers that have a file, spelled with hyphens."""
    files = (_PACKAGE / "providers").glob("[a-z]*.py")
    return _beginning({path.stem.replace("_", "-") for path in files}, incomplete)


def complete_artifacts(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer directories with a manifest or a report; where there are none, any directory."""
    written = Path(incomplete)
    folder = written if incomplete.endswith("/") else written.parent
    folders = [folder, _OUTPUT] if folder == Path() else [folder]
    found = {
        str(path)
        for place in folders
        for path in _directories(place)
        if any((path / mark).is_file() for mark in _MARKS)
    }
    return _beginning(found, incomplete) or [CompletionItem(incomplete, type="dir")]


def _directories(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        return []
