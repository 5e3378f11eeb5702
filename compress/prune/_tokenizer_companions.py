"""What stands beside a tokenizer and names tokens or writes them: configs, added tokens, chat templates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.errors import SourceError
from compress.prune._tokenizer_json import TokenizerFile
from compress.source.files import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, contained, read_json_object

GENERATION_NAME = "generation_config.json"
SPECIAL_NAME = "special_tokens_map.json"
ROLES = ("system", "user", "assistant", "tool")
"""A chat's messages bring these; the template only has a variable in their place."""
TEMPLATE_NAMES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")


def named_ids(file: TokenizerFile, directory: Path, config: Mapping[str, Any]) -> set[int]:
    """Return ids that the tokenizer's files or a config name."""
    named = file.named_ids()
    tokens = file.tokens()
    for mapping in (config, read_optional(directory, GENERATION_NAME)):
        named.update(number for key, value in mapping.items() if names_id(key) for number in ids_in(value))
    for name in ("tokenizer_config.json", SPECIAL_NAME):
        mapping = read_optional(directory, name)
        for key, value in mapping.items():
            if key.endswith("_token") or key in ("additional_special_tokens", "extra_special_tokens"):
                named.update(tokens[token] for token in _contents(value) if token in tokens)
        for entry in decoder_entries(mapping).values():
            named.update(tokens[token] for token in _contents(entry) if token in tokens)
    return named


def read_optional(directory: Path, name: str) -> dict[str, Any]:
    """Return what a JSON file of the directory holds; nothing where there is none."""
    if not (directory / name).is_file():
        return {}
    # Not the limit of a config: a tokenizer_config.json lists every added token, thousands of them in some models.
    return read_json_object(contained(directory, name), MAX_INDEX_BYTES)


def names_id(key: str) -> bool:
    """Return whether a config's key names a token."""
    return key.endswith("_token_id")


def ids_in(value: Any) -> list[int]:
    """Return the ids in a config's value: one, a list, or none; -1 stands for none in some configs."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0]


def _contents(value: Any) -> list[str]:
    """Return the tokens in a tokenizer config's value: text, an added token's table, a list or a table of either."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [token for item in value for token in _contents(item)]
    if isinstance(value, Mapping):
        content = value.get("content")
        return _contents(content if isinstance(content, str) else list(value.values()))
    return []


def decoder_entries(tokenizer_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the added tokens that a ``tokenizer_config.json`` lists by id (as text)."""
    entries = tokenizer_config.get("added_tokens_decoder")
    return entries if isinstance(entries, Mapping) else {}


def template_words(directory: Path) -> list[str]:
    """Return what chat templates write: text outside of ``{...}``, and texts in quotes inside; nothing without one."""
    templates = [_contents(read_optional(directory, name).get("chat_template")) for name in TEMPLATE_NAMES[1:]]
    if (directory / TEMPLATE_NAMES[0]).is_file():
        path = contained(directory, TEMPLATE_NAMES[0])
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise SourceError(f"the file is larger than {MAX_CONFIG_BYTES >> 20} MiB, no such file is", where=path.name)
        templates.append([path.read_text(encoding="utf-8", errors="replace")])
    words = {word for each in templates for template in each for word in _written(template)} - {""}
    return [*ROLES, *sorted(words)] if words else []


def _written(template: str) -> Iterator[str]:
    """Yield the literal text of a Jinja template."""
    place = 0
    while opened := re.compile(r"\{[{%#]").search(template, place):
        yield template[place : opened.start()]
        shut = re.compile(r"[}%#]\}").search(template, opened.end())
        inner = template[opened.end() : shut.start() if shut else None]
        for quoted in re.findall(r"'[^'\n]*'|\"[^\"\n]*\"", inner):
            yield quoted[1:-1].replace("\\n", "\n")
        if not shut:
            return
        place = shut.end()
    yield template[place:]
