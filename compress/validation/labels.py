"""The user's labelled examples: ``--eval-labels FILE.jsonl``, one JSON object a line, checked strictly.

What a line holds depends on the task:

- text-classification: ``{"text": ..., "label": ...}``, and ``"text_pair"`` where the model reads two texts. A label is
  a name in the config's ``id2label`` or its number;
- text-classification with one output (a score): ``{"text_a": ..., "text_b": ..., "score": ...}``, or ``"text"`` alone;
- embedding: ``{"text_a": ..., "text_b": ..., "score": ...}``, graded similarity: the metric is the rank correlation of
  cosine and score. Or ``{"text": ..., "label": ...}`` with labels of any name: the metric is how often a text's nearest
  other text has its label (with two texts a label this is retrieval, recall at 1).

Other fields are ignored, unless they look like a misspelt one of these. All lines have the same form. An empty line,
a line that is not such an object, an empty text, a label the model does not have: each is an error with its number.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from compress.errors import SourceError, UsageError, did_you_mean
from compress.source.files import open_regular, unique_keys
from compress.validation.artifact import Artifact

MINIMUM_EXAMPLES = 10
MAX_EXAMPLES = 100_000
MAX_LINE_BYTES = 1 << 20

Kind = Literal["class", "score", "neighbour"]
_FIELDS = ("text", "text_pair", "label", "text_a", "text_b", "score")


@dataclass(frozen=True)
class Example:
    """One line: a text, perhaps a second one, and what is right: a class index, a group, or a score."""

    text: str
    other: str | None
    truth: float


@dataclass(frozen=True)
class Labels:
    """A labels file.

    Attributes:
        name: Its name, without a path.
        sha256: Its digest (hexadecimal).
        kind: What ``truth`` is: ``class`` an index of the model's labels, ``neighbour`` a number for each distinct
            label, ``score`` a score.
        examples: The lines in order, at least ``MINIMUM_EXAMPLES``.
    """

    name: str
    sha256: str
    kind: Kind
    examples: tuple[Example, ...]


def read_labels(path: Path, artifact: Artifact) -> Labels:
    """Read and check a labels file for an artifact; see :func:`read_examples`."""
    return read_examples(path, artifact.task, artifact.config)


def read_examples(path: Path, task: str, config: Mapping[str, Any]) -> Labels:
    """Read and check a labels file for a model's task, of which only the config is needed.

    Raises:
        UsageError: With the line's number, what is wrong, and what would be right.
    """
    _check_task(path, task, config)
    names = label_names(config)
    kind: Kind | None = None
    examples: list[Example] = []
    groups: dict[str, int] = {}
    digest = hashlib.sha256()
    for number, line in _lines(path):
        digest.update(line)
        record = _record(path, number, line)
        found = _kind_of(path, number, record, task, kind, names)
        if kind is not None and found != kind:
            _refuse(path, number, "this line has another form than the lines before", "give all lines the same fields")
        kind = found
        if kind == "score":
            examples.append(_scored(path, number, record, pair=task == "embedding"))
        else:
            examples.append(_labelled(path, number, record, kind, names, groups))
        if len(examples) > MAX_EXAMPLES:
            _refuse(path, number, f"there are more than {MAX_EXAMPLES} examples", "give a sample of them")
    if kind is None or len(examples) < MINIMUM_EXAMPLES:
        _refuse(
            path, len(examples), f"the file ends after {len(examples)} examples", f"give {MINIMUM_EXAMPLES} or more"
        )
    _check_variety(path, kind, examples)
    return Labels(path.name, digest.hexdigest(), kind, tuple(examples))


def _check_task(path: Path, task: str, config: Mapping[str, Any]) -> None:
    """Refuse what has no metric here; better than a number that means something else."""
    what = None
    if task not in ("embedding", "text-classification"):
        what = f"labelled examples of {task} are not evaluated"
    elif task == "text-classification" and config.get("problem_type") == "multi_label_classification":
        what = "labelled examples of a model that gives a text several labels are not evaluated"
    if what is not None:
        raise UsageError(what, where=str(path), hint="leave out --eval-labels; drift is measured without labels")


def label_names(config: Mapping[str, Any]) -> list[str] | None:
    """Return a classifier's label names in order, ``None`` where its config names none."""
    table = config.get("id2label")
    if not isinstance(table, Mapping) or not table:
        count = config.get("num_labels", config.get("_num_labels"))
        return [f"LABEL_{index}" for index in range(count)] if isinstance(count, int) and 0 < count < 1 << 20 else None
    try:
        ordered = {int(key): str(value) for key, value in table.items()}
    except ValueError:
        return None
    return [ordered[index] for index in range(len(ordered))] if sorted(ordered) == list(range(len(ordered))) else None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with io.BufferedReader(open_regular(path, str(path))) as stream:
            for number in range(1, MAX_EXAMPLES + 3):
                line = stream.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                if len(line) > MAX_LINE_BYTES:
                    _refuse(path, number, "the line is longer than a megabyte", "one JSON object a line, JSON Lines")
                yield number, line
    except SourceError as error:
        raise UsageError(f"the labels cannot be read: {error.what}", where=error.where, hint=error.hint) from error
    except OSError as error:
        raise UsageError(f"the labels cannot be read: {error.strerror}", where=str(path)) from error


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        _refuse(path, number, f"the line is not UTF-8 (byte {error.start})", "convert the file to UTF-8")
    if not text.strip():
        _refuse(path, number, "the line is empty", "delete it")
    try:
        record = json.loads(
            text,
            parse_constant=lambda name: _refuse(path, number, f"{name} is not JSON", "a number"),
            object_pairs_hook=unique_keys,
        )
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
        _refuse(path, number, f"the line is not JSON: {reason}", 'one object a line: {"text": "...", "label": "..."}')
    if not isinstance(record, dict):
        _refuse(path, number, "the line is not a JSON object", 'one object a line: {"text": "...", "label": "..."}')
    for field in record:
        near = difflib.get_close_matches(field, _FIELDS, n=1, cutoff=0.8)
        if field not in _FIELDS and near and near[0] not in record:
            _refuse(path, number, f"unknown field {field[:40]!r}", f"did you mean {near[0]!r}? rename or remove it")
    return record


