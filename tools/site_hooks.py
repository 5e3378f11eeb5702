"""What mkdocs calls while it builds the site: links that leave docs/, and pages that need not be there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_LEAVING = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#]+)(?:#[^)]*)?\)")
_ROLE = re.compile(r":\w+:<code>~?")


def on_config(config: Any) -> Any:
    """Leave pages out of the navigation that this checkout does not have."""
    config.nav = _there(config.nav, Path(config.docs_dir))
    return config


def _there(items: list[Any], docs: Path) -> list[Any]:
    kept = []
    for item in items:
        ((title, inner),) = item.items()
        if isinstance(inner, list):
            kept.append({title: _there(inner, docs)})
        elif (docs / inner).is_file():
            kept.append(item)
    return kept


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Make names of files outside docs/ of links to them: the site does not have them, the repository does."""
    place = ROOT / "docs" / Path(page.file.src_uri).parent

    def name(found: re.Match[str]) -> str:
        target = re.sub(r"[)#].*", "", found[0].split("](", 1)[1])
        path = (place / target).resolve()
        if path.is_relative_to(ROOT / "docs"):
            return found[0]
        # A link to nothing stays: the build is strict and fails on it.
        return f"`{path.relative_to(ROOT)}`" if path.is_relative_to(ROOT) and path.exists() else found[0]

    return _LEAVING.sub(name, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show Sphinx roles in docstrings as code."""
    return _ROLE.sub("<code>", html)
