"""The process that runs a model's tokenizer and chat template, which are programs of whoever made the model.

A regular expression of a tokenizer may backtrack without end, a template may loop, either may ask for all memory there
is, and the library ends by a panic that is no ``Exception``. So they run here, under limits of computing time and
memory that :mod:`compress.tokens` names with every request; what is over a limit ends this process and not the command.

One JSON request a line on standard input, one answer a line on standard output. It imports as little as it can, and
starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from compress.limits import limit

#: Characters that a chat template may write; more than any context of a small model.
MAX_RENDERED = 16 << 20

Json = dict[str, Any]
_loaded: dict[int, Any] = {}


class TemplateFault(Exception):
    """A chat template refuses a conversation, or is none."""


def _load(request: Json) -> Json:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(request["path"]) if "path" in request else Tokenizer.from_str(request["document"])
    # Files often come with the padding and truncation of whoever saved them.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _loaded[request["slot"]] = tokenizer
    return {}


def _encode(request: Json) -> Json:
    tokenizer = _loaded[request["slot"]]
    length, special = request["length"], request["special"]
    if length is None:
        tokenizer.no_truncation()
    else:
        tokenizer.enable_truncation(length)
    found = [tokenizer.encode(a, b, add_special_tokens=special) for a, b in request["texts"]]
    taken: dict[str, Callable[[Any], Any]] = {
        "ids": lambda item: item.ids,
        "types": lambda item: item.type_ids,
        "special": lambda item: item.special_tokens_mask,
        "cut": lambda item: bool(item.overflowing),
        "offsets": lambda item: item.offsets,
        "words": lambda item: item.word_ids,
    }
    return {"encoded": [{name: taken[name](item) for name in request["fields"]} for item in found]}


def _split(request: Json) -> Json:
    """Return the words that the model of a tokenizer sees of a text."""
    tokenizer, text = _loaded[request["slot"]], request["text"]
    normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    if tokenizer.pre_tokenizer is None:
        return {"words": [normal]}
    return {"words": [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]}


def _decode(request: Json) -> Json:
    return {"text": _loaded[request["slot"]].decode(request["ids"], skip_special_tokens=request["skip_special"])}


def _vocabulary(request: Json) -> Json:
    tokenizer = _loaded[request["slot"]]
    added = tokenizer.get_added_tokens_decoder()
    return {
        "vocabulary": tokenizer.get_vocab(with_added_tokens=True),
        "special": sorted(number for number, token in added.items() if token.special),
    }


def _render(request: Json) -> Json:
    from jinja2 import TemplateError

    try:
        pieces: list[str] = []
        size = 0
        for piece in _environment().from_string(request["template"]).generate(**request["variables"]):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_RENDERED:
                raise TemplateFault(f"it writes more than {MAX_RENDERED >> 20} million characters")
    except TemplateError as error:
        raise TemplateFault(str(error)) from error
    except RecursionError as error:
        raise TemplateFault("it is nested too deeply") from error
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a template raises what the operations in it raise
        raise TemplateFault(f"{type(error).__name__}: {error}") from error
    return {"text": "".join(pieces)}


def _environment() -> Any:
    """Return what chat templates are written for: a sandbox, with the names that transformers gives them."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``: marks what the assistant said, for training; elsewhere it is its content."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


_ACTIONS: Mapping[str, Callable[[Json], Json]] = {
    "load": _load,
    "encode": _encode,
    "split": _split,
    "decode": _decode,
    "vocabulary": _vocabulary,
    "render": _render,
}


def _answer(request: Json) -> Json:
    try:
        return _ACTIONS[request["do"]](request)
    except TemplateFault as error:
        return {"error": "template", "what": str(error)}
    except MemoryError:
        return {"error": "memory", "what": "it asks for more memory than it may have"}
    except BaseException as error:  # noqa: BLE001 - a panic of the library is a BaseException of its own
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return {"error": "tokenizer", "what": (str(error).splitlines() or [type(error).__name__])[0]}


def main() -> None:
    """Answer requests until there are no more."""
    import jinja2  # noqa: F401 - now, so that what limits are set for does not include it
    import tokenizers  # noqa: F401

    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin.buffer:
        request = json.loads(line)
        for slot in request["dropped"]:
            _loaded.pop(slot, None)
        limit(request["seconds"], request["memory"])
        answers.write(json.dumps(_answer(request)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
