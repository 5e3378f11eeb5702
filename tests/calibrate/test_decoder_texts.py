"""What a decoder is calibrated on: where windows are cut, what is recorded, and what is said when it cannot be."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import checks, pipeline
from compress.calibrate import decoder_texts, self_text_worker
from compress.calibrate.decoder_texts import (
    MINIMUM_TOKENS,
    WINDOWS_NAME,
    CalibrationText,
    calibration_windows,
    self_text_bytes,
    spread_windows,
)
from compress.contracts import Decoder
from compress.errors import CompressError, ResourceError, UsageError
from compress.planning import make_plan
from compress.profile import load_profile
from compress.source import open_checkpoint
from compress.validation import memory, text
from tiny_models import PLAIN_INT8, VOCABULARY


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    """A Llama of 384 tokens and 256 positions whose tokenizer prepends nothing."""
    return tiny_model("llama")


@pytest.fixture
def with_bos(model: Path, tmp_path: Path) -> Path:
    """The same model, whose tokenizer prepends ``<s>`` (id 1)."""
    directory = shutil.copytree(model, tmp_path / "with-bos")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


def calibration(model: Path, work: Path, *settings: str, **changes: Any) -> CalibrationText:
    given: dict[str, Any] = {"text_file": None, "seed": 0, "memory_cap": None, "progress": lambda fraction: None}
    with open_checkpoint(str(model)) as checkpoint:
        decoder = pipeline.describe(checkpoint)
        assert isinstance(decoder, Decoder)
        return calibration_windows(
            checkpoint,
            decoder,
            load_profile("x86-int4", [f"calibration.{setting}" for setting in settings]),
            source={"reference": str(model)},
            work=work,
            **{**given, **changes},
        )


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Let the worker answer in this process; returns what it was asked."""
    asked: list[dict[str, Any]] = []

    def answer(module: str, request: dict[str, Any], **_: Any) -> Any:
        assert module == "calibrate.self_text_worker"
        asked.append(request)
        return self_text_worker.handle(request, tmp_path)

    monkeypatch.setattr(decoder_texts, "run_worker", answer)
    return asked


# --------------------------------------------------------------------------------------------------------------- text


def test_windows_are_spread_from_the_beginning_to_the_end(model: Path) -> None:
    content = text.embedded("calibration")
    _, ids = text.tokenize(content.content, model)
    windows = spread_windows(content, model, VOCABULARY, length=64, tokens=640)
    assert windows.shape == (10, 64) and windows.dtype == np.int64
    assert windows[0].tolist() == ids[:64] and windows[-1].tolist() == ids[-64:]
    for index, row in enumerate(windows.tolist()):
        start = (len(ids) - 64) * index // 9
        assert row == ids[start : start + 64]


def test_windows_do_not_overlap_where_the_text_just_suffices(model: Path) -> None:
    content = text.Text("t", "", text.embedded("calibration").content[:12_000])
    _, ids = text.tokenize(content.content, model)
    windows = spread_windows(content, model, VOCABULARY, length=50, tokens=len(ids))
    starts = np.linspace(0, len(ids) - 50, len(windows)).astype(int)
    assert len(windows) == len(ids) // 50 and (np.diff(starts) >= 50).all()
    assert windows.tolist() == [ids[start : start + 50] for start in starts]


def test_what_the_tokenizer_prepends_opens_every_window(with_bos: Path) -> None:
    content = text.embedded("calibration")
    prefix, ids = text.tokenize(content.content, with_bos)
    windows = spread_windows(content, with_bos, VOCABULARY, length=64, tokens=640)
    assert prefix == [1] and (windows[:, 0] == 1).all()
    assert windows[0, 1:].tolist() == ids[:63] and windows[-1, 1:].tolist() == ids[-63:]


def test_the_embedded_text_is_the_default_and_recorded(model: Path, tmp_path: Path) -> None:
    seen: list[float] = []
    found = calibration(model, tmp_path, progress=seen.append)
    content = text.embedded("calibration")
    assert found.windows.shape == (32, 256)  # no longer than the model's context
    assert found.content == content.content and seen[-1] == 1.0
    assert found.record == {
        "source": "text",
        "name": content.name,
        "sha256": content.sha256,
        "tokens": 8192,
        "asked_tokens": 8192,
        "window": 256,
    }
    assert json.loads(json.dumps(found.record)) == found.record
    assert list(tmp_path.iterdir()) == []


