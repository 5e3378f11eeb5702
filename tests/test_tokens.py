"""Tokenizers and templates in their own process: the same results as in this one, and limits that hold."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress import prompts, tokens
from compress.errors import CompressError
from compress.tokens import ChatTemplateError, Tokenizer, render_chat

TEXTS = ["def f(x):\n    return  x  # \N{EURO SIGN}5", "", "a", "  two  spaces ", "\N{GRINNING FACE} and e\u0301"]
MESSAGES = [{"role": "system", "content": "be <brief>"}, {"role": "user", "content": "why? 'x'"}]
TEMPLATES = [
    "{% for m in messages %}\n  {% if loop.first %}first {% endif %}{{ m['role'] }}: {{ m.content | trim }}\n"
    "{% endfor %}\nend",
    "{{ bos_token }}{{ messages | tojson }}{{ {'b': 1, 'a': 'é<'} | tojson(indent=2) }}",
    "{%- set ns = namespace(n=0) -%}{%- for i in range(9) -%}{%- if i == 3 %}{% break %}{% endif -%}"
    "{%- set ns.n = ns.n + i -%}{%- endfor -%}{{ ns.n }}",
    "{% generation %}said{% endgeneration %}{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[-1].content) }}",
    "{% if tools is none and not documents %}{{ dict(a=1) }}{{ messages[1:][0].items() | list | length }}{% endif %}"
    "{% if add_generation_prompt %}go{% endif %}{{ undefined_name }}{{ messages[0].get('x', 'y') }}",
    "{{ '%s-%d' % ('a', 2) }}{{ 'a,b'.split(',') | join('+') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "bert:embedding"])
def test_the_same_as_the_library(name: str, tiny_model: Callable[[str], Path]) -> None:
    import tokenizers

    path = tiny_model(name) / "tokenizer.json"
    own = tokenizers.Tokenizer.from_file(str(path))
    own.no_padding()
    own.no_truncation()
    with Tokenizer(path=path) as other:
        for text in TEXTS:
            (found,) = other.encode(
                [(text, "b c")], special=True, fields=("ids", "types", "special", "offsets", "words")
            )
            wanted = own.encode(text, "b c")
            assert (found.ids, found.types, found.words) == (wanted.ids, wanted.type_ids, wanted.word_ids)
            assert found.special == [bool(flag) for flag in wanted.special_tokens_mask]
            assert found.offsets == wanted.offsets
            assert other.decode(found.ids) == own.decode(wanted.ids, skip_special_tokens=False)
        assert other.vocabulary() == own.get_vocab(with_added_tokens=True)
        own.enable_truncation(4)
        (cut,) = other.encode([(TEXTS[0], None)], special=True, length=4, fields=("ids", "cut"))
        assert cut.ids == own.encode(TEXTS[0]).ids and cut.cut
        assert other.ids(TEXTS[0]) != cut.ids, "the length is of one request"


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_same_as_transformers_writes(template: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        [MESSAGES], chat_template=template, add_generation_prompt=True, bos_token="<s>"
    )
    given = {"messages": MESSAGES, "tools": None, "documents": None, "add_generation_prompt": True, "bos_token": "<s>"}
    assert render_chat(template, given) == rendered[0][0]


@pytest.mark.parametrize("name", ["llama", "bert:embedding"])
def test_prompts_are_those_of_transformers(name: str, tiny_artifact: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    artifact = tiny_artifact(name, *(("float",) if ":" in name else ()))
    own, read = prompts.tokenizer_of(artifact), AutoTokenizer.from_pretrained(str(artifact))
    for text in TEXTS:
        ids = own.ids(text)
        assert ids == read(text)["input_ids"]
        assert own.ids(text, special=False) == read(text, add_special_tokens=False)["input_ids"]
        for skip in (False, True):
            assert own.decode(ids, skip_special_tokens=skip) == read.decode(ids, skip_special_tokens=skip)


def test_limits_end_a_request_and_not_what_comes_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "BASE_SECONDS", 1.0)
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(CompressError, match="the chat template computed for 1 seconds without an end"):
        render_chat(loop, {"messages": []})
    with pytest.raises(CompressError, match="memory"):
        render_chat("{{ 'x' * 10**10 }}", {"messages": []})
    assert render_chat("{{ messages | length }}", {"messages": [1]}) == "1"


def test_a_panic_of_the_library_is_an_error() -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"}
    with Tokenizer(document=json.dumps({"model": model, "pre_tokenizer": split}), label="here") as found:
        with pytest.raises(CompressError, match="damaged: Onig.*\n  in: here"):
            found.ids("a" * 40 + "!")
        assert found.ids("a") == [0]


def test_a_process_that_was_killed_is_started_anew(tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model("llama") / "tokenizer.json"
    with Tokenizer(path=path) as found:
        os.kill(found._process._child.pid, signal.SIGKILL)
        with pytest.raises(CompressError, match="ended"):
            found.ids("a")
    with Tokenizer(path=path) as again:
        assert again.ids("a")


def test_several_threads_get_their_own_answers(tiny_model: Callable[[str], Path]) -> None:
    results: dict[int, list[list[int]]] = {}
    with Tokenizer(path=tiny_model("llama") / "tokenizer.json") as found:
        expected = {number: found.ids("word " * number) for number in range(4)}

        def work(number: int) -> None:
            results[number] = [found.ids("word " * number) for _ in range(20)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(ids == expected[number] for number, all_ids in results.items() for ids in all_ids)


@pytest.mark.parametrize("template", ["{{ raise_exception('no users here') }}", "{% if", "{{ ''.__class__.__mro__ }}"])
def test_a_refusal_is_the_templates(template: str) -> None:
    with pytest.raises(ChatTemplateError):
        render_chat(template, {"messages": []})
