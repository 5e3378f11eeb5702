"""Target ``genai``: ``genai_config.json``, with which onnxruntime-genai loads the directory as it is.

Unknown keys are a hard parse error there, so only documented ones are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.contracts import Checkpoint, Decoder
from compress.package.staging import write_file

NAME = "genai_config.json"


def write(directory: Path, decoder: Decoder, checkpoint: Checkpoint, *, inputs: tuple[str, ...]) -> None:
    """Write ``genai_config.json``.

    Args:
        directory: The artifact.
        decoder: Sizes of the model.
        checkpoint: Its config and generation config name the special tokens.
        inputs: The graph's input names.
    """
    generation = _generation_config(checkpoint)
    special = {key: _token(key, generation, checkpoint.config) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    eos = special["eos_token_id"]
    first_eos = eos[0] if isinstance(eos, list) else eos
    names = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    model: dict[str, Any] = {
        "type": decoder.genai_type,
        "vocab_size": decoder.vocab_size,
        "context_length": decoder.context_length,
        "bos_token_id": special["bos_token_id"] if special["bos_token_id"] is not None else first_eos,
        "eos_token_id": eos,
        # Padding is only looked at in batches; a model without such a token pads with its end token, as transformers does.
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
            "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
        },
    }
    search = {
        "do_sample": bool(generation.get("do_sample", False)),
        "max_length": decoder.context_length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": float(generation.get("repetition_penalty") or 1.0),
        "temperature": float(generation.get("temperature") or 1.0),
        "top_k": int(generation.get("top_k") or 50),
        "top_p": float(generation.get("top_p") or 1.0),
    }
    model = {key: value for key, value in model.items() if value is not None}
    write_file(directory / NAME, json.dumps({"model": model, "search": search}, indent=2, sort_keys=True) + "\n")


def _generation_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    path = checkpoint.sidecars().get("generation_config.json")
    if path is None:
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _token(key: str, generation: Mapping[str, Any], config: Mapping[str, Any]) -> Any:
    value = generation.get(key)
    return value if value is not None else config.get(key)
