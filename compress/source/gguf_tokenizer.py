"""Rebuild Hugging Face tokenizer files from a GGUF file, in a process of its own.

transformers imports torch and maps the file to do this: hundreds of megabytes that a process which promises a peak
memory must not take. So it is run as ``python -m compress.source.gguf_tokenizer FILE DIRECTORY``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.children import follow_parent, run_module
from compress.errors import SourceError
from compress.limits import limit
from compress.source.files import MAX_CONFIG_BYTES, read_json_object

TIMEOUT_SECONDS = 300
#: What rebuilding may compute and allocate once the libraries are loaded; a vocabulary of 256,000 takes a fifth.
REBUILD_SECONDS = 120.0
REBUILD_MEMORY = 4 << 30
# llama.cpp (llama-vocab.cpp) splits digits one by one, then by GPT-2's pattern, for these `tokenizer.ggml.pre`;
# transformers forgets the digits, which shows after two spaces.
DIGIT_SPLITTERS = ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b")
# Plain GPT-2. Files from before the key existed say nothing, or "default".
PLAIN = (None, "", "default", "gpt-2", "gpt2", "mpt", "olmo", "jais", "phi-2")


def write_tokenizer(model: Path, metadata: Mapping[str, Any], directory: Path) -> None:
    """Write the tokenizer's files of a GGUF file into ``directory``; none if the file holds no vocabulary.

    Args:
        model: The ``.gguf`` file.
        metadata: Its metadata.
        directory: Existing directory; gets ``tokenizer.json``, ``tokenizer_config.json``, ``generation_config.json``
            and, if there is one, ``chat_template.jinja``.

    Raises:
        SourceError: The vocabulary is damaged, or of a kind that cannot be rebuilt exactly.
    """
    generation = {
        f"{name}_token_id": metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if isinstance(metadata.get(f"tokenizer.ggml.{key}_token_id"), int)
    }
    _write_json(directory / "generation_config.json", generation)
    if not metadata.get("tokenizer.ggml.tokens"):
        return
    try:
        done = run_module(__name__, str(model.resolve()), str(directory.resolve()), timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise SourceError("rebuilding the tokenizer took longer than 5 minutes", where=model.name) from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SourceError(
            f"the tokenizer cannot be rebuilt from the GGUF file: {lines[-1][:300]}",
            where=model.name,
            hint="use the Hugging Face checkpoint that the file was made from",
        )


def _rebuild(model: Path, directory: Path) -> None:
    """Build and save the tokenizer with transformers, then mend what it gets wrong."""
    from transformers import PreTrainedTokenizerFast

    from compress.source.gguf_header import read_header

    limit(REBUILD_SECONDS, REBUILD_MEMORY)
    metadata = read_header(model).metadata
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    digits = kind == "gpt2" and pre in DIGIT_SPLITTERS
    if kind == "gpt2" and not digits and pre not in PLAIN and pre not in _known_splits():
        raise SystemExit(f"how {pre!r} splits text is not known")
    # Not AutoTokenizer: to find a class it builds the config too, with a reader that takes ten seconds.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(model.parent), gguf_file=model.name)
    tokenizer.save_pretrained(str(directory))
    if digits:
        _split_digits(directory / "tokenizer.json")
    config = read_json_object(directory / "tokenizer_config.json", MAX_CONFIG_BYTES)
    # transformers 5 writes `TokenizersBackend`, a name that versions before it do not know.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for local in ("is_local", "local_files_only", "name_or_path", "gguf_file"):
        config.pop(local, None)
    _write_json(directory / "tokenizer_config.json", config)


def _known_splits() -> frozenset[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # another version of transformers: accept nothing that it might ignore
        return frozenset()
    return frozenset(GGUF_PRE_TOKENIZER_SPLITS)


def _split_digits(path: Path) -> None:
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = Tokenizer.from_file(str(path))
    # The stubs know only an abstract pre-tokenizer here.
    steps: Any = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.save(str(path))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    follow_parent()
    _rebuild(Path(sys.argv[1]), Path(sys.argv[2]))
