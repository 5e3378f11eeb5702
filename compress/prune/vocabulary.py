"""Vocabulary trimming: rows of the token table that a domain's text never needs are dropped.

Mandatory companions of the rows are the tokenizer's files and the ids in the configs, which are rewritten with them; a
kept token's embedding and logit stay what they were. What is promised of the trimmed tokenizer:

- The text that it was chosen from gives the same tokens as before, under their new ids. That is checked each time.
- Any other text that could be read still can be, perhaps with more tokens (:mod:`compress.prune._reachable`).

Kept besides the text's tokens: special and added tokens, ids that a config names, the alphabet, what the tokens are
merged from, and the words that a chat template writes, as those are in every prompt of a chat.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.errors import CompressError, SourceError, UsageError
from compress.prune._reachable import alphabet, closed, inside
from compress.prune._tokenizer_companions import (
    GENERATION_NAME,
    SPECIAL_NAME,
    decoder_entries,
    ids_in,
    named_ids,
    names_id,
    read_optional,
    template_words,
)
from compress.prune._tokenizer_convert import with_tokenizer_json
from compress.prune._tokenizer_json import TOKENIZER_NAME, TokenizerFile, load_backend, read_tokenizer, renumbered
from compress.source.base import TOKENIZER_NAMES
from compress.source.files import contained

MINIMUM_TOKENS = 1000
"""A vocabulary chosen from fewer would be that of a few paragraphs."""


@dataclass(frozen=True)
class Coverage:
    """What a trimmed vocabulary holds of the text that it was chosen from.

    Attributes:
        tokens: How many tokens the text has, as the source's tokenizer reads it.
        distinct: How many different ones.
        kept_tokens: How many of ``tokens`` are kept as they are; all of them at a minimum count of 1.
        kept_distinct: How many of ``distinct`` are kept.
    """

    tokens: int
    distinct: int
    kept_tokens: int
    kept_distinct: int

    @property
    def share(self) -> float:
        """Return what part of the text's tokens is kept as it is, 0 to 1; the others are spelt with more tokens."""
        return self.kept_tokens / self.tokens


@dataclass(frozen=True)
class Trimmed:
    """A choice of token ids.

    Attributes:
        kept: int64 ``[kept]``: old ids, ascending; a token's new id is its position here. These are the rows to keep of
            the token table and of the head.
        vocab_size: Rows that the source's table has. Rows that belong to no token are not kept, unless a config names
            them.
        coverage: What it holds of the text.
    """

    kept: npt.NDArray[np.int64]
    vocab_size: int
    coverage: Coverage

    def new_ids(self) -> dict[int, int]:
        """Return the new id by old id."""
        return {int(old): new for new, old in enumerate(self.kept)}


def choose(
    directory: Path, text: str, *, minimum_count: int = 1, vocab_size: int, config: Mapping[str, Any]
) -> Trimmed:
    """Choose the tokens that a text needs, with those that a tokenizer cannot do without.

    Args:
        directory: Where the tokenizer's files are, ``generation_config.json`` and the chat template too.
        text: Text of the domain; read at once, so some tens of MB at most.
        minimum_count: A token that the text has less often is spelt with others, unless it is kept for another reason.
        vocab_size: Rows of the model's token table.
        config: The model's config; ids that it names are kept.

    Raises:
        UsageError: The text has too few tokens, or the minimum count makes no sense.
        SourceError: The tokenizer is missing, damaged, or not this model's.
        UnsupportedModelError: Tokenizers of this kind cannot be trimmed.
    """
    if minimum_count < 1:
        raise UsageError(f"a minimum count of {minimum_count} makes no sense", hint="1 keeps every token of the text")
    with with_tokenizer_json(directory) as made:
        file = read_tokenizer(made)
    return _choose(file, directory, text, minimum_count, vocab_size, config)


