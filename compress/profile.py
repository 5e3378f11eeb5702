"""Profiles: the whole recipe of an artifact as data, validated once and strictly.

A profile is a TOML file; unknown keys are errors that name the fix. ``--set quantize.block_size=64`` overrides one key
after the file was read, through the same schema.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress.contracts import Role, ScaleFormat, Scheme
from compress.errors import UsageError, did_you_mean

_MAX_PROFILE_BYTES = 256 * 1024


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class SchemeOverride(_Strict):
    """What a role changes of the profile's scheme; an absent key keeps the profile's value, ``bits = 32`` is float."""

    bits: Literal[2, 4, 8, 32] | None = None
    block_size: int | None = None
    symmetric: bool | None = None


class Quantize(_Strict):
    """How weights are stored. ``bits = 32`` means float32: no quantization at all."""

    algorithm: str = "rtn"
    bits: Literal[2, 4, 8, 32] = 4
    block_size: int = 32
    symmetric: bool = True
    accuracy_level: Literal[0, 1, 4] = 4
    scale_format: ScaleFormat = "float32"
    importance: Literal["random-tokens", "none"] = "random-tokens"
    roles: dict[Role, SchemeOverride] = Field(default_factory=dict)

    def scheme(self, role: Role) -> Scheme | None:
        """Return the scheme of a role, ``None`` where it stays float32."""
        change = self.roles.get(role, SchemeOverride())
        bits = self.bits if change.bits is None else change.bits
        if bits == 32:
            return None
        return Scheme(
            bits=bits,
            block_size=self.block_size if change.block_size is None else change.block_size,
            symmetric=self.symmetric if change.symmetric is None else change.symmetric,
        )


class Graph(_Strict):
    """Shape of the graph.

    ``logits_to_keep`` is the default of the optional graph input of that name: 0 computes the head for every position,
    k for the last k only.
    """

    logits_to_keep: int = Field(default=0, ge=0)


class Validation(_Strict):
    """How much is measured; lengths are tokens."""

    tokens: int = Field(default=2048, ge=16)
    window: int = Field(default=512, ge=8)
    prompt_tokens: int = Field(default=128, ge=1)
    new_tokens: int = Field(default=32, ge=2)
    repeats: int = Field(default=3, ge=1, le=100)
    baselines: tuple[Literal["pytorch", "onnx_float"], ...] = ("pytorch", "onnx_float")


class Budget(_Strict):
    """What the artifact must keep; an absent number is not checked."""

    max_kl: float | None = Field(default=None, gt=0)
    min_top1_agreement: float | None = Field(default=None, ge=0, le=1)
    max_perplexity_ratio: float | None = Field(default=None, gt=0)
    min_speedup_vs_pytorch: float | None = Field(default=None, gt=0)
    min_speedup_vs_onnx_float: float | None = Field(default=None, gt=0)
    max_bytes: float | None = Field(default=None, gt=0)


class Profile(_Strict):
    """A named recipe: what is stored how, for which provider and targets, and what may be lost."""

    name: str
    description: str
    provider: str = "cpu"
    targets: tuple[str, ...] = ("genai",)
    quantize: Quantize = Field(default_factory=Quantize)
    graph: Graph = Field(default_factory=Graph)
    validation: Validation = Field(default_factory=Validation)
    budget: Budget = Field(default_factory=Budget)

    @model_validator(mode="after")
    def _window_fits(self) -> Profile:
        if self.validation.window > self.validation.tokens:
            raise ValueError("validation.window is longer than validation.tokens; lower it or measure more tokens")
        return self


def profile_directories() -> list[Path]:
    """Return where profiles are looked for: inside the wheel, or the top-level folder of a checkout."""
    here = Path(__file__).resolve().parent
    return [path for path in (here / "_profiles", here.parent / "profiles") if path.is_dir()]


def available_profiles() -> dict[str, Path]:
    """Return every shipped profile's file by name, sorted by name."""
    found: dict[str, Path] = {}
    for directory in profile_directories():
        for path in directory.glob("*.toml"):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def load_profile(name: str, overrides: Iterable[str] = ()) -> Profile:
    """Read a profile by name or by the path of a ``.toml`` file and apply ``KEY=VALUE`` overrides.

    Raises:
        UsageError: No such profile, not valid TOML, an unknown key, or a value that does not fit.
    """
    path = Path(name) if name.endswith(".toml") else available_profiles().get(name)
    if path is None or not path.is_file():
        raise UsageError(f"no profile is named {name!r}", hint=did_you_mean(name, available_profiles()))
    if path.stat().st_size > _MAX_PROFILE_BYTES:
        raise UsageError("the profile is larger than any profile can be", where=str(path))
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"not valid TOML: {error}", where=str(path)) from None
    for override in overrides:
        _apply(data, override)
    return parse_profile(data, where=path.name)


def parse_profile(data: Mapping[str, Any], *, where: str) -> Profile:
    """Validate a profile's content.

    Raises:
        UsageError: With the key, what was wrong with it and the nearest key that exists.
    """
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise _explain(error, where) from None


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one dotted key; the value is read as TOML, and as a bare string where it is not."""
    key, separator, text = override.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not separator or not all(path):
        raise UsageError(f"--set {override!r} is not KEY=VALUE", hint="--set quantize.block_size=64")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    target: Any = data
    for part in path[:-1]:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise UsageError(f"--set {override!r}: {part!r} is a value, not a table of keys")
    target[path[-1]] = value


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Profile
    for part in location:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            # Below `roles` every key is a role and every value a SchemeOverride.
            return sorted(SchemeOverride.model_fields)
        model = field.annotation
    return sorted(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _explain(error: ValidationError, where: str) -> UsageError:
    first = error.errors()[0]
    location = tuple(part for part in first["loc"] if part != "[key]")
    key = ".".join(str(part) for part in location) or "the profile"
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(str(location[-1]), _fields_at(location[:-1]))
        return UsageError(f"unknown key {key!r}", where=where, hint=hint)
    shown = first.get("input")
    got = f", got {shown!r}" if isinstance(shown, (int, float, str, bool)) else ""
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    return UsageError(f"{key}: {first['msg']}{got}{more}", where=where, hint="compress profiles NAME shows a valid one")
