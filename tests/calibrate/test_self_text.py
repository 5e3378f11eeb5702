"""How a model writes its calibration text: the choice of tokens against its definition, and the worker's windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.calibrate import self_text_worker
from compress.calibrate.self_text import LIKELIEST, Writer, sample
from compress.calibrate.self_text_worker import end_tokens, write
from compress.errors import CompressError
from compress.source import open_checkpoint
from compress.validation.protocol import run_worker
from compress.validation.streaming import StreamedModel
from tiny_models import SLIDING_WINDOW, VOCABULARY

FAMILIES = ("llama", "mistral", "phi3", "gpt2")


def softmax(logits: np.ndarray) -> np.ndarray:
    values = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(values / values.sum(axis=1, keepdims=True))


# ---------------------------------------------------------------------------------------------------------- sampling


def slow_sample(logits: np.ndarray, draw: float, nucleus: float) -> int:
    """One row, token by token, from the likeliest down."""
    chances = softmax(logits[None])[0]
    order = sorted(range(len(chances)), key=lambda token: (-logits[token], token))
    kept: list[int] = []
    for token in order:
        kept.append(token)
        if sum(chances[item] for item in kept) >= nucleus:
            break
    aim, reached = draw * sum(chances[item] for item in kept), 0.0
    for token in kept:
        reached += chances[token]
        if reached > aim:
            return token
    return kept[-1]


@pytest.mark.parametrize("nucleus", [0.5, 0.95, 1.0])
def test_a_token_is_drawn_from_the_nucleus(nucleus: float) -> None:
    generator = np.random.default_rng(0)
    logits = (3 * generator.standard_normal((200, 50))).astype(np.float32)
    draws = generator.random(200)
    expected = [slow_sample(row, draw, nucleus) for row, draw in zip(logits, draws, strict=True)]
    assert sample(logits, draws, nucleus=nucleus).tolist() == expected
    assert sample(logits, 1 - draws, nucleus=nucleus).tolist() != expected


def test_tokens_come_as_often_as_they_are_likely() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.16, 0.04], np.float32))
    draws = (np.arange(10_000) + 0.5) / 10_000
    found = np.bincount(sample(np.tile(logits, (10_000, 1)), draws), minlength=4) / 10_000
    np.testing.assert_allclose(found, np.array([0.5, 0.3, 0.16, 0]) / 0.96, rtol=0, atol=2e-4)


def test_the_ends_of_the_interval_and_equal_tokens() -> None:
    logits = np.array([[-200.0, 0.0, 0.0, -200.0]] * 4, np.float32)
    draws = np.array([0.0, 0.49, 0.51, np.nextafter(1, 0)])
    assert sample(logits, draws).tolist() == [1, 1, 2, 2]
    assert sample(np.array([[5.0]], np.float32), np.array([0.7])).tolist() == [0]


def test_few_candidates_of_a_large_vocabulary_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.zeros((1, 5000), np.float32)
    monkeypatch.setattr("compress.calibrate.self_text.CANDIDATES", 10)
    logits[0, 100:110] = 1e-3
    draws = np.linspace(0, 0.999, 40)
    assert set(sample(np.repeat(logits, 40, axis=0), draws).tolist()) == set(range(100, 110))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    logits = np.zeros((2, 5), np.float32)
    logits[1, 3] = value
    with pytest.raises(CompressError, match="logits are not finite"):
        sample(logits, np.array([0.1, 0.2]))


# --------------------------------------------------------------------------------------------------------- documents

STARTS = np.arange(10, 20, dtype=np.int64)


def likely(*tokens: int) -> np.ndarray:
    """Logits of one row a token, which that token has all of."""
    logits = np.full((len(tokens), 30), -100, np.float32)
    logits[np.arange(len(tokens)), tokens] = 100
    return logits


def test_a_document_opens_as_the_tokenizer_does_with_a_random_word() -> None:
    writer = Writer(50, opening=[1, 3], starts=STARTS, ends={2}, seed=0)
    assert set(writer.next(None).tolist()) == {1}
    assert set(writer.next(likely(*[25] * 50)).tolist()) == {3}
    first = writer.next(likely(*[25] * 50)).tolist()
    assert set(first) <= set(STARTS.tolist()) and len(set(first)) > 5
    assert set(writer.next(likely(*[25] * 50)).tolist()) == {25}


def test_the_first_words_are_the_likeliest_and_the_others_are_not() -> None:
    writer = Writer(400, opening=[], starts=STARTS, ends=set(), seed=0)
    writer.next(None)
    flat = np.zeros((400, 30), np.float32)
    flat[:, 7] = 0.5
    for _ in range(LIKELIEST):
        assert set(writer.next(flat).tolist()) == {7}
    assert len(set(writer.next(flat).tolist())) > 20


def test_a_new_document_begins_after_the_end_of_one() -> None:
    writer = Writer(2, opening=[1], starts=STARTS, ends={2, 99}, seed=0)
    for _ in range(2 + LIKELIEST):
        writer.next(likely(25, 25))
    assert writer.next(likely(2, 25)).tolist() == [2, 25]
    assert writer.begins.tolist() == [3 + LIKELIEST, 0]
    assert writer.next(likely(25, 25)).tolist() == [1, 25]
    assert writer.next(likely(25, 25))[0] in STARTS
    assert writer.next(likely(26, 25)).tolist() == [26, 25]


def test_a_document_does_not_end_with_its_first_words() -> None:
    writer = Writer(1, opening=[], starts=STARTS, ends={2}, seed=0)
    writer.next(None)
    logits = likely(2)
    logits[0, 8] = 0
    assert [int(writer.next(logits)[0]) for _ in range(LIKELIEST + 1)] == [*[8] * LIKELIEST, 2]


def test_an_end_token_that_opens_a_document_ends_nothing() -> None:
    writer = Writer(1, opening=[2], starts=STARTS, ends={2}, seed=0)
    assert writer.next(None)[0] == 2 and writer.next(None)[0] in STARTS


@pytest.mark.parametrize(
    ("value", "ends"), [(2, {2}), ([2, 7], {2, 7}), (None, set()), ("2", set()), ([None, 4], {4}), (True, set())]
)
def test_end_tokens_are_read_from_the_config(value: Any, ends: set[int]) -> None:
    assert end_tokens({"eos_token_id": value}) == ends
    assert end_tokens({}) == set()


# ------------------------------------------------------------------------------------------------------------ windows


def model_of(directory: Path) -> Any:
    with open_checkpoint(str(directory)) as checkpoint:
        streamed = StreamedModel(checkpoint)
        streamed.fill_all()
    return streamed.model


def written(model: Any, count: int = 3, length: int = 40, seed: int = 0, **changes: Any) -> np.ndarray:
    given: dict[str, Any] = {"limit": VOCABULARY, "opening": [1], "special": {0, 1, 2}, "ends": {2}, **changes}
    return write(model, count, length, seed=seed, progress=lambda fraction: None, **given)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_follows_from_those_before_it(
    family: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache, its masks and the documents in it, against a whole forward of the document alone.

    Of these models' 384 tokens every twelfth ends a document: some windows hold several, some are longer than the
    sliding window.
    """
    import torch

    model = model_of(tiny_model(family))
    ends = set(range(3, VOCABULARY, 12))
    seen: list[np.ndarray] = []
    draw = Writer.next

    def watch(self: Writer, logits: np.ndarray | None) -> np.ndarray:
        if logits is not None:
            seen.append(logits.copy())
        return draw(self, logits)

    monkeypatch.setattr(Writer, "next", watch)
    windows = written(model, 4, 40, ends=ends)
    assert len(seen) == 39
    restarted, longest, apart = 0, 0, 0.0
    for row, window in enumerate(windows):
        begins = 0
        for position in range(1, 40):
            given = position - begins
            longest = max(longest, given)
            if given >= 2:  # before, the opening decides
                document = torch.from_numpy(window[None, begins:position])
                with torch.no_grad():
                    out = model(input_ids=document, position_ids=torch.arange(begins, position)[None])
                expected = out.logits[0, -1].numpy()
                np.testing.assert_allclose(seen[position - 1][row], expected, rtol=0, atol=2e-4)
                if begins:  # it would be seen if the document before were
                    with torch.no_grad():
                        other = model(input_ids=torch.from_numpy(window[None, :position])).logits[0, -1].numpy()
                    apart = max(apart, float(np.abs(other - expected).max()))
            if window[position] in ends and given >= 2:
                begins, restarted = position + 1, restarted + 1
                assert position + 1 == 40 or window[position + 1] == 1
    assert restarted >= 3 and longest > SLIDING_WINDOW + 4 and apart > 0.1


