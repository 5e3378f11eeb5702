"""Trimming of random tokenizers, merges in any order and pieces that no trainer would have made."""

from __future__ import annotations

import string
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_tokenizers import BYTES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from compress.prune import _reachable, vocabulary
from compress.prune.vocabulary import choose, rewrite_tokenizer

SIGNS = "abc"
texts = st.text(SIGNS + " ", min_size=1, max_size=40).filter(str.strip)
several = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def both(
    tokenizer: Tokenizer, chosen_from: str, *, mend: bool = False, **options: Any
) -> tuple[Tokenizer, Tokenizer, list[int]]:
    """Return the tokenizer read again, the trimmed one, and what was kept; the rules must do, unless ``mend``."""
    mending = patch.object(vocabulary, "inside", vocabulary.inside if mend else lambda words, file: set())
    with tempfile.TemporaryDirectory() as name, patch.object(vocabulary, "MINIMUM_TOKENS", 1), mending:
        directory = Path(name)
        tokenizer.save(str(directory / "tokenizer.json"))
        source = Tokenizer.from_file(str(directory / "tokenizer.json"))
        trimmed = choose(directory, chosen_from, vocab_size=1 << 20, config={}, **options)
        files = rewrite_tokenizer(directory, trimmed)
    return source, Tokenizer.from_str(files["tokenizer.json"].decode()), trimmed.kept.tolist()


@st.composite
def bpe(draw: st.DrawFn, fallback: bool = False) -> Tokenizer:
    """Draw merges of what is there already, then shuffle them: ranks that no training gives."""
    pieces = [*SIGNS, " "]
    merges: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(0, 14))):
        left, right = draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces))
        if (left, right) not in merges and len(left + right) <= 8:
            merges.append((left, right))
            pieces += [left + right] if left + right not in pieces else []
    merges = draw(st.permutations(merges))
    vocab = {
        piece: number for number, piece in enumerate(draw(st.permutations([*(BYTES if fallback else ()), *pieces])))
    }
    model = models.BPE(
        vocab, merges, byte_fallback=fallback, ignore_merges=draw(st.booleans()), fuse_unk=draw(st.booleans())
    )
    tokenizer = Tokenizer(model)
    if draw(st.booleans()):
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@several
@given(bpe(), texts, texts)
def test_bpe(tokenizer: Tokenizer, chosen_from: str, other: str) -> None:
    source, trimmed, kept = both(tokenizer, chosen_from)
    assert [kept[number] for number in trimmed.encode(chosen_from).ids] == source.encode(chosen_from).ids
    assert trimmed.decode(trimmed.encode(other).ids) == source.decode(source.encode(other).ids) == other


@several
@given(bpe(fallback=True), texts, st.text(max_size=20))
def test_bpe_with_bytes(tokenizer: Tokenizer, chosen_from: str, other: str) -> None:
    source, trimmed, kept = both(tokenizer, chosen_from)
    assert [kept[number] for number in trimmed.encode(chosen_from).ids] == source.encode(chosen_from).ids
    assert trimmed.decode(trimmed.encode(other).ids) == source.decode(source.encode(other).ids)


@several
@given(st.sets(st.text(SIGNS, min_size=1, max_size=4)), st.sets(st.text(SIGNS, min_size=1, max_size=4)), texts)
def test_wordpiece(first: set[str], later: set[str], chosen_from: str) -> None:
    """Pieces at random, single characters missing: words that are given up, which stay so."""
    pieces = ["[UNK]", *sorted(first), *(f"##{piece}" for piece in sorted(later))]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    source, trimmed, kept = both(tokenizer, chosen_from, mend=True)
    assert [kept[number] for number in trimmed.encode(chosen_from).ids] == source.encode(chosen_from).ids


