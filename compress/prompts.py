"""From words to a prompt's ids, and where a completion ends: an artifact's tokenizer, chat template and config."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import CompressError, SourceError
from compress.source.base import find_sidecars
from compress.source.files import MAX_CONFIG_BYTES, read_json_object
from compress.tokens import ChatTemplateError, Tokenizer, render_chat

__all__ = ["ChatTemplateError", "PromptTokenizer", "encode", "encode_chat", "end_tokens", "tokenizer_of"]
_TOKENIZER_NAME = "tokenizer.json"


class PromptTokenizer:
    """A tokenizer as transformers reads it; it encodes, decodes and writes conversations in a process under limits.

    Only one that the library ``tokenizers`` has no form of runs here: code of transformers, on the model's vocabulary.

    Args:
        read: transformers' tokenizer.
        label: The artifact, for messages.

    Raises:
        CompressError: It takes more time or memory than any tokenizer.
    """

    def __init__(self, read: Any, label: str) -> None:  # noqa: ANN401 - transformers' own
        self._read = read
        backend = getattr(read, "backend_tokenizer", None)
        self._runs = None if backend is None else Tokenizer(document=backend.to_str(), label=label)
        cleaned = bool(getattr(read, "clean_up_tokenization_spaces", False))
        byte_pairs = backend is not None and type(backend.model).__name__ == "BPE"
        forced = bool(getattr(read, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False))
        self._cleans = cleaned and (forced or not byte_pairs)

    @property
    def chat_template(self) -> Any:  # noqa: ANN401
        """The template, a mapping of templates, or nothing."""
        return getattr(self._read, "chat_template", None)

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        """Return a text's ids, with the special tokens that the model begins or ends with if ``special``."""
        if self._runs is None:
            return list(self._read(text, add_special_tokens=special)["input_ids"])
        return self._runs.ids(text, special=special)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        if self._runs is None:
            return str(self._read.decode(list(ids), skip_special_tokens=skip_special_tokens))
        text = self._runs.decode(ids, skip_special_tokens=skip_special_tokens)
        return str(self._read.clean_up_tokenization(text)) if self._cleans else text

    def converse(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return what the chat template makes of a conversation, up to where the model's answer begins.

        Raises:
            ChatTemplateError: The template refuses it.
            CompressError: The template takes time or memory without an end.
        """
        try:
            template = self._read.get_chat_template(None)
        except ValueError as error:
            raise ChatTemplateError(str(error)) from error
        if not isinstance(template, str):
            raise ChatTemplateError("it is no text")
        named = {str(name): str(token) for name, token in self._read.special_tokens_map.items()}
        given = {"messages": [dict(message) for message in messages], "tools": None, "documents": None}
        return render_chat(template, {**named, **given, "add_generation_prompt": True})


def tokenizer_of(artifact: Path) -> PromptTokenizer:
    """Return the artifact's tokenizer, read by transformers, which runs no code of the artifact.

    Raises:
        CompressError: It cannot be read, or takes more time or memory than any tokenizer.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if _TOKENIZER_NAME in find_sidecars(artifact):  # sizes and links of all of them are checked
        # Whatever reading it may do to a process, it does to that one first.
        Tokenizer(path=artifact / _TOKENIZER_NAME).close()
    from transformers import AutoTokenizer

    try:
        read = AutoTokenizer.from_pretrained(str(artifact), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - transformers raises whatever a tokenizer's own code raises
        raise CompressError(
            f"the artifact's tokenizer cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}",
            where=str(artifact),
        ) from error
    return PromptTokenizer(read, str(artifact))


def has_chat_template(tokenizer: PromptTokenizer) -> bool:
    """Return whether there is a template that makes a prompt of what a user says."""
    return bool(tokenizer.chat_template)


def encode(tokenizer: PromptTokenizer, prompt: str, chat: bool) -> list[int]:
    """Return a prompt's ids; with ``chat`` as what a user says, where the tokenizer has a template for it."""
    if chat and has_chat_template(tokenizer):
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    return tokenizer.ids(prompt)


def encode_chat(tokenizer: PromptTokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Return the ids of a conversation (``role`` and ``content`` each), up to where the model's answer begins.

    Raises:
        ChatTemplateError: The template refuses the conversation.
    """
    return tokenizer.ids(tokenizer.converse(messages), special=False)


def end_tokens(artifact: Path) -> set[int]:
    """Return the end-of-sequence ids of the generation config, or of the config.

    Raises:
        SourceError: They are no ids.
    """
    for name in ("generation_config.json", "config.json"):
        path = artifact / name
        if path.is_file():
            value = read_json_object(path, MAX_CONFIG_BYTES).get("eos_token_id")
            ids = value if isinstance(value, list) else [value]
            if value is not None and not all(type(token) is int and 0 <= token < 1 << 31 for token in ids):
                raise SourceError(f"eos_token_id is {value!r:.80}, a token id was expected", where=name)
            if value is not None:
                return set(ids)
    return set()
