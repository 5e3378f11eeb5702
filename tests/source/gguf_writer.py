"""Write a tiny Hugging Face model as GGUF the way llama.cpp's converter does, by the gguf package's own name tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "phi3": "phi3", "gpt2": "gpt2"}
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def round_trip(name: str, weight: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Return what a Hugging Face tensor becomes by being stored as ``kind``; rows are quantized one by one, so
    llama.cpp's permutation of rows changes nothing."""
    if weight.ndim == 1:
        return weight
    turned = name.endswith(TRANSPOSED)
    stored = dequantize(quantize(np.ascontiguousarray(weight.T if turned else weight), kind), kind)
    return stored.T if turned else stored


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp, convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(model: Path, path: Path, kind: GGMLQuantizationType, **extra: Any) -> dict[str, np.ndarray]:
    """Write the model and return what every Hugging Face tensor must read as. ``extra`` are more metadata integers."""
    config = json.loads((model / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    layers = config.get("num_hidden_layers") or config["n_layer"]
    writer = gguf.GGUFWriter(str(path), architecture)
    if config["model_type"] == "mistral":
        writer.add_name("Tiny Mistral")
    _metadata(writer, config, layers)
    for key, value in extra.items():
        writer.add_uint32(key, value)
    _vocabulary(writer, model)
    names = gguf.get_tensor_name_map(
        next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture), layers
    )
    expected = {}
    for name, weight in load_file(model / "model.safetensors").items():
        module, _, suffix = name.rpartition(".")
        expected[name] = round_trip(name, weight, kind)
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            weight = permute(
                weight, config["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"]
            )
        if name.endswith(TRANSPOSED):
            weight = np.ascontiguousarray(weight.T)
        stored = GGMLQuantizationType.F32 if weight.ndim == 1 else kind
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _metadata(writer: gguf.GGUFWriter, config: dict[str, Any], layers: int) -> None:
    writer.add_block_count(layers)
    if config["model_type"] == "gpt2":
        writer.add_context_length(config["n_positions"])
        writer.add_embedding_length(config["n_embd"])
        writer.add_feed_forward_length(4 * config["n_embd"])
        writer.add_head_count(config["n_head"])
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])


def _vocabulary(writer: gguf.GGUFWriter, model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    special = {entry["id"] for entry in tokenizer["added_tokens"]}
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index in special else 1 for index in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages }}")