def test_the_users_text_is_used_and_recorded(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("\n\n".join(f"Ticket {number} was closed by the second team." for number in range(800)))
    found = calibration(model, tmp_path, "tokens=2048", "window=128", text_file=own)
    assert found.windows.shape == (16, 128) and found.content == own.read_text()
    assert (found.record["name"], found.record["tokens"]) == ("own.txt", 2048)
    assert found.record["sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()


def test_a_shorter_text_gives_what_it_has_and_the_record_says_so(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text(text.embedded("calibration").content[:8000])
    found = calibration(model, tmp_path, "window=128", text_file=own)
    assert MINIMUM_TOKENS <= found.record["tokens"] < found.record["asked_tokens"] == 8192
    assert found.record["tokens"] == found.windows.size


def test_too_short_a_text_says_how_many_tokens_are_needed(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text(text.embedded("calibration").content[:1500])
    _, ids = text.tokenize(own.read_text(), model)
    assert 256 < len(ids) < MINIMUM_TOKENS
    expected = f"the text has {len(ids)} tokens, calibration needs at least 2048"
    with pytest.raises(UsageError, match=expected) as caught:
        calibration(model, tmp_path, text_file=own)
    assert caught.value.where == "own.txt" and "longer text" in str(caught.value.hint)
    assert calibration(model, tmp_path, "tokens=256", text_file=own).windows.size == 256  # asked for no more


def test_a_text_of_which_the_tokenizer_leaves_nothing(model: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(model, tmp_path / "deaf")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[^a-z ]"}, "content": ""}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    own = tmp_path / "own.txt"
    own.write_text("ПРИВЕТ\n" * 500)
    with pytest.raises(UsageError, match="the text gives no tokens") as caught:
        calibration(directory, tmp_path, text_file=own)
    assert caught.value.where == "own.txt"


def test_another_models_tokenizer_and_windows_without_room_are_refused(with_bos: Path) -> None:
    content = text.embedded("calibration")
    with pytest.raises(CompressError, match=r"the tokenizer gives id \d+, the model's vocabulary has 40"):
        spread_windows(content, with_bos, 40, length=64, tokens=640)
    with pytest.raises(UsageError, match="windows of 2 tokens have no room beside the 1"):
        spread_windows(content, with_bos, VOCABULARY, length=2, tokens=640)


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe", "not UTF-8"), (b"  \n", "is empty"), (b"a\0b", "NUL")])
def test_a_file_that_is_no_text_is_refused(model: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        calibration(model, tmp_path, text_file=tmp_path / "t.txt")


def test_a_long_file_is_read_at_its_end_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MINIMUM_BYTES", 100)
    own = tmp_path / "own.txt"
    own.write_text("alpha beta. " * 60_000 + "gamma delta. " * 60_000)
    found = calibration(model, tmp_path, "tokens=2048", "window=64", text_file=own)
    content = found.content or ""
    assert len(content) <= 2048 * 64 and content.startswith("beta.") and content.endswith("delta.")
    assert 0.4 < content.count("gamma") / content.count(" ") * 2 < 0.6
    assert {word for word in content.split()} == {"alpha", "beta.", "gamma", "delta."}  # only whole words
    assert found.record["sha256"] == hashlib.sha256(own.read_bytes()).hexdigest()


# --------------------------------------------------------------------------------------------------- command line


def check(model: Path, profile: str, *settings: str, given: bool = True) -> None:
    """Run the check of an export's options, with a calibration text."""
    recipe = load_profile(profile, settings)
    with open_checkpoint(str(model)) as checkpoint:
        plan = make_plan(pipeline.describe(checkpoint), recipe, checkpoint)
    options = pipeline.ExportOptions(calibration_text=Path("own.txt") if given else None)
    checks.check_calibration(plan, recipe, options)


@pytest.mark.parametrize("effort", ["balanced", "max"])
def test_a_text_is_taken_by_an_effort_that_calibrates(model: Path, effort: str) -> None:
    check(model, "x86-int4", f"quantize.effort={effort}")
    check(model, "x86-int4", f"quantize.effort={effort}", "calibration.source=self", given=False)
    check(model, "x86-int4", "quantize.effort=fast", given=False)


@pytest.mark.parametrize(
    ("profile", "settings", "what", "hint"),
    [
        ("x86-int4", ["quantize.effort=fast"], "calibrates nothing on a text", "quantize.effort=balanced"),
        ("float", ["quantize.effort=balanced"], "calibrates nothing on a text", "leave --calibration-text out"),
        (
            "x86-int4",
            ["quantize.effort=balanced", "calibration.source=self"],
            "text that the model writes itself",
            "calibration.source=text",
        ),
    ],
)
def test_a_text_that_nothing_would_read_is_refused(
    model: Path, profile: str, settings: list[str], what: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        check(model, profile, *settings)
    assert caught.value.where == "own.txt" and hint in str(caught.value.hint)


def test_encoders_are_judged_as_before(tiny_model: Callable[[str], Path]) -> None:
    encoder = tiny_model("bert:embedding")
    check(encoder, "x86-int8", "calibration.source=self")  # that is about models that write text
    with pytest.raises(UsageError, match="calibrates nothing on a text") as caught:
        check(encoder, PLAIN_INT8, "quantize.effort=balanced")
    assert "x86-int8" in str(caught.value.hint)


# --------------------------------------------------------------------------------------------------------------- self


def test_the_model_writes_its_own_text(with_bos: Path, tmp_path: Path, here: list[dict[str, Any]]) -> None:
    work = tmp_path / "work"
    work.mkdir()
    settings = ('source="self"', "tokens=200", "window=64")
    found = calibration(with_bos, work, *settings, seed=3)
    assert found.windows.shape == (3, 64) and (found.windows[:, 0] == 1).all() and found.content is None
    assert found.record == {
        "source": "self",
        "name": "text that the model wrote",
        "sha256": hashlib.sha256(found.windows.astype("<i8").tobytes()).hexdigest(),
        "seed": 3,
        "tokens": 192,
        "asked_tokens": 200,
        "window": 64,
    }
    assert list(work.iterdir()) == []
    assert here[0]["special"] == [0, 1, 2] and here[0]["vocabulary"] == VOCABULARY and here[0]["threads"] == 1
    assert calibration(with_bos, work, *settings, seed=3).record == found.record
    assert calibration(with_bos, work, *settings, seed=4).record["sha256"] != found.record["sha256"]


def test_a_given_text_would_not_be_read(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("words " * 5000)
    with pytest.raises(UsageError, match="the given text would not be read") as caught:
        calibration(model, tmp_path, 'source="self"', text_file=own)
    assert "calibration.source=text" in str(caught.value.hint)


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_texts, "run_worker", lambda *_, **__: pytest.fail("the worker was started"))
    with pytest.raises(ResourceError, match=r"cannot write its calibration text: .* needs .* are allowed") as caught:
        calibration(model, tmp_path, 'source="self"', memory_cap=400_000_000)
    assert "calibration.source=text" in str(caught.value.hint)
    monkeypatch.setattr(memory, "available_memory", lambda: 300_000_000)
    with pytest.raises(ResourceError, match="are available"):
        calibration(model, tmp_path, 'source="self"')


def test_memory_follows_weights_batch_and_vocabulary(model: Path) -> None:
    with open_checkpoint(str(model)) as checkpoint:
        decoder = pipeline.describe(checkpoint)
    assert isinstance(decoder, Decoder)
    base = self_text_bytes(10**8, decoder, 8192, 256)
    assert self_text_bytes(2 * 10**8, decoder, 8192, 256) - base == pytest.approx(4.4e8)
    assert self_text_bytes(10**8, decoder, 8192, 512) == base  # pieces, not windows
    assert self_text_bytes(10**8, decoder, 1 << 20, 256) == base  # no more at once
    assert self_text_bytes(10**8, decoder, 1024, 256) < base


def test_nothing_is_left_when_the_worker_fails(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: str, request: dict[str, Any], **__: Any) -> None:
        Path(request["output"]).write_bytes(b"half")
        raise CompressError("the disk is on fire")

    monkeypatch.setattr(decoder_texts, "run_worker", fails)
    with pytest.raises(CompressError, match="on fire"):
        calibration(model, tmp_path, 'source="self"', "tokens=64", "window=64")
    assert not (tmp_path / WINDOWS_NAME).exists()
