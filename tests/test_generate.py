"""Conversations: the cache that is reused, a scripted standard input, and what --json says."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.chat import converse
from compress.cli import run
from compress.errors import CompressError, UsageError
from compress.generation import Writer, _rope_switch, opening
from compress.validation.decoding import CachedDecoder

#: Turns as words: what a tiny tokenizer of counted words can tell apart.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and m.content == 'no' %}{{ raise_exception('no such role') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def chatting(tiny_artifact: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    artifact = tmp_path_factory.mktemp("chat") / "artifact"
    shutil.copytree(tiny_artifact("llama", "arm-int4"), artifact)
    (artifact / "chat_template.jinja").write_text(TEMPLATE)
    return artifact


@pytest.fixture(scope="module")
def writer(chatting: Path) -> Writer:
    return Writer(chatting, 1)


def written(writer: Writer, ids: list[int], tokens: int = 6) -> list[int]:
    list(writer.write(ids, tokens))
    assert writer.last is not None
    return writer.last.tokens


def conversation(*words: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": word} for index, word in enumerate(words)]


def test_a_reused_cache_changes_nothing(writer: Writer, chatting: Path) -> None:
    first = writer.encode_chat(conversation("The module"))
    written(writer, first)
    assert writer.last is not None
    second = writer.encode_chat(conversation("The module", writer.last.text, "def f(x):"))
    reused = written(writer, second)
    assert writer.last.reused_tokens >= len(first) - 1
    fresh = Writer(chatting, 1)
    assert written(fresh, second) == reused and fresh.last is not None and fresh.last.reused_tokens == 0
    # The control: one position too many kept, and the answer is another one.
    other = Writer(chatting, 1)
    written(other, first)
    other._fed[len(first) - 2] = second[len(first) - 2] = 77
    assert written(other, second) != written(Writer(chatting, 1), second)


def test_keeping_positions(writer: Writer) -> None:
    decoder = writer._decoder
    assert isinstance(decoder, CachedDecoder)
    ids = np.arange(3, 23, dtype=np.int64)[None]
    decoder.reset()
    whole = decoder.feed(ids)
    decoder.keep(12)
    assert decoder.length == 12
    np.testing.assert_allclose(decoder.feed(ids[:, 12:]), whole[:, 12:], atol=1e-4)
    decoder.keep(11)
    assert np.abs(decoder.feed(ids[:, 12:]) - whole[:, 12:]).max() > 0.05
    decoder.keep(0)
    assert decoder.length == 0
    writer._fed.clear()


def test_nothing_is_reused_beyond_the_rope_switch(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = writer.encode("The module")
    written(writer, ids)
    monkeypatch.setattr(writer, "_switch", len(ids) + 1)
    written(writer, ids)
    assert writer.last is not None and writer.last.reused_tokens == 0
    assert _rope_switch({"rope_scaling": {"original_max_position_embeddings": 4096}}) == 4096
    assert _rope_switch({"rope_scaling": None}) is None


def scripted(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_scripted_conversation(
    writer: Writer, chatting: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    seen: list[Any] = []
    encode = writer.encode_chat
    monkeypatch.setattr(writer, "encode_chat", lambda messages: seen.append(list(messages)) or encode(messages))
    scripted(monkeypatch, "The module", "", "def f(x):", "/reset", "The module", "word " * 400, "The")
    converse(writer, new_tokens=4, chat=True, system="be short")
    out, err = capsys.readouterr()
    answers = out.split("\n")
    assert [message["role"] for message in seen[1]] == ["system", "user", "assistant", "user"]
    assert seen[1][2]["content"] == answers[0]
    assert seen[2] == [*opening("be short"), {"role": "user", "content": "The module"}]
    # Too long a question is said so, and is no part of the conversation.
    assert "the model's context 256" in err and "/reset begins anew" in err
    assert [message["content"][:5] for message in seen[4] if message["role"] == "user"] == ["The m", "The"]


def test_an_interrupt_ends_the_answer_only(writer: Writer, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    feed, calls = writer._decoder.feed, 0

    def interrupting(ids: Any, keep: int = 0) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return feed(ids, keep)

    monkeypatch.setattr(writer._decoder, "feed", interrupting)
    before = signal.getsignal(signal.SIGINT)
    scripted(monkeypatch, "The module", "The")
    converse(writer, new_tokens=20, chat=True, system=None)
    assert signal.getsignal(signal.SIGINT) is before
    assert calls == 3 + 20 and len(capsys.readouterr().out.splitlines()) >= 2
    assert writer.last is not None and writer.last.stopped == "length"


def test_without_a_template_lines_stand_alone(
    tiny_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    artifact = str(tiny_artifact("llama", "arm-int4"))
    words = ["generate", artifact, "--interactive", "--new-tokens", "3", "--threads", "1"]
    scripted(monkeypatch, "The module", "def", "The module")
    assert run(words) == 0
    out, err = capsys.readouterr()
    lines = out.removesuffix("\n").split("\n")
    assert lines[0] == lines[-1] and "no chat template is used" in err
    scripted(monkeypatch, "The module")
    assert run([*words, "--system", "be short"]) == 2


def test_json_and_standard_input(chatting: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    words = ["generate", str(chatting), "--new-tokens", "5", "--threads", "1"]
    assert run([*words, "The module", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["tokens"]) == 5 and document["stopped"] == "length"
    assert document["decode_tokens_per_second"] == pytest.approx(4 / document["decode_seconds"], rel=1e-3)
    scripted(monkeypatch, "The module")
    assert run([*words, "-"]) == 0
    assert capsys.readouterr().out == document["text"] + "\n"
    assert run([*words, "The module", "--system", "be short", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] > document["prompt_tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no PROMPT"),
        (["x", "--interactive"], "neither PROMPT nor --json"),
        (["--interactive", "--json"], "neither PROMPT nor --json"),
        (["x", "--raw", "--system", "y"], "--system belongs to a chat template"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, chatting: Path, capsys: Capture) -> None:
    assert run(["generate", str(chatting), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_template_that_refuses(writer: Writer) -> None:
    with pytest.raises(CompressError, match="refuses this conversation: no such role"):
        writer.encode_chat([*opening("no"), {"role": "user", "content": "x"}])
    with pytest.raises(UsageError, match="--system"):
        converse(writer, new_tokens=1, chat=False, system="x")


def test_split_characters_come_whole(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter(["a", "a\N{REPLACEMENT CHARACTER}", "a\N{EURO SIGN}", "a\N{EURO SIGN}\N{REPLACEMENT CHARACTER}"])

    def tokens(feed: Any, most: int, done: Any) -> Iterator[int]:
        yield from range(4)

    monkeypatch.setattr(writer, "_tokens", tokens)
    monkeypatch.setattr(writer._tokenizer, "decode", lambda *arguments, **named: next(texts))
    # The last piece is all there will be of a character that the limit cut.
    assert list(writer.write([1], 4)) == ["a", "\N{EURO SIGN}", "\N{REPLACEMENT CHARACTER}"]