def test_the_same_seed_writes_the_same_text(tiny_model: Callable[[str], Path]) -> None:
    model = model_of(tiny_model("llama"))
    first = written(model)
    assert first.shape == (3, 40) and first.dtype == np.int64
    np.testing.assert_array_equal(first, written(model))
    for seed in (1, -1):
        assert (written(model, seed=seed) != first).mean() > 0.5
    assert len({tuple(row) for row in first.tolist()}) == 3


def test_pieces_and_batches_fill_every_window(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(self_text_worker, "PIECE", 16)
    monkeypatch.setattr(self_text_worker, "BATCH", 4)
    fractions: list[float] = []
    given: dict[str, Any] = {"limit": VOCABULARY, "opening": [1], "special": {0, 1, 2}, "ends": set()}
    windows = write(model_of(tiny_model("llama")), 3, 40, seed=0, progress=fractions.append, **given)
    assert windows.shape == (3, 40) and windows.flags.c_contiguous
    assert (windows[:, [0, 14, 28]] == 1).all()  # three pieces of 14 tokens, cut to 40
    assert len({tuple(row[:14]) for row in windows.tolist()} | {tuple(row[14:28]) for row in windows.tolist()}) == 6
    assert fractions == sorted(fractions) and fractions[-1] == pytest.approx(1)


def test_ids_that_the_tokenizer_does_not_have_are_never_written(tiny_model: Callable[[str], Path]) -> None:
    model = model_of(tiny_model("llama"))
    assert written(model, 8).max() >= 100
    assert written(model, 8, limit=100).max() < 100
    with pytest.raises(CompressError, match="no ordinary token"):
        written(model, limit=3)


def test_the_worker_writes_what_this_process_writes(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Another process; two threads asked for, one used."""
    request = {
        "checkpoint": {"reference": str(tiny_model("llama"))},
        "windows": 3,
        "length": 40,
        "seed": 5,
        "opening": [1],
        "special": [0, 1],
        "vocabulary": VOCABULARY + 100,
        "output": str(tmp_path / "out.npy"),
        "threads": 2,
    }
    response = run_worker("calibrate.self_text_worker", request, timeout=120)
    assert response["peak_rss_bytes"] > 50 << 20
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), written(model_of(tiny_model("llama")), seed=5))
