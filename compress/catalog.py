"""Short names for models: what ``compress models`` lists and ``compress export phi-3`` resolves.

The data lies in ``catalog.toml``. Whether a model can be exported is derived from the families that exist, never
written down, so the catalog cannot promise what the code does not do.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from compress.errors import UnsupportedModelError, UsageError, did_you_mean
from compress.families import load_family

Task = Literal["text-generation", "feature-extraction", "sentence-similarity", "text-classification"]
Support = Literal["supported", "planned"]
ShortName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.\-]*$")]

_CATALOG = Path(__file__).with_name("catalog.toml")


class CatalogEntry(BaseModel):
    """One model under its short name.

    Attributes:
        name: The short name: lower case letters, digits, dots and hyphens.
        aliases: Other names for the same checkpoint.
        hub: Its Hugging Face id, ``owner/repository``.
        model_type: ``model_type`` of its config.json: the family that reads it.
        task: Its Hugging Face pipeline task.
        parameters: Number of parameters, a tied table counted once.
        licence: SPDX identifier on its model card, or ``not stated``.
        rope_type: Its config's rotary scaling; ``default`` without one.
        embedded: A ``package:`` reference to the same model inside a Python package, if there is one.
        note: What the user should know before exporting it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: ShortName
    aliases: list[ShortName] = Field(default_factory=list)
    hub: Annotated[str, StringConstraints(pattern=r"^[\w.\-]+/[\w.\-]+$")]
    model_type: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")]
    task: Task
    parameters: Annotated[int, Field(gt=0)]
    licence: Annotated[str, StringConstraints(min_length=1)]
    rope_type: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")] = "default"
    embedded: Annotated[str, StringConstraints(pattern=r"^package:[A-Za-z_]\w*/[\w.\-/]+$")] | None = None
    note: str | None = None

    @property
    def support(self) -> Support:
        """``supported`` if a family of this version takes its ``model_type`` and rotary scaling, else ``planned``."""
        try:
            family = load_family({"model_type": self.model_type})
        except UnsupportedModelError:
            return "planned"
        return "supported" if self.rope_type in getattr(family, "ropes", ("default",)) else "planned"

    @property
    def reference(self) -> str:
        """The model reference it stands for: the embedded package where there is one, else the hub id."""
        return self.embedded or self.hub


class _Catalog(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    schema_version: Literal[1]
    model: list[CatalogEntry]

    @model_validator(mode="after")
    def _names_are_unique(self) -> _Catalog:
        seen: dict[str, str] = {}
        for entry in self.model:
            for name in (entry.name, *entry.aliases):
                if name in seen:
                    raise ValueError(f"the name {name!r} is used by {seen[name]!r} and by {entry.name!r}")
                seen[name] = entry.name
        return self


def parse(document: Mapping[str, Any]) -> tuple[CatalogEntry, ...]:
    """Check a catalog document and return its entries in order.

    Raises:
        UsageError: An unknown or missing key, a malformed value, or a name used twice; names the table and the key.
    """
    try:
        return tuple(_Catalog.model_validate(document).model)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "catalog"
        hint = "keys of a model: " + ", ".join(CatalogEntry.model_fields)
        raise UsageError(f"the model catalog is not valid: {first['msg']}", where=where, hint=hint) from error


@functools.cache
def entries() -> tuple[CatalogEntry, ...]:
    """Return every model of the catalog, in its order."""
    return parse(tomllib.loads(_CATALOG.read_text(encoding="utf-8")))


@functools.cache
def _by_name() -> Mapping[str, CatalogEntry]:
    return {name: entry for entry in entries() for name in (entry.name, *entry.aliases)}


def resolve(name: str) -> CatalogEntry | None:
    """Return the entry with this short name or alias, upper and lower case alike, or ``None``.

    A hub id is not looked up here: who writes one out wants that repository, not a package that embeds the model.
    """
    return _by_name().get(name.lower())


def suggest(name: str) -> str:
    """Return a hint for a name that is not in the catalog: near names, or all of them."""
    return did_you_mean(name.lower(), _by_name())


def of_source(kind: str, identifier: str) -> CatalogEntry | None:
    """Return the entry of a source by its kind and identifier as manifests have them, ``None`` where there is none."""
    for entry in entries():
        if (kind == "hub" and entry.hub == identifier) or (
            kind == "package" and entry.embedded == f"package:{identifier}"
        ):
            return entry
    return None