def _choose(
    file: TokenizerFile, directory: Path, text: str, minimum_count: int, vocab_size: int, config: Mapping[str, Any]
) -> Trimmed:
    backend = file.backend()
    counts = Counter(backend.ids(text))
    total = counts.total()
    if total < MINIMUM_TOKENS:
        raise UsageError(
            f"a vocabulary cannot be chosen from {total} tokens, {MINIMUM_TOKENS} are the least",
            where="prune.vocabulary",
            hint="give a longer text of the domain with --calibration-text",
        )
    tokens = file.tokens()
    named = named_ids(file, directory, config)
    beyond = [
        token for token, number in tokens.items() if number >= vocab_size and (number in counts or number in named)
    ]
    if beyond:
        raise SourceError(
            f"the token {beyond[0]!r:.80} has id {tokens[beyond[0]]}, the model's vocabulary has {vocab_size}",
            where=str(directory),
            hint="use the tokenizer that belongs to the model",
        )
    of_id = {number: token for token, number in tokens.items()}
    frequent = {of_id[number] for number, count in counts.items() if count >= minimum_count}
    for words in template_words(directory):
        frequent.update(of_id[number] for number in backend.ids(words))
    pieces = closed(file, frequent) | alphabet(file)
    fixed = {number for number in named if number < vocab_size}
    kept = fixed | {tokens[piece] for piece in pieces if tokens[piece] < vocab_size}
    if minimum_count == 1:
        kept = _until_equal(file, text, kept, vocab_size)
    here = [count for number, count in counts.items() if number in kept]
    coverage = Coverage(total, len(counts), sum(here), len(here))
    return Trimmed(np.array(sorted(kept), np.int64), vocab_size, coverage)


def lengths(directory: Path, trimmed: Trimmed, text: str) -> tuple[int, int]:
    """Return how many tokens a text has before and after trimming: what trimming costs on text it was not chosen from.

    Raises:
        CompressError: As :func:`choose` does.
    """
    with with_tokenizer_json(directory) as made:
        file = read_tokenizer(made)
    after = load_backend(renumbered(file, trimmed.new_ids()), TOKENIZER_NAME)
    before, less = (each.ids(text) for each in (file.backend(), after))
    return len(before), len(less)


def _until_equal(file: TokenizerFile, text: str, kept: set[int], vocab_size: int) -> set[int]:
    """Return ``kept`` with what it takes that the text gives the same tokens.

    Rules leave one case over: a word that WordPiece gives up on. Where it could now be read, its parts are kept.
    """
    tokens = file.tokens()
    while words := differing_words(file, text, kept):
        more = {tokens[piece] for piece in closed(file, inside(words, file))}
        more = {number for number in more if number < vocab_size} - kept
        if not more:
            raise CompressError(
                f"the trimmed tokenizer reads {words[0]!r:.80} differently",
                where=file.label,
                hint="leave prune.vocabulary out",
            )
        kept = kept | more
    return kept


def differing_words(file: TokenizerFile, text: str, kept: set[int]) -> list[str]:
    """Return the words, as the model sees them, that give other tokens when only ``kept`` are left; sorted."""
    order = {old: new for new, old in enumerate(sorted(kept))}
    before = file.backend()
    after = load_backend(renumbered(file, order), file.label)
    fields = ("ids", "offsets", "words")
    old, new = (each.encode([(text, None)], fields=fields)[0] for each in (before, after))
    if [order.get(number) for number in old.ids] == new.ids:
        return []
    found: dict[int, list[list[int | None]]] = {}
    places: dict[int, tuple[int, int]] = {}
    for side, ids, words in ((0, [order.get(i) for i in old.ids], old.words), (1, new.ids, new.words)):
        for number, word in zip(ids, words, strict=True):
            found.setdefault(-1 if word is None else word, [[], []])[side].append(number)
    for (start, stop), word in zip(old.offsets, old.words, strict=True):
        key = -1 if word is None else word
        first, last = places.get(key, (start, stop))
        places[key] = (min(first, start), max(last, stop))
    regions = {text[slice(*places[word])] for word, (was, is_) in found.items() if was != is_ and word in places}
    return sorted({piece for region in regions for piece in before.split(region)})


# ------------------------------------------------------------------------------------------------------- rewriting


def rewrite_config(config: Mapping[str, Any], trimmed: Trimmed) -> dict[str, Any]:
    """Return a model's config with the new ``vocab_size`` and ids.

    Raises:
        CompressError: It names an id that is not kept: not the config that the ids were chosen with.
    """
    return {**_with_new_ids(config, trimmed), "vocab_size": len(trimmed.kept)}


def _with_new_ids(config: Mapping[str, Any], trimmed: Trimmed) -> dict[str, Any]:
    """Renumber every ``*_token_id`` and the lists of tokens that generation avoids."""
    new_ids = trimmed.new_ids()

    def renumber(key: str, old: Any) -> Any:
        # What lies outside the table (-1: none; a default that was never looked at) means as little as before.
        if old not in ids_in(old) or old >= trimmed.vocab_size:
            return old
        if old not in new_ids:
            raise CompressError(f"{key} names token {old}, which is not kept", hint="choose the tokens again")
        return new_ids[old]

    changed = dict(config)
    for key, value in config.items():
        if names_id(key):
            changed[key] = [renumber(key, old) for old in value] if isinstance(value, list) else renumber(key, value)
        elif key in ("suppress_tokens", "begin_suppress_tokens") and isinstance(value, list):
            changed[key] = [new_ids[old] for old in ids_in(value) if old in new_ids]
        elif key == "bad_words_ids" and isinstance(value, list):
            words = [ids_in(word) for word in value]
            changed[key] = [[new_ids[old] for old in word] for word in words if all(old in new_ids for old in word)]
            changed[key] = changed[key] or None
    return changed


