"""The worker that tokenizes with transformers where there is no ``tokenizer.json`` (see ``protocol``).

Request: ``directory``, ``texts`` [str]. Each result is ``[ids with special tokens, ids without]``. With ``pairs``
``[[text, other text or null]]`` and ``max_length`` there is one more result, a list with, for each pair, ``[ids,
token_type_ids, which are special, whether it was cut]``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.limits import limit
from compress.validation.protocol import Json, serve

#: What it may compute and allocate once the library is loaded; Python tokenizers are slow.
BASE_SECONDS, CHARACTERS_A_SECOND = 60.0, 5_000
MEMORY = 6 << 30


def handle(request: Json, job: Path) -> Json:
    """Encode every text both ways, and every pair for a model."""
    from transformers import AutoTokenizer

    directory = request["directory"]
    limit(BASE_SECONDS + sum(map(len, request["texts"])) / CHARACTERS_A_SECOND, MEMORY)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - transformers raises whatever a tokenizer's own code raises
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CompressError(f"there is no tokenizer that transformers can read: {what}", where=directory) from error
    results: list[Any] = [
        [tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]]
        for text in request["texts"]
    ]
    if "pairs" in request:
        results.append([_pair(tokenizer, a, b, request["max_length"]) for a, b in request["pairs"]])
    return {"results": results}


def _pair(tokenizer: Any, text: str, other: str | None, max_length: int) -> list[Any]:  # noqa: ANN401
    whole = len(tokenizer(text, other)["input_ids"])
    made = tokenizer(
        text, other, truncation=True, max_length=max_length, return_token_type_ids=True, return_special_tokens_mask=True
    )
    special = [bool(flag) for flag in made["special_tokens_mask"]]
    return [made["input_ids"], made["token_type_ids"], special, whole > max_length]


if __name__ == "__main__":
    sys.exit(serve(handle))
