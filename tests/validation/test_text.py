"""Evaluation text: where it comes from, how it is cut, and what is said when it cannot be."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress.errors import CompressError, UsageError
from compress.validation import text


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Callable[[str], Path]) -> Path:
    """A directory with a byte-level tokenizer of 384 ids that prepends nothing."""
    return tiny_model("llama")


@pytest.fixture
def with_bos(tokenizer: Path, tmp_path: Path) -> Path:
    """The same tokenizer, prepending ``<s>`` (id 1)."""
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    content["truncation"] = {"max_length": 8, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return tmp_path


def test_the_embedded_halves_are_long_stable_and_disjoint() -> None:
    calibration, evaluation = text.embedded("calibration"), text.embedded("evaluation")
    assert text.embedded("evaluation") == evaluation
    paragraphs = [
        {" ".join(part.split()) for part in half.content.split("\n\n") if part.split()}
        for half in (calibration, evaluation)
    ]
    assert not paragraphs[0] & paragraphs[1]
    assert min(len(calibration.content), len(evaluation.content)) > 100_000
    assert evaluation.sha256 == hashlib.sha256(evaluation.content.encode()).hexdigest() != calibration.sha256
    assert evaluation.name.endswith("evaluation") and calibration.name.endswith("calibration")


def test_the_topics_do_repeat_each_other() -> None:
    """What the halves are kept apart from: without counting a paragraph once they would share some."""
    from pydoc_data.topics import topics

    parts = [part for topic in topics.values() for part in {" ".join(p.split()) for p in topic.split("\n\n")} if part]
    assert len(parts) > len(set(parts)) + 100


def test_windows_are_consecutive_and_whole(tokenizer: Path) -> None:
    sample = text.Text("t", "", "The quick brown fox jumps over the lazy dog. " * 40)
    _, ids = text.tokenize(sample.content, tokenizer)
    cut = text.windows(sample, tokenizer, length=16, tokens=100, vocab_size=384)
    assert cut.shape == (6, 16) and cut.dtype == np.int64
    assert cut.ravel().tolist() == ids[:96]
    everything = text.windows(sample, tokenizer, length=16, tokens=10**6, vocab_size=384)
    assert everything.size == len(ids) // 16 * 16


def test_what_the_tokenizer_prepends_opens_every_window(with_bos: Path) -> None:
    sample = text.Text("t", "", "The quick brown fox jumps over the lazy dog. " * 40)
    prefix, ids = text.tokenize(sample.content, with_bos)
    assert prefix == [1] and len(ids) > 8  # truncation in the file is switched off
    cut = text.windows(sample, with_bos, length=16, tokens=64, vocab_size=384)
    assert cut[:, 0].tolist() == [1] * 4
    assert cut[:, 1:].ravel().tolist() == ids[:60]


def test_a_short_text_says_how_many_tokens_it_needs(tokenizer: Path) -> None:
    with pytest.raises(UsageError, match=r"the text has \d+ tokens, one window needs 512"):
        text.windows(text.Text("t", "", "short"), tokenizer, length=512, tokens=512, vocab_size=384)
    with pytest.raises(UsageError, match="windows of 512 tokens cannot be cut from 100 tokens"):
        text.windows(text.Text("t", "", "short"), tokenizer, length=512, tokens=100, vocab_size=384)


def test_another_models_tokenizer_is_refused(tokenizer: Path) -> None:
    with pytest.raises(CompressError, match=r"the tokenizer gives id \d+, the model's vocabulary has 40"):
        text.windows(text.embedded("evaluation"), tokenizer, length=64, tokens=640, vocab_size=40)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CompressError, match="tokenizer is damaged"):
        text.tokenize("a", tmp_path)


def test_without_a_tokenizer_file_transformers_is_asked(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no tokenizer that transformers can read"):
        text.tokenize("a", tmp_path)


@pytest.mark.slow
def test_transformers_tokenizes_without_the_file(tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "gpt2")
    content = json.loads((tmp_path / "gpt2" / "tokenizer.json").read_text())["model"]
    (tmp_path / "gpt2" / "tokenizer.json").unlink()
    (tmp_path / "gpt2" / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in content["merges"])
    (tmp_path / "gpt2" / "merges.txt").write_text("#version: 0.2\n" + merges)
    (tmp_path / "gpt2" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    sample = "def f(x):\n    return the value"
    assert text.tokenize(sample, tmp_path / "gpt2")[1] == text.tokenize(sample, tokenizer)[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the text is empty"),
        (b" \n ", "the text is empty"),
        (b"\xff\xfe\x00a", r"not UTF-8 \(byte 0\)"),
        (b"good \xe2\x82", r"not UTF-8 \(byte 5\)"),
        (b"abc\0def", "NUL bytes"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        text.from_file(tmp_path / "t.txt", 100)


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError, match="cannot be read") as caught:
            text.from_file(path, 10)
        assert caught.value.where == str(path)


def test_a_long_file_is_read_only_as_far_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MINIMUM_BYTES", 100)
    data = ("é" * 1000).encode()
    (tmp_path / "t.txt").write_bytes(b"x" + data)  # an odd start: the cut falls inside a character
    read = text.from_file(tmp_path / "t.txt", 1)
    assert read.content == "x" + "é" * 49
    assert read.sha256 == hashlib.sha256(b"x" + data).hexdigest() and read.name == "t.txt"


def test_excerpts_are_spread_over_a_long_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MINIMUM_BYTES", 400)
    words = [f"wörd{number:05}" for number in range(2000)]
    (tmp_path / "t.txt").write_text(" ".join(words), encoding="utf-8")
    read = text.from_file(tmp_path / "t.txt", 1, excerpts=4)
    pieces = [piece.split() for piece in read.content.split("\n\n")]
    assert len(pieces) == 4 and all(len(piece) >= 6 for piece in pieces)
    assert set(read.content.split()) <= set(words)  # whole words, whole characters
    starts = [words.index(piece[0]) for piece in pieces]
    assert starts[0] < 5 and 600 < starts[1] < 700 and 1280 < starts[2] < 1380 and starts[3] > 1980
    assert read.sha256 == hashlib.sha256((tmp_path / "t.txt").read_bytes()).hexdigest()
    assert text.from_file(tmp_path / "t.txt", 10_000, excerpts=4).content == " ".join(words)  # short enough


def test_excerpts_begin_at_any_byte_of_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in range(40, 52):
        monkeypatch.setattr(text, "MINIMUM_BYTES", size)
        (tmp_path / "t.txt").write_text("a" + "\U0001f600" * 200, encoding="utf-8")
        read = text.from_file(tmp_path / "t.txt", 0, excerpts=3)
        assert set(read.content) == {"a", "\U0001f600", "\n"}


def test_what_is_wrong_in_an_excerpt_is_found_at_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MINIMUM_BYTES", 100)
    data = bytearray(b"some words " * 1000)
    data[-5] = 0xFF
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(UsageError, match=rf"not UTF-8 \(byte {len(data) - 5}\)"):
        text.from_file(tmp_path / "t.txt", 1, excerpts=4)
    data[-5] = 0
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(UsageError, match="NUL bytes"):
        text.from_file(tmp_path / "t.txt", 1, excerpts=4)
    assert text.from_file(tmp_path / "t.txt", 1).content.startswith("some words")  # the beginning alone is fine


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert text.from_file(tmp_path / "t.txt", 1).content == "abc"


def test_random_windows_repeat_with_their_seed() -> None:
    first = text.random_windows(50, 3, 7, seed=1)
    assert first.shape == (3, 7) and 0 <= first.min() <= first.max() < 50
    np.testing.assert_array_equal(first, text.random_windows(50, 3, 7, seed=1))
    assert (first != text.random_windows(50, 3, 7, seed=2)).any()