def _kind_of(
    path: Path, number: int, record: Mapping[str, Any], task: str, kind: Kind | None, names: list[str] | None
) -> Kind:
    """Return what a line's truth is, from the task and the fields it has."""
    scored = "score" in record or "text_a" in record or "text_b" in record
    if task == "embedding":
        return "score" if scored or (kind == "score" and "label" not in record) else "neighbour"
    if names is not None and len(names) == 1:
        return "score"
    if scored:
        _refuse(
            path,
            number,
            "this model gives labels, not scores",
            'lines for it: {"text": "...", "label": "..."}, with "text_pair" for a second text',
        )
    return "class"


def _scored(path: Path, number: int, record: Mapping[str, Any], *, pair: bool) -> Example:
    if pair or "text_a" in record or "text_b" in record:
        first, second = (_text(path, number, record, field) for field in ("text_a", "text_b"))
        return Example(first, second, _score(path, number, record))
    other = _text(path, number, record, "text_pair") if record.get("text_pair") is not None else None
    return Example(_text(path, number, record, "text"), other, _score(path, number, record))


def _labelled(
    path: Path, number: int, record: Mapping[str, Any], kind: Kind, names: list[str] | None, groups: dict[str, int]
) -> Example:
    text = _text(path, number, record, "text")
    other_text = _text(path, number, record, "text_pair") if record.get("text_pair") is not None else None
    label = record["label"] if "label" in record else _missing(path, number, "label", record)
    if kind == "neighbour":
        if other_text is not None:
            _refuse(path, number, "an embedding is of one text", 'pairs are {"text_a", "text_b", "score"}')
        if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
            _refuse(path, number, "label is neither a name nor a number", "give a string or an integer")
        return Example(text, None, float(groups.setdefault(str(label), len(groups))))
    return Example(text, other_text, float(_class(path, number, label, names)))


def _text(path: Path, number: int, record: Mapping[str, Any], field: str) -> str:
    value = record[field] if field in record else _missing(path, number, field, record)
    if not isinstance(value, str):
        _refuse(path, number, f"{field} is {_type(value)}, not a text", "give a string")
    if not value.strip():
        _refuse(path, number, f"{field} is empty", "give a text, or delete the line")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        _refuse(path, number, f"{field} has half of a surrogate pair", "write the character itself, in UTF-8")
    return value


def _score(path: Path, number: int, record: Mapping[str, Any]) -> float:
    value = record["score"] if "score" in record else _missing(path, number, "score", record)
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(path, number, f"score is {_type(value)}, not a number", "give a number")
    try:
        score = float(value)
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        _refuse(path, number, "score is not finite", "give a number")
    return score


def _class(path: Path, number: int, label: object, names: list[str] | None) -> int:
    if names is None:
        _refuse(path, number, "the model's config names no labels", "id2label in config.json says what they are")
    if isinstance(label, int) and not isinstance(label, bool):
        if not 0 <= label < len(names):
            _refuse(path, number, f"label {label} is none of the model's {len(names)}", f"0 to {len(names) - 1}")
        return label
    if not isinstance(label, str):
        _refuse(path, number, f"label is {_type(label)}", "give a label's name or its number")
    if label not in names:
        _refuse(path, number, f"label {label[:80]!r} is none of the model's", did_you_mean(label[:80], names[:100]))
    return names.index(label)


def _check_variety(path: Path, kind: Kind, examples: list[Example]) -> None:
    truths = Counter(example.truth for example in examples)
    if kind == "score" and len(truths) < 2:
        raise UsageError("all scores are the same", where=str(path), hint="a rank correlation needs different ones")
    if kind == "neighbour" and (len(truths) < 2 or max(truths.values()) < 2):
        raise UsageError(
            "no two texts have the same label, or all have" if len(truths) > 1 else "all texts have the same label",
            where=str(path),
            hint="give several texts of several labels",
        )


def _missing(path: Path, number: int, field: str, record: Mapping[str, Any]) -> NoReturn:
    has = ", ".join(sorted(record)[:8]) or "none"
    _refuse(path, number, f"the field {field!r} is missing", f"add it; the line has: {has[:120]}")


def _type(value: object) -> str:
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")


def _refuse(path: Path, number: int, what: str, hint: str) -> NoReturn:
    raise UsageError(f"line {number}: {what}", where=str(path), hint=hint)
