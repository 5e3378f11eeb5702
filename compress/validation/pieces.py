"""What an encoder's drift is measured on: short texts of varied lengths, cut from running text and tokenized.

Texts are cut from paragraphs at the ends of sentences, one to eight sentences each, evenly spread over the whole text.
No two are alike, neither as text nor as tokens: a text's nearest other text would be its twin.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError, UsageError
from compress.source.files import MAX_CONFIG_BYTES, MAX_INDEX_BYTES, read_bytes, read_json_object
from compress.tokens import Tokenizer
from compress.validation.artifact import Artifact
from compress.validation.encoded import Encoded, pack
from compress.validation.text import Text

#: Sentences a text, in turn.
SENTENCES = (1, 2, 1, 4, 1, 3, 2, 8)
MINIMUM_TEXTS = 8
#: Tokens below which a text, or a pair of them, may have no words beside its special tokens.
MINIMUM_LENGTH = 8
#: Below this a piece is a heading or a fragment of a table.
MINIMUM_WORDS = 3
#: Of a fill-mask model's tokens; what BERT was trained with (Devlin et al., 2018).
MASKED_SHARE = 0.15
#: Every masked position is a distribution over the vocabulary on the disk.
MAX_MASKED = 1024

_END = re.compile(r"(?<=[.!?])\s+")
Pair = tuple[str, str | None]


@dataclass(frozen=True)
class Tokens:
    """One tokenized text: ids, ``token_type_ids``, which are special, and whether it was cut."""

    ids: list[int]
    types: list[int]
    special: list[bool]
    truncated: bool


def cut(content: str, count: int) -> list[str]:
    """Return at most ``count`` texts of ``content``; deterministic, distinct, none empty."""
    sizes = itertools.cycle(SENTENCES)
    seen: set[str] = set()
    found: list[str] = []
    for paragraph in content.split("\n\n"):
        sentences = _END.split(" ".join(paragraph.split()))
        start = 0
        while start < len(sentences):
            size = next(sizes)
            piece = " ".join(sentences[start : start + size])
            start += size
            key = piece.casefold()
            if len(piece.split()) >= MINIMUM_WORDS and any(map(str.isalpha, piece)) and key not in seen:
                seen.add(key)
                found.append(piece)
    if len(found) <= count:
        return found
    return [found[index] for index in np.linspace(0, len(found) - 1, count).round().astype(int)]


def drift_texts(text: Text, artifact: Artifact, *, count: int, max_length: int) -> Encoded:
    """Cut a text for the artifact's task and tokenize it: what both sides are run on.

    Question answering and every fourth text of a classifier are pairs: then both values of ``token_type_ids`` occur.
    Every fourth text is cut at half of ``max_length`` already: batches are padded also where all texts are too long.

    Args:
        text: Running text.
        artifact: Whose tokenizer, task and vocabulary.
        count: The most texts.
        max_length: Where texts are cut, in tokens, special tokens included.

    Raises:
        UsageError: The text is too short.
        CompressError: The tokenizer is missing, damaged, not this model's, or has no mask token where one is needed.
    """
    task = artifact.task
    pieces = cut(text.content, count + count // 3 if task == "text-classification" else count * _width(task))
    tokens = _tokenize_varied(_pairs(pieces, task)[:count], artifact, max_length)
    distinct = list({tuple(item.ids): item for item in tokens}.values())
    if len(distinct) < MINIMUM_TEXTS:
        raise UsageError(
            f"the text gives {len(distinct)} short texts, drift needs at least {MINIMUM_TEXTS}",
            where=text.name,
            hint="use a longer text",
        )
    if task == "fill-mask":
        return _masked(distinct, mask_id(artifact))
    keep = [[True] * len(item.ids) if task == "question-answering" else _content(item) for item in distinct]
    return pack(
        [item.ids for item in distinct],
        [item.types for item in distinct],
        keep,
        sum(item.truncated for item in distinct),
    )


def _tokenize_varied(texts: Sequence[Pair], artifact: Artifact, max_length: int) -> list[Tokens]:
    long = tokenize(texts, artifact, max_length)
    long[::4] = tokenize(texts[::4], artifact, min(max_length, max(MINIMUM_LENGTH, max_length // 2)))
    return long


def _width(task: str) -> int:
    return 2 if task == "question-answering" else 1


def _pairs(pieces: Sequence[str], task: str) -> list[Pair]:
    if task == "question-answering":
        return [(a, b) for a, b in zip(pieces[::2], pieces[1::2], strict=False)]
    if task != "text-classification":
        return [(piece, None) for piece in pieces]
    made: list[Pair] = []
    rest = iter(pieces)
    for piece in rest:
        made.append((piece, next(rest, None) if len(made) % 4 == 3 else None))
    return made


def _content(item: Tokens) -> list[bool]:
    """Return which tokens are the text's own; all of them where it has none."""
    own = [not special for special in item.special]
    return own if any(own) else [True] * len(own)


