"""How much of one text is in another, against texts whose overlap is known."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from compress.validation import overlap as module
from compress.validation.overlap import WORDS, overlap
from compress.validation.text import embedded


def words(seed: int, count: int) -> list[str]:
    """Return random words of a small vocabulary: single words repeat all the time, eight in a row never do."""
    return [f"w{number}" for number in np.random.default_rng(seed).integers(0, 200, count)]


def slow(calibration: str, evaluation: str) -> float:
    """The definition, in tuples of words."""
    first, second = calibration.lower().split(), evaluation.lower().split()
    known = {tuple(first[i : i + WORDS]) for i in range(len(first) - WORDS + 1)}
    asked = [tuple(second[i : i + WORDS]) for i in range(len(second) - WORDS + 1)]
    return sum(item in known for item in asked) / len(asked)


def test_the_same_text_overlaps_wholly() -> None:
    text = embedded("evaluation").content
    assert overlap(text, text) == 1.0
    assert overlap("before it " + text + " after it", text) == 1.0


def test_the_embedded_halves_share_next_to_nothing() -> None:
    calibration, evaluation = embedded("calibration").content, embedded("evaluation").content
    share = overlap(calibration, evaluation)
    assert share < 0.01
    assert share == pytest.approx(slow(calibration, evaluation), abs=1e-12)


def test_half_of_a_text_is_half_an_overlap() -> None:
    text = words(0, 4000)
    share = overlap(" ".join(text[:2000]), " ".join(text))
    assert share == pytest.approx((2000 - WORDS + 1) / (4000 - WORDS + 1), abs=1e-12)
    assert overlap(" ".join(text), " ".join(text[:2000])) == 1.0  # it is the evaluation text's share


def test_it_equals_the_definition_where_pieces_are_mixed() -> None:
    first, second = words(1, 3000), words(2, 3000)
    mixed = [*second[:500], *first[100:700], *second[500:600], *first[100:400], *second[600:]]
    pair = " ".join(first), " ".join(mixed)
    assert 0.1 < slow(*pair) < 0.4
    assert overlap(*pair) == pytest.approx(slow(*pair), abs=1e-12)


def test_case_and_white_space_do_not_count() -> None:
    text = words(3, 500)
    assert overlap(" ".join(text), "\n\n  ".join(text).upper() + "\n") == 1.0
    assert overlap("straße " * 20, "STRASSE\t" * 20) == 1.0


def test_order_and_words_do_count() -> None:
    text = words(4, 500)
    assert overlap(" ".join(text), " ".join(reversed(text))) == 0.0
    changed = [word if index % WORDS else "other" for index, word in enumerate(text)]
    assert overlap(" ".join(text), " ".join(changed)) == 0.0


def test_repeated_sequences_count_as_often_as_they_occur() -> None:
    once, other = words(5, 100), words(6, 100)
    evaluation = " ".join([*once, *once, *once, *other])
    assert overlap(" ".join(once), evaluation) == pytest.approx(slow(" ".join(once), evaluation), abs=1e-12)


@pytest.mark.parametrize(
    ("calibration", "evaluation", "share"),
    [
        ("", "", 0.0),
        ("a b", "", 0.0),
        ("", "a b", 0.0),
        ("x a b y", "A  b", 1.0),
        ("x b a y", "a b", 0.0),
        ("q", "q", 1),
    ],
)
def test_texts_of_a_few_words(calibration: str, evaluation: str, share: float) -> None:
    assert overlap(calibration, evaluation) == share


def test_characters_are_words_where_nothing_parts_them() -> None:
    text = "在不久的将来我们会看到许多新的东西而且它们都会很有用"
    assert overlap(text, text[:12]) == 1.0
    assert overlap(text, text[:12] + "一二三四五六七八九十" * 5) < 0.2


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = words(7, 300), words(8, 300)
    pair = " ".join([*second, *first]), " ".join([*first[:150], *second[:50]])
    expected = overlap(*pair)
    assert 0.5 < expected < 1
    for block in (1, 3, 7, 8, 9, 64):
        monkeypatch.setattr(module, "_BLOCK", block)
        monkeypatch.setattr(module, "_KEPT", 16)
        assert overlap(*pair) == expected, block


def test_a_long_calibration_text_takes_no_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 1000)
    monkeypatch.setattr(module, "_KEPT", 1000)
    text = [f"word{index}" for index in range(40_000)]
    pair = " ".join(text), " ".join(text[:500])
    tracemalloc.start()
    try:
        assert overlap(*pair) == 1.0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 600_000  # the words alone would be millions
