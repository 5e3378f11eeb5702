"""``grid.toml``: models x profiles. Unknown keys are errors, names are unique, and paths are relative to the file."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from compress.errors import UsageError, did_you_mean
from compress.sizes import parse_size

#: More is no grid.
MAX_BYTES = 1 << 20
MAX_JOBS = 10_000
#: What a sweep writes beside its artifacts.
RESERVED = frozenset({"logs", "readme.md", "sweep.html", "sweep.json"})

Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,89}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class ModelEntry(_Strict):
    """A model, as ``compress export`` takes it; ``name`` is what its artifacts are called after."""

    model: Text
    adapter: Text | None = None
    revision: Text | None = None
    task: Text | None = None
    name: Name

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return _with_name(data, "model")


class ProfileEntry(_Strict):
    """A profile with its overrides, each ``KEY=VALUE``."""

    profile: Text
    overrides: Annotated[list[Text], Field(alias="set", max_length=100)] = []
    name: Name

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return _with_name(data, "profile")


class Exclusion(_Strict):
    """A pair that is left out; a side that is not given stands for all."""

    model: Text | None = None
    profile: Text | None = None


class Grid(_Strict):
    """A grid. ``retries`` counts the attempts after the first one."""

    models: Annotated[list[ModelEntry], Field(min_length=1, max_length=1000)]
    profiles: Annotated[list[ProfileEntry], Field(min_length=1, max_length=1000)]
    output: Text | None = None
    calibration_text: Text | None = None
    eval_text: Text | None = None
    eval_labels: Text | None = None
    seed: int = 0
    measure: Annotated[bool, Field(alias="validate")] = True
    max_memory: Text | int | None = None
    exclude: Annotated[list[Exclusion], Field(max_length=MAX_JOBS)] = []
    retries: Annotated[int, Field(ge=0, le=100)] = 1


@dataclass(frozen=True)
class Pair:
    """A model and a profile of the grid, under the name of their job."""

    name: str
    model: ModelEntry
    profile: ProfileEntry


@dataclass(frozen=True)
class Loaded:
    """A grid with its name and the directory that its paths are relative to."""

    grid: Grid
    name: str
    base: Path

    def path(self, given: str | None) -> Path | None:
        """Return a path of the grid."""
        return None if given is None else self.base / given

    def reference(self, model: str) -> str:
        """Return a model as it is opened: a path beside the grid, or what it says."""
        beside = self.base / model
        local = model.startswith((".", "/")) or model.endswith(".gguf") or beside.exists()
        return str(beside) if local and not model.startswith("package:") else model

    def profile(self, profile: str) -> str:
        """Return a profile as it is loaded."""
        return str(self.base / profile) if profile.endswith(".toml") else profile

    @property
    def max_memory(self) -> int | None:
        """Return the memory that the grid allows, in bytes."""
        given = self.grid.max_memory
        return parse_size(given) if isinstance(given, str) else given

    def pairs(self) -> list[Pair]:
        """Return the jobs, a model's after each other.

        Raises:
            UsageError: Two have the same name, one has a name that a sweep needs itself, an exclusion excludes nothing,
                or nothing is left.
        """
        grid = self.grid
        used: set[int] = set()
        found = []
        for model in grid.models:
            for profile in grid.profiles:
                out = {at for at, item in enumerate(grid.exclude) if _excludes(item, model, profile)}
                used |= out
                if not out:
                    found.append(Pair(f"{model.name}-{profile.name}", model, profile))
        for at, item in enumerate(grid.exclude):
            if at not in used:
                raise self._unused(item)
        if not found:
            raise UsageError("the grid excludes every pair", where=self.name, hint="take something out of exclude")
        if len(found) > MAX_JOBS:
            raise UsageError(f"the grid has {len(found):,} jobs, {MAX_JOBS:,} are the most", where=self.name)
        self._check_names(found)
        return found

    def _unused(self, item: Exclusion) -> UsageError:
        models = [name for model in self.grid.models for name in (model.name, model.model)]
        profiles = [name for profile in self.grid.profiles for name in (profile.name, profile.profile)]
        hint = "it names neither" if item.model is None and item.profile is None else "no pair has both"
        for given, known in ((item.model, models), (item.profile, profiles)):
            if given is not None and given not in known:
                hint = f"{given!r} is none of the grid: {did_you_mean(given, known)}"
                break
        return UsageError("an exclude leaves out nothing", where=self.name, hint=hint)

    def _check_names(self, pairs: list[Pair]) -> None:
        # Directories of some file systems do not tell upper from lower case.
        several = [name for name, count in Counter(pair.name.casefold() for pair in pairs).items() if count > 1]
        if several:
            both = [pair for pair in pairs if pair.name.casefold() == several[0]]
            told = " and ".join(f"{pair.model.model} under {pair.profile.profile}" for pair in both[:2])
            raise UsageError(
                f"two jobs are called {both[0].name!r}: {told}",
                where=self.name,
                hint='give one of them a name of its own: {model = "...", name = "..."} or {profile = "...", '
                'name = "..."}',
            )
        taken = next((pair.name for pair in pairs if pair.name.casefold() in RESERVED), None)
        if taken is not None:
            raise UsageError(f"a sweep needs the name {taken!r} itself", where=self.name, hint="give it another name")


def load_grid(given: str | Path | Mapping[str, Any]) -> Loaded:
    """Read a grid from a file, or take it as a mapping (whose paths are relative to the working directory).

    Raises:
        UsageError: The file is missing, too large, no TOML, or a key of it is wrong: with the nearest that exists.
    """
    if isinstance(given, Mapping):
        return _checked(dict(given), "the grid", Path())
    path = Path(given)
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"the grid cannot be read: {error.strerror}", where=str(path), hint=_EXAMPLE) from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"the grid has more than {MAX_BYTES >> 20} MiB", where=str(path))
    try:
        data = tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"not valid TOML: {error}", where=str(path)) from None
    return _checked(data, path.name, path.parent)


_EXAMPLE = 'a grid is a TOML file: models = ["smollm2"], profiles = ["arm-int4", "x86-int4"]'


def _checked(data: dict[str, Any], name: str, base: Path) -> Loaded:
    try:
        grid = Grid.model_validate(data)
    except ValidationError as error:
        raise _explain(error, name) from None
    loaded = Loaded(grid, name, base.resolve())
    loaded.pairs()
    if loaded.max_memory is not None and loaded.max_memory < 1:
        raise UsageError("max_memory must be more than nothing", where=name, hint='max_memory = "8GB"')
    return loaded


def _with_name(data: Any, key: str) -> Any:
    """Let an entry be its reference alone, and give it a name where it has none."""
    entry = {key: data} if isinstance(data, str) else data
    if isinstance(entry, dict) and "name" not in entry and isinstance(entry.get(key), str):
        last = Path(entry[key].rstrip("/")).name.removesuffix(".gguf").removesuffix(".toml")
        made = re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-")[:90].rstrip(".-")
        if made:
            entry = {**entry, "name": made}
    return entry


def _excludes(item: Exclusion, model: ModelEntry, profile: ProfileEntry) -> bool:
    if item.model is None and item.profile is None:
        return False
    return item.model in (None, model.name, model.model) and item.profile in (None, profile.name, profile.profile)


def _keys(location: Iterable[int | str]) -> list[str]:
    """Return the keys that exist at a place of the document."""
    kinds: dict[str, type[BaseModel]] = {"models": ModelEntry, "profiles": ProfileEntry, "exclude": Exclusion}
    kind = next((kinds[str(part)] for part in location if str(part) in kinds), Grid)
    return [field.alias or name for name, field in kind.model_fields.items()]


def _explain(error: ValidationError, where: str) -> UsageError:
    first = error.errors(include_url=False)[0]
    location = first["loc"]
    key = ".".join(str(part) for part in location) or "the grid"
    known = _keys(location[:-1])
    if first["type"] == "extra_forbidden":
        return UsageError(f"unknown key {key!r}", where=where, hint=did_you_mean(str(location[-1]), known))
    if first["type"] == "missing":
        return UsageError(f"{key!r} is missing", where=where, hint=_EXAMPLE if len(location) == 1 else _named(known))
    shown = first.get("input")
    got = f", got {shown!r}"[:200] if isinstance(shown, (int, float, str, bool)) else ""
    hint = _EXAMPLE if location and location[0] in ("models", "profiles") else _named(known)
    return UsageError(f"{key}: {first['msg']}{got}", where=where, hint=hint)


def _named(known: list[str]) -> str:
    return f"keys: {', '.join(known)}"
