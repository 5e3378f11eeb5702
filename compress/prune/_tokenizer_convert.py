"""Make a ``tokenizer.json`` of older files (``vocab.txt``, ``tokenizer.model`` ...), in a process of its own.

transformers imports torch to do this. So it is run as ``python -m compress.prune._tokenizer_convert DIRECTORY OUTPUT``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress import temporary
from compress.children import follow_parent, run_module
from compress.errors import SourceError
from compress.limits import limit
from compress.prune._tokenizer_json import TOKENIZER_NAME
from compress.source.files import MAX_CONFIG_BYTES, read_json_object

TIMEOUT_SECONDS = 300
#: What it may compute and allocate once the libraries are loaded.
CONVERT_SECONDS = 120.0
CONVERT_MEMORY = 4 << 30


@contextmanager
def with_tokenizer_json(directory: Path) -> Iterator[Path]:
    """Give a directory whose tokenizer files include ``tokenizer.json``: this one, or a temporary one.

    Raises:
        SourceError: There is none, and transformers cannot make one.
    """
    if (directory / TOKENIZER_NAME).is_file():
        yield directory
        return
    with temporary.directory("compress-tokenizer-") as made:
        output = Path(made)
        try:
            done = run_module(__name__, str(directory.resolve()), str(output), timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise SourceError("reading the tokenizer took longer than 5 minutes", where=directory.name) from error
        if done.returncode != 0 or not (output / TOKENIZER_NAME).is_file():
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise SourceError(
                f"a vocabulary can only be trimmed with a {TOKENIZER_NAME}, and none can be made: {lines[-1][:300]}",
                where=directory.name,
                hint="load the tokenizer with transformers where it works, save it, and use those files",
            )
        yield output


def _convert(directory: Path, output: Path) -> None:
    from transformers import AutoTokenizer

    limit(CONVERT_SECONDS, CONVERT_MEMORY)
    tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    tokenizer.save_pretrained(str(output))
    path = output / "tokenizer_config.json"
    config = read_json_object(path, MAX_CONFIG_BYTES)
    if config.get("tokenizer_class") == "TokenizersBackend":  # a name that versions before 5 do not know
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for local in ("is_local", "local_files_only", "name_or_path"):
        config.pop(local, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    follow_parent()
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
