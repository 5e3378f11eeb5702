"""From words to a prompt's ids, and where a completion ends: an artifact's tokenizer, chat template and config."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import CompressError


def tokenizer_of(artifact: Path) -> Any:  # noqa: ANN401 - transformers' own
    """Return the artifact's tokenizer, read by transformers, which runs no code of the artifact.

    Raises:
        CompressError: It cannot be read.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(artifact), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CompressError(
            f"the artifact's tokenizer cannot be read: {str(error).splitlines()[0]}", where=str(artifact)
        ) from error


def has_chat_template(tokenizer: Any) -> bool:  # noqa: ANN401
    """Return whether there is a template that makes a prompt of what a user says."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:  # noqa: ANN401
    """Return a prompt's ids; with ``chat`` as what a user says, where the tokenizer has a template for it."""
    if chat and has_chat_template(tokenizer):
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    return list(tokenizer(prompt)["input_ids"])


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:  # noqa: ANN401
    """Return the ids of a conversation (``role`` and ``content`` each), up to where the model's answer begins."""
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_tokens(artifact: Path) -> set[int]:
    """Return the end-of-sequence ids of the generation config, or of the config."""
    for name in ("generation_config.json", "config.json"):
        path = artifact / name
        if path.is_file():
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            if value is not None:
                return set(value) if isinstance(value, list) else {value}
    return set()
