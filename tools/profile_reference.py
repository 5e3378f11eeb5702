"""Write docs/profiles.md from the profiles' files and their schema; ``--check`` exits 1 when it is stale."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from schema_tables import describe, is_model, table, write_or_check

from compress import profile as schema

PAGE = Path(__file__).resolve().parent.parent / "docs" / "profiles.md"
HEADER = """# Profiles

<!-- Written by tools/profile_reference.py (`make docs`) from profiles/*.toml and compress/profile.py. Do not edit. -->

A profile is the whole recipe of an artifact as data: what is stored how, for which provider and targets, what is
measured, and what may be lost. `compress profiles NAME` prints one, `--set KEY=VALUE` changes a key of it, and
`--profile my.toml` takes your own.
Which one to take: [choosing a profile](choosing.md).
"""


def overview(recipes: dict[str, schema.Profile]) -> str:
    """Return the table of all profiles."""
    lines = ["| profile | weights | activations | provider | targets | budget |", "|---|---|---|---|---|---|"]
    for name, recipe in recipes.items():
        targets = ", ".join(f"`{target}`" for target in recipe.targets) or "none"
        lines.append(
            f"| [`{name}`](#{name}) | {_weights(recipe.quantize)} | {_activations(recipe)} | `{recipe.provider}` | "
            f"{targets} | {_budget(recipe.budget)} |"
        )
    return "\n".join(lines)


def _weights(quantize: schema.Quantize) -> str:
    if quantize.bits == 32:
        return "not quantized"
    size = f"blocks of {quantize.block_size}" if quantize.activations == "none" else "a scale an output channel"
    zero = "" if quantize.symmetric or quantize.activations != "none" else ", zero points"
    found = f"{quantize.bits} bits, {size}{zero}"
    for roles, whose in ((quantize.roles, "some roles"), (quantize.decoder_roles, "of decoders some roles")):
        others = sorted({change.bits for change in roles.values() if change.bits not in (None, quantize.bits)})
        if others:
            found += f"; {whose} {' or '.join(str(bits) if bits != 32 else 'float' for bits in others)}"
    return found


def _activations(recipe: schema.Profile) -> str:
    if recipe.quantize.activation_bits is not None:
        return f"{recipe.quantize.activation_bits} bits, fixed ranges"
    return {"none": recipe.graph.float_type, "dynamic": "8 bits, ranges at run time", "static": "8 bits, fixed ranges"}[
        recipe.quantize.activations
    ]


def _budget(budget: schema.Budget) -> str:
    asked = budget.model_dump(exclude_none=True)
    return ", ".join(f"`{key}` {value:g}" for key, value in asked.items()) or "none"


def sections(recipes: dict[str, schema.Profile]) -> Iterator[str]:
    """Yield each profile with its file."""
    files = schema.available_profiles()
    for name, recipe in recipes.items():
        body = files[name].read_text(encoding="utf-8").strip()
        yield f"### {name}\n\n{recipe.description}\n\n```toml\n{body}\n```\n"


def page() -> str:
    """Return the page."""
    recipes = {name: schema.load_profile(name) for name in schema.available_profiles()}
    parts = [HEADER, overview(recipes), "", "## Each of them", "", "\n".join(sections(recipes)), "## Every key", ""]
    parts += ["### The profile", "", describe(schema.Profile), "", table(schema.Profile, nested=False), ""]
    for name, field in schema.Profile.model_fields.items():
        if is_model(field.annotation):
            parts += [f"### `[{name}]`", "", describe(field.annotation), "", table(field.annotation, f"{name}."), ""]
    parts += ["### SchemeOverride", "", describe(schema.SchemeOverride), "", table(schema.SchemeOverride), ""]
    return "\n".join(parts).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    return write_or_check(PAGE, page(), arguments, __doc__)


if __name__ == "__main__":
    raise SystemExit(main())