def _masked(items: Sequence[Tokens], mask: int) -> Encoded:
    """Hide about 15 % of each text's own tokens, at least one, until ``MAX_MASKED`` are hidden; seeded."""
    generator = np.random.default_rng(0)
    ids: list[list[int]] = []
    types: list[list[int]] = []
    keep: list[list[bool]] = []
    hidden = 0
    for item in items:
        own = np.flatnonzero(_content(item))
        chosen = generator.choice(own, max(1, round(MASKED_SHARE * len(own))), replace=False)
        if hidden + len(chosen) > MAX_MASKED and len(ids) >= MINIMUM_TEXTS:
            break
        hidden += len(chosen)
        flags = np.zeros(len(item.ids), bool)
        flags[chosen] = True
        ids.append(np.where(flags, mask, item.ids).tolist())
        types.append(item.types)
        keep.append(flags.tolist())
    return pack(ids, types, keep, sum(item.truncated for item in items[: len(ids)]))


def tokenize(texts: Sequence[Pair], artifact: Artifact, max_length: int) -> list[Tokens]:
    """Tokenize texts and pairs with the model's own special tokens, cut to ``max_length``.

    Raises:
        UsageError: ``max_length`` leaves no room beside the special tokens.
        CompressError: The tokenizer is missing, damaged, or not this model's.
    """
    path = artifact.directory / "tokenizer.json"
    encode = _with_tokenizers if path.is_file() else _with_transformers
    tokens = encode(texts, artifact.directory, max_length)
    if any(len(item.ids) > max_length or (item.truncated and all(item.special)) for item in tokens):
        raise UsageError(
            f"texts cut to {max_length} tokens have no room for words", hint=f"use at least {MINIMUM_LENGTH}"
        )
    largest = max((max(item.ids) for item in tokens if item.ids), default=0)
    if largest >= artifact.vocab_size:
        raise CompressError(
            f"the tokenizer gives id {largest}, the model's vocabulary has {artifact.vocab_size}",
            where=str(artifact.directory),
            hint="use the tokenizer that belongs to the model",
        )
    return tokens


def _with_tokenizers(texts: Sequence[Pair], directory: Path, max_length: int) -> list[Tokens]:
    fields = ("ids", "types", "special", "cut")
    with Tokenizer(path=directory / "tokenizer.json") as tokenizer:
        found = tokenizer.encode(texts, special=True, length=max_length, fields=fields)
    return [Tokens(item.ids, item.types, item.special, item.cut) for item in found]


def _with_transformers(texts: Sequence[Pair], directory: Path, max_length: int) -> list[Tokens]:
    from compress.validation.protocol import run_worker

    request = {"directory": str(directory), "texts": [], "pairs": list(texts), "max_length": max_length}
    (found,) = run_worker("tokenization", request, timeout=300)["results"]
    return [Tokens(*item) for item in found]


def mask_id(artifact: Artifact) -> int:
    """Return the id of the token that stands for a hidden one.

    Raises:
        CompressError: The tokenizer's files name none.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        entry = _json(artifact.directory / name).get("mask_token")
        token = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(token, str):
            found = _id_of(token, artifact.directory)
            if found is not None and found < artifact.vocab_size:
                return found
    raise CompressError(
        "the tokenizer names no mask token in the model's vocabulary",
        where=str(artifact.directory),
        hint="tokenizer_config.json should have mask_token",
    )


def _id_of(token: str, directory: Path) -> int | None:
    path = directory / "tokenizer.json"
    if path.is_file():
        with Tokenizer(path=path) as tokenizer:
            return tokenizer.vocabulary().get(token)
    vocabulary = directory / "vocab.txt"
    if not vocabulary.is_file():
        return None
    lines = read_bytes(vocabulary, MAX_INDEX_BYTES).decode("utf-8", "replace").splitlines()
    return next((index for index, line in enumerate(lines) if line == token), None)


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, MAX_CONFIG_BYTES)
    except CompressError:
        return {}
