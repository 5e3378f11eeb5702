"""Where an artifact's model comes from and under which licence: from the catalog, else from the source's own card.

Nothing is guessed: what neither says is not known, and the artifact's card says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import catalog
from compress.errors import SourceError
from compress.source.files import contained

CARD_NAME = "README.md"
_MAX_CARD_BYTES = 1 << 20
_MAX_KEYS_LENGTH, _MAX_BRACKETS = 4096, 16
_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
# A key at the start of a line, with the lines that belong to it: indented ones and items of a list.
_KEYS = re.compile(
    r"^(?:license|license_name|license_link|language|pipeline_tag):[^\n]*(?:\n(?:[ \t]+|- )[^\n]*)*", re.MULTILINE
)
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .+_\-]{0,63}")
_LINK = re.compile(r"https://[\w.\-]+/[\w./%\-]{0,200}|LICENSE(?:\.md|\.txt)?", re.ASCII)
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z0-9]{2,8})?|multilingual|code")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)
#: What catalog and cards write where no licence is stated.
_UNKNOWN = {"not stated", "unknown", "other"}


@dataclass(frozen=True)
class Origin:
    """What is known of the source beside its identifier; ``None`` or empty is not known.

    Attributes:
        base_model: Its id on the Hugging Face hub.
        licence: The hub's identifier of its licence, lower case.
        licence_name: The name of a licence that the hub has no identifier for (``licence`` is ``other`` then).
        licence_link: Where that licence can be read.
        languages: Codes of its languages.
        task: Its task by the hub's name, where the source says it.
        told_by: Who said so: ``catalog`` or ``card``.
    """

    base_model: str | None = None
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    languages: tuple[str, ...] = ()
    task: str | None = None
    told_by: str | None = None


def origin(source: Mapping[str, Any], directory: Path | None) -> Origin:
    """Return what is known of a source.

    Args:
        source: The manifest's ``source``.
        directory: The source's own directory, in which its card may lie; ``None`` where it has none.
    """
    entry = catalog.of_source(str(source.get("kind")), str(source.get("id")))
    card = {} if directory is None else _front_matter(directory)
    languages = tuple(item for item in _texts(card.get("language")) if _LANGUAGE.fullmatch(item))
    if entry is not None:
        licence = entry.licence.lower()
        known = None if licence in _UNKNOWN else licence
        return Origin(entry.hub, known, None, None, languages, entry.task, "catalog")
    hub = source.get("id") if source.get("kind") == "hub" else None
    base = hub if isinstance(hub, str) and _HUB_ID.fullmatch(hub) else None
    stated, name, link = _licence(card)
    task = card.get("pipeline_tag")
    told = task if isinstance(task, str) and re.fullmatch(r"[a-z0-9\-]{3,40}", task) else None
    return Origin(base, stated, name, link, languages, told, "card" if stated else None)


def _licence(card: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
    found = [item for item in _texts(card.get("license")) if _IDENTIFIER.fullmatch(item)]
    if len(found) != 1:  # several licences hold for parts that the card tells apart in words
        return None, None, None
    licence, name, link = found[0].lower(), card.get("license_name"), card.get("license_link")
    if licence != "other":
        return (None if licence in _UNKNOWN else licence), None, None
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name):
        return None, None, None
    return licence, name, link if isinstance(link, str) and _LINK.fullmatch(link) else None


def _texts(value: Any) -> list[str]:
    return [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def _front_matter(directory: Path) -> dict[str, Any]:
    """Return what the source's card says of itself; nothing where there is none, or none that can be read.

    Only the keys that are looked for are parsed: front matters may hold tables of thousands of results.
    """
    import yaml

    try:
        path = contained(directory, CARD_NAME)
        with path.open("rb") as stream:
            text = stream.read(_MAX_CARD_BYTES).decode("utf-8-sig", errors="replace")
        block = _BLOCK.match(text)
        wanted = "" if block is None else "\n".join(match[0] for match in _KEYS.finditer(block[1]))
        if len(wanted) > _MAX_KEYS_LENGTH or sum(map(wanted.count, "[{")) > _MAX_BRACKETS:
            return {}
        found = yaml.safe_load(wanted)
    except (SourceError, OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
