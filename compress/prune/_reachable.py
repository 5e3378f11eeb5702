"""Which tokens a trimmed tokenizer must keep so that it still reads every text, and reaches every token it has.

BPE (Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016) applies, again and again, the
first merge of its list that a word has. If every merge that happened on a text is kept, the same ones happen again: at
each step what may happen is a part of what might have happened before, and the one that came first is still among it.
What happens inside a token's characters does not depend on what stands around them, since no merge crossed its ends.
So a token's path is what BPE does to that token alone, and a text's tokens together with their paths are closed.

WordPiece takes the longest piece that fits, Unigram (Kudo, "Subword Regularization", 2018) the most probable sequence
of pieces: both choose the same from fewer pieces, provided that what they chose is there. Two exceptions: a word that
WordPiece gave up on may be readable when a piece is missing that led astray; and Unigram's price of an unknown
character follows from the least probable piece, which is therefore kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from compress.prune._tokenizer_json import TokenizerFile

SPACE = "\u2581"
"""What stands for a space in SentencePiece's vocabularies."""
BYTE_PIECES = tuple(f"<0x{value:02X}>" for value in range(256))
LONGEST_PATH = 1024
"""Characters of a token whose path is followed; it takes quadratic time. Longer ones keep all their merges."""


def closed(file: TokenizerFile, used: Iterable[str]) -> set[str]:
    """Return ``used`` and all pieces without which those could not be reached."""
    if file.kind != "BPE":
        return set(used)
    return _MergePaths(file.merges, file.pieces).closed(used)


def alphabet(file: TokenizerFile) -> set[str]:
    """Return the pieces that are kept whatever the text, so that any text can be read.

    Single characters: a word of which every character is a piece stays readable. Pieces with a character that is none
    are kept, too; a word of them can still become unreadable where a longer piece before it now ends elsewhere, which
    no vocabulary made by a trainer allows, as trainers begin with the characters.

    BPE with ``byte_fallback`` and all 256 bytes needs no more characters than those that its decoder looks at.
    """
    pieces = file.pieces
    if file.kind == "WordPiece":
        return _wordpiece_alphabet(pieces, file.model.get("continuing_subword_prefix") or "")
    bytes_kept = {piece for piece in BYTE_PIECES if file.model.get("byte_fallback") and piece in pieces}
    singles = {piece for piece in pieces if len(piece) == 1}
    if file.kind == "Unigram":
        hard = {piece for piece in pieces if any(sign not in singles for sign in piece)}
        least = min(file.model["vocab"], key=lambda entry: entry[1])[0]
        return singles | hard | bytes_kept | {least}
    if len(bytes_kept) == len(BYTE_PIECES) and "ByteFallback" in set(_strings(file.document.get("decoder"))):
        plain = {chr(code) for code in range(128)} | {SPACE}
        for section in ("normalizer", "pre_tokenizer", "decoder"):
            plain.update(*_strings(file.document.get(section)))
        singles &= plain
    return singles | bytes_kept


def inside(words: Iterable[str], file: TokenizerFile) -> set[str]:
    """Return every piece that is a part of one of the words, as the model sees them."""
    pieces, longest = file.pieces, max(map(len, file.pieces))
    prefix = file.model.get("continuing_subword_prefix") or ""
    found: set[str] = set()
    for word in words:
        for start in range(len(word)):
            for stop in range(start + 1, min(len(word), start + longest) + 1):
                part = word[start:stop]
                found.update(piece for piece in (part, prefix + part) if piece in pieces)
    return found


def _wordpiece_alphabet(pieces: Mapping[str, int], prefix: str) -> set[str]:
    first = {piece for piece in pieces if len(piece) == 1}
    later = {piece for piece in pieces if len(piece) == len(prefix) + 1 and piece.startswith(prefix)}
    signs = {piece[len(prefix) :] for piece in later}

    def readable(piece: str) -> bool:
        if prefix and piece.startswith(prefix):
            return all(sign in signs for sign in piece[len(prefix) :])
        return piece[:1] in first and all(sign in signs for sign in piece[1:])

    return first | later | {piece for piece in pieces if not readable(piece)}


def _strings(value: Any) -> Iterator[str]:
    """Yield every string inside a section of the file (its depth is bounded)."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


class _MergePaths:
    """The merges of a BPE model, followed backwards."""

    def __init__(self, merges: Iterable[tuple[str, str]], pieces: Mapping[str, int]) -> None:
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._pieces = pieces
        self._makers: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for left, right in self._ranks:
            self._makers[left + right].append((left, right))

    def closed(self, used: Iterable[str]) -> set[str]:
        """Return the tokens and all on the way to them."""
        kept: set[str] = set()
        for token in used:
            path = self._path(token)
            if path is None:
                self._all_ways(token, kept)
            else:
                kept |= path
        return kept

    def _path(self, token: str) -> set[str] | None:
        """Return what BPE makes of a token's characters on the way to it, ``None`` where it does not get there.

        It need not: with ``ignore_merges`` a whole word that is in the vocabulary is taken at once, and characters
        outside the vocabulary are merged as bytes.
        """
        if len(token) > LONGEST_PATH:
            return None
        parts = list(token)
        seen = {token, *(part for part in parts if part in self._pieces)}
        while len(parts) > 1:
            pairs = ((self._ranks.get((parts[i], parts[i + 1])), i) for i in range(len(parts) - 1))
            known = [(rank, i) for rank, i in pairs if rank is not None]
            if not known:
                return None
            _, place = min(known)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
            seen.add(parts[place])
        return seen

    def _all_ways(self, token: str, kept: set[str]) -> None:
        """Add a token and the parts of every merge that gives it, and of those that give these."""
        todo = [token]
        kept.add(token)
        while todo:
            for pair in self._makers.get(todo.pop(), ()):
                todo += [part for part in pair if part not in kept]
                kept.update(pair)
