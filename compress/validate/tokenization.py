"""The worker that tokenizes with transformers where there is no ``tokenizer.json`` (see ``protocol``).

Request: ``directory``, ``texts`` [str]. Each result is ``[ids with special tokens, ids without]``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.validate.protocol import Json, serve


def handle(request: Json, job: Path) -> Json:
    """Encode every text both ways."""
    from transformers import AutoTokenizer

    directory = request["directory"]
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - transformers raises whatever a tokenizer's own code raises
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CompressError(f"there is no tokenizer that transformers can read: {what}", where=directory) from error
    results = [
        [tokenizer(text)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]]
        for text in request["texts"]
    ]
    return {"results": results}


if __name__ == "__main__":
    sys.exit(serve(handle))
