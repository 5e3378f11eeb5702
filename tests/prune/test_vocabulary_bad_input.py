"""Vocabularies that cannot be trimmed, and tokenizer files that are not to be trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_tokenizers import byte_level, text

from compress.errors import SourceError, UnsupportedModelError, UsageError
from compress.prune.vocabulary import Coverage, Trimmed, choose, rewrite_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level(tmp_path_factory.mktemp("byte-level"))


def test_too_little_text(made: Path) -> None:
    for few in ("", "  \n", "a few words"):
        with pytest.raises(UsageError, match="a vocabulary cannot be chosen from"):
            choose(made, few, vocab_size=2000, config={})
    with pytest.raises(UsageError, match="a minimum count of 0"):
        choose(made, text(), minimum_count=0, vocab_size=2000, config={})


def test_another_models_tokenizer(made: Path) -> None:
    with pytest.raises(SourceError, match="the model's vocabulary has 300"):
        choose(made, text(), vocab_size=300, config={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "of a 'WordLevel' tokenizer"),
        ({"model": 3}, "has no model"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "two tokens have the same id"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "the id of 'a' is -1"),
        ({"model": {"type": "BPE", "vocab": {"a": True}, "merges": []}}, "the id of 'a' is True"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "no vocabulary"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}}, "no merges"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}, "'a' is not a merge"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}}, "is not in the vocabulary"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 0.1}}, "with dropout"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "end_of_word_suffix": "</w>"}},
            "with end_of_word_suffix",
        ),
        ({"model": {"type": "Unigram", "vocab": {"a": 0}, "unk_id": 0}}, "no vocabulary"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0], ["a", 0.0]], "unk_id": 0}}, "there twice"),
        ({"model": {"type": "Unigram", "vocab": [["a", float("nan")]], "unk_id": 0}}, "NaN is no number"),
        ({"model": {"type": "Unigram", "vocab": [["a", "1"]], "unk_id": 0}}, "the score of 'a' is"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 4}}, "its unknown token is 4"),
        ({"added_tokens": {"a": 1}}, "added tokens are no list"),
        ({"added_tokens": [{"content": "a"}]}, "is not an added token"),
        ({"pre_tokenizer": {"type": "Nonsense"}}, "the tokenizer is damaged"),
        ({"post_processor": {"type": "Nonsense"}}, "the tokenizer is damaged"),
    ],
)
def test_a_damaged_file(made: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    document = json.loads((made / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**document, **change}))
    kind = UnsupportedModelError if "WordLevel" in message or message.startswith("with") else SourceError
    with pytest.raises(kind, match=message):
        choose(tmp_path, text(), vocab_size=2000, config={})


def test_a_file_that_contradicts_itself(made: Path, tmp_path: Path) -> None:
    """The library would give this added token the next free id, whatever the file says."""
    document = json.loads((made / "tokenizer.json").read_text())
    document["added_tokens"][-1]["id"] += 5
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(SourceError, match=r"contradicts itself: '<\|user\|>'"):
        choose(tmp_path, text(), vocab_size=2000, config={})


def test_a_link_out_of_the_directory(made: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to(made / "tokenizer.json")
    with pytest.raises(SourceError, match="leads outside"):
        choose(tmp_path, text(), vocab_size=2000, config={})


def test_another_trimmed_vocabulary(made: Path) -> None:
    few = Trimmed(np.arange(5), 2000, Coverage(1, 1, 1, 1))
    with pytest.raises(SourceError, match="names token 1200, which is not kept"):
        rewrite_tokenizer(made, few)
