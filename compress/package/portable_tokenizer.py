"""Tokenizer files that transformers 4 and transformers.js read as well as transformers 5, which wrote them.

transformers 5 saves ``tokenizer_class: TokenizersBackend``, a list of extra special tokens and the chat template in a
file of its own; the others know none of it. What is written here, all of them read; ids do not change.
"""

from __future__ import annotations

import json
from pathlib import Path

from compress.package.staging import write_file
from compress.source.files import MAX_CONFIG_BYTES, read_json_object

CONFIG_NAME, TEMPLATE_NAME = "tokenizer_config.json", "chat_template.jinja"
_NEW_CLASSES = frozenset({"TokenizersBackend", "TokenizersBackendFast"})
_CLASS = "PreTrainedTokenizerFast"


def make_portable(directory: Path, *, inline_template: bool = False) -> None:
    """Rewrite an artifact's ``tokenizer_config.json`` where an older reader would stumble; else it stays as it is.

    Args:
        directory: The artifact.
        inline_template: Put the chat template into the config too, which transformers.js looks for nowhere else.

    Raises:
        SourceError: The file is damaged.
    """
    path, template = directory / CONFIG_NAME, directory / TEMPLATE_NAME
    if not path.is_file():
        return
    before = read_json_object(path, MAX_CONFIG_BYTES, CONFIG_NAME)
    config = dict(before)
    if config.get("tokenizer_class") in _NEW_CLASSES:
        config["tokenizer_class"] = _CLASS
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        config["additional_special_tokens"] = [*config.get("additional_special_tokens", []), *extra]
        del config["extra_special_tokens"]
    if inline_template and "chat_template" not in config and template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    if config != before:
        write_file(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
