"""The command that makes an artifact again, from what its report and its manifest say."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compress import catalog
from compress.errors import UsageError
from compress.profile import Profile, available_profiles, load_profile, parse_profile
from compress.report.model import DecoderDrift, EncoderDrift, Report, Source

#: Names of the texts that are used where no other is given (:func:`compress.validation.text.embedded`).
_EMBEDDED = re.compile(r"python-(?:[\w.+]+-)?language-reference/")


@dataclass(frozen=True)
class Reproduction:
    """A command, word by word and quoted for a shell, and what somebody who types it must know besides."""

    words: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """Return the command with an option a line."""
        lines: list[str] = []
        for word in self.words:
            if word.startswith("--") or not lines:
                lines.append(word)
            else:
                lines[-1] += f" {word}"
        return tuple(f"{line} \\" for line in lines[:-1]) + tuple(lines[-1:])


def reproduction(report: Report, record: Mapping[str, Any] | None = None) -> Reproduction | None:
    """Return how to make the artifact again, ``None`` where its report names no source or profile.

    Args:
        report: Its report.
        record: Its manifest, which also knows the seed; ``None`` where only the report is at hand.
    """
    if report.source is None or report.profile is None:
        return None
    notes: list[str] = []
    words = ["compress", "export", *_model(report.source, notes)]
    words += _profile(report.profile.name, report.profile.resolved, notes)
    drift = report.drift
    if isinstance(drift, EncoderDrift):
        words += ["--task", drift.task]
    words += _texts(report, record, notes)
    seed = (record or {}).get("seed")
    if isinstance(seed, int):
        words += ["--seed", str(seed)]
    else:
        notes.append("The seed is in manifest.json.")
    return Reproduction(tuple(word if word.startswith("--") else shlex.quote(word) for word in words), tuple(notes))


def _model(source: Source, notes: list[str]) -> Iterator[str]:
    if source.kind == "hub":
        yield source.identifier
        if source.revision:
            yield from ("--revision", source.revision)
    elif source.kind == "package":
        entry = catalog.of_source(source.kind, source.identifier)
        yield entry.name if entry else f"package:{source.identifier}"
        if source.revision:
            notes.append(f"The model is in version {source.revision} of the package {source.identifier.split('/')[0]}.")
    else:
        yield source.identifier
        notes.append("The model was a local one: write its path instead of its name.")
    if source.adapter:
        yield from ("--adapter", source.adapter)
        notes.append("The adapter was a local directory: write its path instead of its name.")


def _profile(name: str, resolved: Mapping[str, Any], notes: list[str]) -> Iterator[str]:
    yield "--profile"
    if name not in available_profiles():
        yield f"{name}.toml"
        notes.append(f"{name} is a profile of the user's own; all of it is in manifest.json.")
        return
    yield name
    overrides = overrides_of(name, resolved)
    if overrides is None:
        notes.append(f"The profile is not {name} as this version has it; all of it is in manifest.json.")
    for override in overrides or ():
        yield from ("--set", override)


def overrides_of(name: str, resolved: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the ``--set`` values that make a shipped profile the resolved one, ``None`` where none can."""
    try:
        wanted = parse_profile(resolved, where=name)
        found, had = (
            _flat(recipe.model_dump(mode="json", exclude_none=True)) for recipe in (wanted, load_profile(name))
        )
        found |= {key: "none" for key in had if key.startswith("budget.") and key not in found}
        made = tuple(f"{key}={_toml(value)}" for key, value in sorted(found.items()) if had.get(key) != value)
        again: Profile = load_profile(name, made)
    except (UsageError, TypeError):
        return None
    return made if again == wanted else None


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _toml(value: Any) -> str:
    """Return a value as TOML has it; JSON's text, lists and numbers are the same there."""
    return json.dumps(value, ensure_ascii=False)


def _texts(report: Report, record: Mapping[str, Any] | None, notes: list[str]) -> Iterator[str]:
    drift = report.drift
    names = []
    text = ((record or {}).get("calibration") or {}).get("text") or {}
    calibration: Any = report.calibration.name if report.calibration else text.get("name")
    wrote_itself = report.calibration is not None and report.calibration.source == "self"
    if isinstance(calibration, str) and not wrote_itself:
        names.append(("--calibration-text", calibration))
    if isinstance(drift, DecoderDrift | EncoderDrift):
        names.append(("--eval-text", drift.eval_text.name))
    if isinstance(drift, EncoderDrift) and drift.task_accuracy is not None:
        names.append(("--eval-labels", drift.task_accuracy.labels.name))
    given = [(option, name) for option, name in names if not _EMBEDDED.match(name)]
    if given:
        notes.append("Text files are named without their folders; their SHA-256 are in this report.")
    for option, name in given:
        yield from (option, name)
