"""Tables of what pydantic models take, as Markdown: for the pages on profiles and reports."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "anything"}


def is_model(annotation: object) -> typing.TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def describe(model: type[BaseModel]) -> str:
    """Return a model's docstring as Markdown."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", (inspect.getdoc(model) or "").replace("``", "`"))


def takes(annotation: Any) -> str:
    """Return in words what a field takes; a model by its name, linked to its section."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return takes(inner[0])
    if origin is Literal:
        return ", ".join(f"`{plain(value)}`" for value in inner)
    if origin is tuple:
        several = len(inner) == 2 and inner[1] is Ellipsis
        return f"list of {takes(inner[0])}" if several else f"list of {len(inner)}: {takes(inner[0])}"
    if origin is dict:
        return f"table: {takes(inner[0])} to {takes(inner[1])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(takes(item) for item in inner)
    if is_model(annotation):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return _WORDS[annotation]


def plain(value: object) -> str:
    """Return a value as TOML and JSON write it."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def table(model: type[BaseModel], prefix: str = "", *, nested: bool = True) -> str:
    """Return the rows of a model's fields: key, what it takes, its default; ``nested`` tables too."""
    lines = ["| key | takes | default |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        if is_model(field.annotation) and not nested:
            continue
        default = field.get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else f"`{plain(default)}`"
        lines.append(f"| `{prefix}{name}` | {takes(field.annotation)} | {shown} |")
    return "\n".join(lines)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models that an annotation names."""
    if is_model(annotation):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from models_in(inner)


def write_or_check(page: Path, expected: str, arguments: list[str] | None, description: str | None) -> int:
    """Write a page, or with ``--check`` say whether it is as it should be; return the exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    if not parser.parse_args(arguments).check:
        page.parent.mkdir(exist_ok=True)
        page.write_text(expected, encoding="utf-8")
        return 0
    if page.exists() and page.read_text(encoding="utf-8") == expected:
        return 0
    print(f"docs/{page.name} is stale\n  try: make docs", file=sys.stderr)
    return 1