def write_tokenizer(directory: Path, trimmed: Trimmed, output: Path) -> tuple[str, ...]:
    """Write the tokenizer's files and ``generation_config.json``, as :func:`rewrite_tokenizer` makes them.

    Args:
        directory: Where the source's are.
        trimmed: From :func:`choose` on the same directory.
        output: An existing directory; none of these files may be there already.

    Returns:
        The names written, sorted.

    Raises:
        CompressError: As :func:`rewrite_tokenizer`.
    """
    files = rewrite_tokenizer(directory, trimmed)
    for name, content in files.items():
        with (output / name).open("xb") as stream:
            stream.write(content)
    return tuple(sorted(files))


def rewrite_tokenizer(directory: Path, trimmed: Trimmed) -> dict[str, bytes]:
    """Return the tokenizer's files and ``generation_config.json`` with the new ids, by name.

    A file of the source's tokenizer (:data:`compress.source.base.TOKENIZER_NAMES`) that is not among them must not be
    copied: ``tokenizer.model`` and ``spiece.model`` cannot be rewritten, and ``tokenizer.json`` says the same.

    Raises:
        SourceError: The tokenizer is missing, damaged, or cannot be renumbered.
        UnsupportedModelError: Tokenizers of this kind cannot be trimmed.
        CompressError: A file names an id that is not kept.
    """
    new_ids = trimmed.new_ids()
    present = {name for name in (*TOKENIZER_NAMES, GENERATION_NAME) if (directory / name).is_file()}
    with with_tokenizer_json(directory) as made:
        file = read_tokenizer(made)
        tokenizer_config = read_optional(made, "tokenizer_config.json") or read_optional(
            directory, "tokenizer_config.json"
        )
    document = renumbered(file, new_ids)
    files: dict[str, Any] = {TOKENIZER_NAME: document}
    if tokenizer_config:
        files["tokenizer_config.json"] = _tokenizer_config(tokenizer_config, new_ids)
    if GENERATION_NAME in present:
        files[GENERATION_NAME] = _with_new_ids(read_optional(directory, GENERATION_NAME), trimmed)
    if "added_tokens.json" in present:
        tokens = file.tokens()
        listed = [token for token in read_optional(directory, "added_tokens.json") if token in tokens]
        files["added_tokens.json"] = {token: new_ids[tokens[token]] for token in listed if tokens[token] in new_ids}
    written = {name: (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode() for name, value in files.items()}
    if SPECIAL_NAME in present:
        written[SPECIAL_NAME] = contained(directory, SPECIAL_NAME).read_bytes()
    return written | _plain_vocabulary(document, file, present)


def _tokenizer_config(config: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    changed = dict(config)
    if "added_tokens_decoder" in config:
        entries = {int(old): entry for old, entry in decoder_entries(config).items() if re.fullmatch(r"\d{1,9}", old)}
        changed["added_tokens_decoder"] = {str(new_ids[old]): entries[old] for old in sorted(entries) if old in new_ids}
    return changed


def _plain_vocabulary(document: Mapping[str, Any], file: TokenizerFile, present: set[str]) -> dict[str, bytes]:
    """Return ``vocab.txt``, or ``vocab.json`` and ``merges.txt``, if they were there and can say the same."""
    vocab = document["model"]["vocab"]
    if file.kind == "WordPiece" and "vocab.txt" in present:
        # A line's number is its token's id.
        whole = list(vocab.values()) == list(range(len(vocab))) and not any("\n" in token for token in vocab)
        return {"vocab.txt": ("\n".join(vocab) + "\n").encode()} if whole else {}
    if file.kind == "BPE" and {"vocab.json", "merges.txt"} <= present:
        merges = [entry.split(" ") if isinstance(entry, str) else entry for entry in document["model"]["merges"]]
        if any(re.search(r"\s", part) for pair in merges for part in pair):
            return {}
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        plain = json.dumps(vocab, ensure_ascii=False)
        return {"vocab.json": plain.encode(), "merges.txt": ("\n".join(lines) + "\n").encode()}
    return {}
