"""Short texts for encoders, their tokens, and padded batches of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import CompressError, UsageError
from compress.validation import encoding, pieces, text
from compress.validation.artifact import open_artifact
from compress.validation.encoded import Batch, Encoded, pack, padded_batches, unpadded_batches
from compress.validation.encoding import outputs_of, rows_of, timed

# ------------------------------------------------------------------------------------------------------------- texts


def test_texts_are_distinct_varied_and_always_the_same() -> None:
    content = text.embedded("evaluation").content
    found = pieces.cut(content, 256)
    assert found == pieces.cut(content, 256) and len(found) == len({piece.casefold() for piece in found}) == 256
    lengths = sorted(len(piece.split()) for piece in found)
    assert lengths[0] >= pieces.MINIMUM_WORDS and lengths[25] < 15 and lengths[-25] > 50
    everything = pieces.cut(content, 10**6)
    assert everything[0] == found[0] and everything[-1] == found[-1]  # spread over the whole text


def test_repeats_fragments_and_tables_are_left_out() -> None:
    content = "One two three. Four five six.\n\none  two\nTHREE.\n\n1 2 3 4\n\n---\n\nTwo words\n\nAnd this is new!"
    assert pieces.cut(content, 10) == ["One two three.", "Four five six.", "And this is new!"]


@pytest.mark.parametrize("task", ["embedding", "text-classification", "question-answering"])
def test_texts_of_a_task_are_single_or_pairs(task: str, tiny_encoders: Path) -> None:
    artifact = open_artifact(tiny_encoders / "artifact" / task)
    found = pieces.drift_texts(text.embedded("evaluation"), artifact, count=40, max_length=32)
    pairs = [
        bool(found.types[start : start + length].any())
        for start, length in zip(found.starts, found.lengths, strict=True)
    ]
    assert 36 <= len(found) <= 40 and found.lengths.max() == 32 and found.lengths.min() < 20 and found.truncated > 0
    assert all(len(set(found.lengths[first : first + 8])) > 1 for first in range(0, 32, 8))  # padding in every batch
    assert sum(pairs) == {"embedding": 0, "text-classification": 10, "question-answering": 40}[task]
    assert found.keep.all() if task == "question-answering" else found.keep.sum() < len(found.keep)
    assert all(found.ids[found.starts] == 2) and all(found.ids[found.starts + found.lengths - 1] == 3)


def test_masking_hides_some_words_of_each_text_and_never_special_tokens(tiny_encoders: Path) -> None:
    artifact = open_artifact(tiny_encoders / "artifact" / "fill-mask")
    found = pieces.drift_texts(text.embedded("evaluation"), artifact, count=40, max_length=64)
    assert pieces.mask_id(artifact) == 4
    assert (found.ids[found.keep] == 4).all() and (found.ids == 4).sum() == found.keep.sum()
    assert found.rows_of_texts("fill-mask").min() >= 1 and 0.1 < found.keep.mean() < 0.16
    again = pieces.drift_texts(text.embedded("evaluation"), artifact, count=40, max_length=64)
    assert (again.ids == found.ids).all()


def test_masked_positions_are_bounded(tiny_encoders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_MASKED", 60)
    artifact = open_artifact(tiny_encoders / "artifact" / "fill-mask")
    found = pieces.drift_texts(text.embedded("evaluation"), artifact, count=40, max_length=64)
    assert pieces.MINIMUM_TEXTS <= len(found) < 40 and found.keep.sum() <= 60


def test_a_tokenizer_without_a_mask_token_is_told(tiny_encoders: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_encoders / "artifact" / "fill-mask", tmp_path / "a")
    for entry in ({}, {"mask_token": "[NONE]"}, {"mask_token": 5}):
        (directory / "tokenizer_config.json").write_text(json.dumps(entry))
        with pytest.raises(CompressError, match="names no mask token"):
            pieces.mask_id(open_artifact(directory))
    (directory / "special_tokens_map.json").write_text('{"mask_token": {"content": "[MASK]"}}')
    assert pieces.mask_id(open_artifact(directory)) == 4
    (directory / "tokenizer.json").unlink()
    assert pieces.mask_id(open_artifact(directory)) == 4  # vocab.txt has it too


def test_tokens_are_the_same_from_a_vocabulary_alone(tiny_encoders: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_encoders / "artifact" / "embedding", tmp_path / "a")
    texts: list[pieces.Pair] = [("The import statement", None), ("It is for", "and the"), ("word " * 40, None)]
    fast = pieces.tokenize(texts, open_artifact(directory), 16)
    (directory / "tokenizer.json").unlink()
    assert pieces.tokenize(texts, open_artifact(directory), 16) == fast
    assert [item.truncated for item in fast] == [False, False, True] and len(fast[2].ids) == 16
    assert fast[1].types[-1] == 1 and fast[1].special[0] and not fast[1].special[1]


def test_a_tokenizer_of_another_model_is_refused(tiny_encoders: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny_encoders / "artifact" / "embedding", tmp_path / "a")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    with pytest.raises(CompressError, match="the model's vocabulary has 50"):
        pieces.drift_texts(text.embedded("evaluation"), open_artifact(directory), count=40, max_length=64)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(CompressError, match="the tokenizer is damaged"):
        pieces.tokenize([("a", None)], open_artifact(directory), 8)


def test_a_text_too_short_is_told(tiny_encoders: Path) -> None:
    artifact = open_artifact(tiny_encoders / "artifact" / "embedding")
    with pytest.raises(UsageError, match="the text gives 1 short texts"):
        pieces.drift_texts(text.Text("mine", "", "Only one sentence here."), artifact, count=40, max_length=64)


# ----------------------------------------------------------------------------------------------------------- batches


def encoded() -> Encoded:
    ids = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 4, 2]]
    keep = [[False, True, False], [True], [True, False, True, False, True], [False, True, False]]
    return pack(ids, [[0] * len(text) for text in ids], keep, truncated=1)


def test_texts_survive_the_disk(tmp_path: Path) -> None:
    whole = encoded()
    whole.save(tmp_path / "x.npz")
    again = Encoded.load(tmp_path / "x.npz")
    for name in ("ids", "types", "keep", "lengths"):
        assert (getattr(again, name) == getattr(whole, name)).all()
    assert again.truncated == 1 and len(again) == 4
    assert (again.rows("embedding"), again.rows("token-classification")) == (4, 6)
    assert again.rows_of_texts("fill-mask").tolist() == [1, 1, 3, 1]


def test_padded_batches_keep_the_order_and_mask_what_they_add() -> None:
    first, second = padded_batches(encoded(), 3, pad_id=99)
    assert first.ids.tolist() == [[1, 2, 3, 99, 99], [4, 99, 99, 99, 99], [5, 6, 7, 8, 9]]
    assert first.mask.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert first.keep.sum(axis=1).tolist() == [1, 1, 3] and second.ids.tolist() == [[1, 4, 2]]


def test_unpadded_batches_put_equal_lengths_together() -> None:
    batches = list(unpadded_batches(encoded(), 8))
    assert [batch.texts.tolist() for batch in batches] == [[1], [0, 3], [2]]
    assert all(batch.mask.all() for batch in batches)


def test_lists_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(CompressError, match="text 1"):
        pack([[1], []], [[0], []], [[True], []])
    with pytest.raises(CompressError, match="text 0"):
        pack([[1, 2]], [[0]], [[True, True]])


# -------------------------------------------------------------------------------------------------------------- rows


def batch() -> Batch:
    return next(padded_batches(encoded(), 3, pad_id=0))


def test_token_vectors_are_averaged_over_the_text_alone() -> None:
    hidden = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    found = rows_of("embedding", {"last_hidden_state": hidden}, batch())
    expected = np.stack([hidden[0, :3].mean(0), hidden[1, 0], hidden[2].mean(0)])
    assert found == pytest.approx(expected, abs=1e-6)
    assert found[1] != pytest.approx(hidden[1].mean(0), abs=0.01)
    given = np.ones((3, 4), np.float16)
    pooled = rows_of("embedding", {"sentence_embedding": given}, batch())
    assert pooled.dtype == np.float32 and (pooled == 1).all()


def test_only_kept_tokens_have_rows() -> None:
    scores = np.arange(3 * 5 * 2, dtype=np.float32).reshape(3, 5, 2)
    assert rows_of("token-classification", {"logits": scores}, batch()).tolist() == scores[batch().keep].tolist()
    both = rows_of("question-answering", {"start_logits": scores[..., 0], "end_logits": scores[..., 1]}, batch())
    assert both.tolist() == scores[batch().keep].tolist()


@pytest.mark.parametrize(
    ("task", "output", "shape"),
    [
        ("text-classification", "logits", (3, 5, 2)),
        ("text-classification", "logits", (2, 2)),
        ("token-classification", "logits", (3, 2)),
        ("fill-mask", "logits", (3, 4, 9)),
        ("embedding", "last_hidden_state", (3, 4)),
        ("embedding", "sentence_embedding", (3, 5, 4)),
        ("question-answering", "start_logits", (3, 5, 1)),
    ],
)
def test_outputs_of_another_shape_are_refused(task: str, output: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(CompressError, match=r"the output's shape is \["):
        rows_of(task, {output: np.zeros(shape, np.float32)}, batch())


def test_outputs_are_found_by_name() -> None:
    assert outputs_of("embedding", ["last_hidden_state", "sentence_embedding"]) == ["sentence_embedding"]
    assert outputs_of("embedding", ["last_hidden_state"]) == ["last_hidden_state"]
    assert outputs_of("question-answering", ["end_logits", "start_logits"]) == ["start_logits", "end_logits"]
    with pytest.raises(CompressError, match="lacks the output end_logits of question-answering"):
        outputs_of("question-answering", ["start_logits"])


class Session:
    """Inputs and outputs by name, as a session has them."""

    def __init__(self, *inputs: str) -> None:
        self._inputs = [type("Value", (), {"name": name, "shape": ["batch", "length"]})() for name in inputs]

    def get_inputs(self) -> Any:
        return self._inputs

    def get_outputs(self) -> Any:
        return []


def test_a_graph_that_is_no_encoder_is_told() -> None:
    encoding.Encoder(Session("input_ids", "attention_mask"))
    with pytest.raises(CompressError, match="the graph is not an encoder(.|\n)*past_key_values.0.key"):
        encoding.Encoder(Session("input_ids", "attention_mask", "past_key_values.0.key"))
    with pytest.raises(CompressError, match=r"missing inputs \['input_ids'\]"):
        encoding.Encoder(Session("attention_mask"))


def test_runs_are_bounded_by_time_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(encoding.time, "perf_counter", lambda: clock[0])

    def run(seconds: float) -> Any:
        def step() -> None:
            clock[0] += seconds

        return step

    assert timed(run(0.125), 0.5, 50) == [0.125] * 4
    assert len(timed(run(0.001), 0.5, 50)) == 50
    assert timed(run(0.375), 0.5, 50) == [0.375] * 2
    assert timed(run(2.0), 0.5, 50) == [2.0]  # the warm-up told how slow it is