@several
@given(st.sets(st.text(SIGNS, min_size=2, max_size=4)), st.sets(st.text(SIGNS, min_size=2, max_size=4)), texts, texts)
def test_wordpiece_with_an_alphabet(first: set[str], later: set[str], chosen_from: str, other: str) -> None:
    """With every single character, every word is read."""
    pieces = ["[UNK]", *SIGNS, *sorted(first), *(f"##{piece}" for piece in [*SIGNS, *sorted(later)])]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    for options in ({}, {"minimum_count": 2}):
        _, trimmed, _ = both(tokenizer, chosen_from, **options)
        assert trimmed.decode(trimmed.encode(other).ids) == " ".join(other.split())


@several
@given(
    st.dictionaries(st.text(SIGNS, min_size=1, max_size=4), st.floats(-40, -0.1), min_size=1),
    st.booleans(),
    texts,
    texts,
)
def test_unigram(scores: dict[str, float], whole: bool, chosen_from: str, other: str) -> None:
    """Pieces at random, with characters missing or not."""
    if whole:
        scores = {**{sign: -3.0 for sign in SIGNS + " "}, **scores}
    pieces = [("<unk>", 0.0), *scores.items()]
    source, trimmed, kept = both(Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False)), chosen_from)
    assert [kept[number] for number in trimmed.encode(chosen_from).ids] == source.encode(chosen_from).ids
    if whole:
        trimmed.decoder = decoders.Fuse()
        assert trimmed.decode(trimmed.encode(other).ids) == other


@several
@given(st.permutations(["x", "y", "<a>", "<b>"]), st.text(string.printable, max_size=20))
def test_added_tokens_anywhere(order: list[str], rest: str) -> None:
    """In the model's vocabulary or behind it, and template ids with them."""
    vocab = {piece: number for number, piece in enumerate([*order[:3], "q"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.add_special_tokens(["<b>", "<a>"])
    tokenizer.add_tokens(["new"])
    source, trimmed, kept = both(tokenizer, "x<a>new<b>q")
    assert [kept[number] for number in trimmed.encode("x<a>new<b>q" + rest).ids] == source.encode(
        "x<a>new<b>q" + rest
    ).ids


def chain(*longer: tuple[str, str], starts: list[str], fallback: bool = False) -> Tokenizer:
    """Return a BPE tokenizer with merges in the order given."""
    pieces = dict.fromkeys([*starts, *(left + right for left, right in longer)])
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, list(longer), byte_fallback=fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return tokenizer


def test_the_way_that_is_taken_counts() -> None:
    """``abc`` is reached by ``ab``. With ``bc`` in its place it could be, too, but ``abcd`` would give ``a bcd``."""
    tokenizer = chain(("a", "b"), ("ab", "c"), ("b", "c"), ("bc", "d"), ("a", "bc"), starts=list("abcd"))
    source, trimmed, _ = both(tokenizer, "abcd bcd")
    assert source.encode("abcd bcd").tokens == trimmed.encode("abcd bcd").tokens == ["abc", "d", "bcd"]
    # The other way is not kept where nothing needs it.
    two_ways = chain(("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), starts=list("abcd"))
    assert two_ways.encode("abc").tokens == ["abc"]
    _, trimmed, _ = both(two_ways, "abc")
    assert trimmed.token_to_id("ab") is not None and trimmed.token_to_id("bc") is None


def test_steps_that_cannot_be_followed_from_the_characters() -> None:
    """Bytes that are merged, and tokens too long to follow: every way is kept."""
    snowman = [f"<0x{byte:02X}>" for byte in "☃".encode()]
    tokenizer = chain(
        (snowman[0], snowman[1]), (snowman[0] + snowman[1], snowman[2]), starts=["x", *BYTES], fallback=True
    )
    _, trimmed, _ = both(tokenizer, "☃x")
    assert trimmed.encode("☃x").tokens == ["".join(snowman), "x"]
    two_ways = chain(("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), starts=list("abcd"))
    with patch.object(_reachable, "LONGEST_PATH", 2):
        _, trimmed, _ = both(two_ways, "abc")
    assert trimmed.token_to_id("ab") is not None and trimmed.token_to_id("bc") is not None
