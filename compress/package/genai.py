"""Target ``genai``: ``genai_config.json``, with which onnxruntime-genai loads the directory as it is.

Unknown keys are a hard parse error there, so only documented ones are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from compress.contracts import Checkpoint, Decoder, Structure
from compress.errors import SourceError
from compress.package.staging import write_file
from compress.package.target import Needs, Package, Wish
from compress.source.files import MAX_CONFIG_BYTES, read_json_object

TARGET = "genai"
NAME = "genai_config.json"
GENERATION_NAME = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
#: Sampling values of a generation config, and what they are where it does not say.
SEARCH_DEFAULTS: Mapping[str, int | float] = {"repetition_penalty": 1.0, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
MAX_SEARCH_VALUE = 1e6
#: Tokens of a prompt that a graph whose scores are held whole is fed at once: they fit a processor's caches then.
PROMPT_PIECE = 256
_RESTORE = "restore the file that belongs to this model"


def applies(structure: Structure) -> bool:
    """Return whether the target can take such a model: onnxruntime-genai runs decoders."""
    return isinstance(structure, Decoder)


def check(wish: Wish) -> None:
    """Read what :func:`write` will need.

    Raises:
        SourceError: It is damaged.
    """
    read_generation(wish.checkpoint)


def needs(wish: Wish) -> Needs:
    """Return what it takes beside the model: nothing."""
    return Needs()


def write(package: Package) -> None:
    """Write ``genai_config.json``: the model's sizes, its special tokens, the names of its inputs and outputs."""
    decoder, checkpoint, inputs = package.structure, package.checkpoint, package.inputs
    assert isinstance(decoder, Decoder)
    special, search = read_generation(checkpoint)
    eos = special["eos_token_id"]
    first_eos = eos[0] if isinstance(eos, list) else eos
    names = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    model: dict[str, Any] = {
        "type": decoder.genai_type,
        "vocab_size": decoder.vocab_size,
        "context_length": decoder.context_length,
        "bos_token_id": special["bos_token_id"] if special["bos_token_id"] is not None else first_eos,
        "eos_token_id": eos,
        # Padding is only looked at in batches; without such a token the end token pads, as in transformers.
        "pad_token_id": special["pad_token_id"] if special["pad_token_id"] is not None else first_eos,
        "decoder": {
            "filename": "model.onnx",
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "hidden_size": decoder.hidden_size,
            "head_size": decoder.head_dim,
            "num_attention_heads": decoder.heads,
            "num_key_value_heads": decoder.kv_heads,
            "num_hidden_layers": decoder.layers,
            "inputs": {
                **names,
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    search = {
        "max_length": decoder.context_length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        # Bounds the scores of a long prompt; the runtime's own way has no need of it.
        **({"chunk_size": PROMPT_PIECE} if package.plan.attention == "materialized" else {}),
        **search,
    }
    model = {key: value for key, value in model.items() if value is not None}
    write_file(
        package.directory / NAME, json.dumps({"model": model, "search": search}, indent=2, sort_keys=True) + "\n"
    )


def read_generation(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the special tokens and the sampling defaults: the generation config's, else the config's own tokens.

    Raises:
        SourceError: ``generation_config.json`` is damaged, or a value in it is not what its key promises.
    """
    path = checkpoint.sidecars().get(GENERATION_NAME)
    generation = read_json_object(path, MAX_CONFIG_BYTES, GENERATION_NAME) if path is not None else {}
    special = {key: _token(key, generation, checkpoint.config) for key in TOKENS}
    search: dict[str, Any] = {"do_sample": generation.get("do_sample") is True}
    for key, default in SEARCH_DEFAULTS.items():
        value = generation.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_SEARCH_VALUE:
            raise SourceError(f"{key} is {value!r}, a number was expected", where=GENERATION_NAME, hint=_RESTORE)
        # 0 is no value that sampling could use: it stands for "unset".
        search[key] = type(default)(value) if value else default
    return special, search


def _token(key: str, generation: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    where, value = GENERATION_NAME, generation.get(key)
    if value is None:
        where, value = "config.json", config.get(key)
    ids = value if isinstance(value, list) else [value]
    if value is not None and not (ids and all(type(token) is int and 0 <= token < 1 << 31 for token in ids)):
        raise SourceError(f"{key} is {value!r}, a token id was expected", where=where, hint=_RESTORE)
    return value
