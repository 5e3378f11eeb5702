"""GGUF architectures as Hugging Face models: tensor names, stored layout and config.

Sources: llama.cpp's ``convert_hf_to_gguf.py`` (what it renames, permutes and transposes) and
``gguf/tensor_mapping.py``. Each entry is undone here; the rest of the package sees a Hugging Face checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from compress.errors import SourceError, UnsupportedModelError
from compress.source.gguf_header import GgufHeader

Layout = Literal["plain", "heads", "kv_heads", "transposed"]

_ROTARY_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_BLOCK = re.compile(r"blk\.(\d{1,6})\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """How one ``general.architecture`` becomes a Hugging Face model.

    Attributes:
        outer: GGUF module name -> Hugging Face module name, outside the blocks.
        prefix: What stands before a block's number.
        block: The same inside a block.
        layouts: GGUF module name -> how its rows were rearranged; ``plain`` if absent.
        config: Makes the config from the header.
    """

    outer: Mapping[str, str]
    prefix: str
    block: Mapping[str, str]
    layouts: Mapping[str, Layout]
    config: Callable[[GgufHeader, _Keys], dict[str, Any]]

    def rename(self, name: str) -> tuple[str, Layout] | None:
        """Return a tensor's Hugging Face name and layout, or ``None`` if this architecture has no such tensor."""
        if match := _BLOCK.fullmatch(name):
            number, module, suffix = match.groups()
            if module not in self.block:
                return None
            layout = self.layouts.get(module, "plain")
            if layout == "transposed" and suffix == "bias":
                layout = "plain"
            return f"{self.prefix}.{int(number)}.{self.block[module]}.{suffix}", layout
        module, _, suffix = name.rpartition(".")
        if module not in self.outer or suffix not in ("weight", "bias"):
            return None
        return f"{self.outer[module]}.{suffix}", "plain"


class _Keys:
    """Metadata of one architecture, by its short key, type-checked."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        self.metadata = metadata
        self.architecture = architecture

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise SourceError(
                f"the metadata {self.architecture}.{key} is {_shown(value)}, not a count", where="GGUF header"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise SourceError(
                f"the metadata {self.architecture}.{key} is {_shown(value)}, not a number", where="GGUF header"
            )
        return float(value)

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:40]


def build_config(header: GgufHeader) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture and a ``config.json`` for a GGUF file.

    ``rope_theta`` stands beside ``rope_parameters``: transformers 5 reads the latter, older versions the former.

    Raises:
        SourceError: A metadata key is missing or of the wrong type.
        UnsupportedModelError: The architecture has no mapping, or the file asks for something that has none.
    """
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise SourceError("the metadata general.architecture is missing", where="GGUF header")
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise UnsupportedModelError(
            f"the GGUF architecture {name!r} is not supported", hint=f"supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    if header.metadata.get("split.count", 0) not in (0, 1):
        raise UnsupportedModelError(
            "a GGUF model split into several files is not supported",
            hint="merge it first: llama-gguf-split --merge FIRST-FILE OUTPUT",
        )
    keys = _Keys(header.metadata, name)
    if keys.integer("expert_count", 0):
        raise UnsupportedModelError("a mixture of experts is not supported", where="GGUF header")
    for tensor in ("token_embd.weight",):
        if tensor not in header.tensors:
            raise SourceError(f"tensor {tensor!r} is missing", where="GGUF header")
    config = architecture.config(header, keys)
    config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        config[f"{name}_token_id"] = _token_id(header.metadata, f"tokenizer.ggml.{key}_token_id", config["vocab_size"])
    config |= {"dtype": "float32", "torch_dtype": "float32", "use_cache": True}
    return architecture, dict(sorted(config.items()))


def ignored(name: str) -> bool:
    """Return whether a tensor is no weight: rotary factors go into the config, or were refused there."""
    return name in _ROTARY_FACTORS or name.endswith(".attn_rot_embd.weight")


def _token_id(metadata: Mapping[str, Any], key: str, vocab_size: int) -> int | None:
    value = metadata.get(key)
    return value if isinstance(value, int) and 0 <= value < vocab_size else None


def _rotary(header: GgufHeader, keys: _Keys, head_dim: int) -> dict[str, Any]:
    """Return the config's rotary keys; a scaling that a config cannot state exactly is refused."""
    if "rope_freqs.weight" in header.tensors:
        raise UnsupportedModelError(
            "the file holds rotary frequency factors (Llama 3.1 scaling), whose parameters cannot be recovered",
            where="rope_freqs.weight",
            hint="use the Hugging Face checkpoint that the file was made from",
        )
    theta = keys.number("rope.freq_base", 10000.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = keys.get("rope.scaling.type")
    if "rope_factors_long.weight" in header.tensors or kind not in (None, "none", "linear"):
        raise UnsupportedModelError(
            f"the file asks for {kind or 'longrope'} rotary scaling, which a GGUF states only in part",
            where="GGUF header",
            hint="use the Hugging Face checkpoint that the file was made from",
        )
    scaling = None
    if kind == "linear" and keys.number("rope.scaling.factor") != 1.0:
        rope |= {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
        scaling = {"rope_type": "linear", "type": "linear", "factor": rope["factor"]}
    if not head_dim:
        raise SourceError("heads have no width", where="GGUF header")
    rotated = keys.integer("rope.dimension_count", head_dim)
    partial = {}
    if rotated != head_dim:
        rope["partial_rotary_factor"] = partial["partial_rotary_factor"] = rotated / head_dim
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": rope, **partial}


def _rotary_decoder(header: GgufHeader, keys: _Keys) -> dict[str, Any]:
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    kv_heads = keys.integer("attention.head_count_kv", heads)
    if not heads or not kv_heads or hidden % heads or heads % kv_heads:
        raise SourceError(
            f"{heads} heads, {kv_heads} of them with keys, do not fit width {hidden}", where="GGUF header"
        )
    head_dim = keys.integer("attention.key_length", hidden // heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModelError("keys and values of different widths are not supported", where="GGUF header")
    return {
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **_rotary(header, keys, head_dim),
    }


def _llama(header: GgufHeader, keys: _Keys) -> dict[str, Any]:
    config = _rotary_decoder(header, keys)
    if "partial_rotary_factor" in config:
        raise UnsupportedModelError("a llama whose heads are rotated in part is not supported", where="GGUF header")
    # llama.cpp has one architecture for both; they differ in the attention window, which only Mistral's config knows.
    if "mistral" in f"{header.metadata.get('general.name')} {header.metadata.get('general.basename')}".lower():
        window = keys.integer("attention.sliding_window", 0) or None
        return config | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    return config | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "pretraining_tp": 1,
    }


def _phi3(header: GgufHeader, keys: _Keys) -> dict[str, Any]:
    config = _rotary_decoder(header, keys)
    context = config["max_position_embeddings"]
    return config | {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", context),
        "sliding_window": keys.integer("attention.sliding_window", 0) or None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attention_bias": False,
    }


def _gpt2(header: GgufHeader, keys: _Keys) -> dict[str, Any]:
    context = keys.integer("context_length")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_ctx": context,
        "n_positions": context,
        "n_embd": keys.integer("embedding_length"),
        "n_head": keys.integer("attention.head_count"),
        "n_layer": keys.integer("block_count"),
        "n_inner": keys.integer("feed_forward_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


_DECODER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        outer=_DECODER,
        prefix="model.layers",
        block={
            **_NORMS,
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        },
        layouts={"attn_q": "heads", "attn_k": "kv_heads"},
        config=_llama,
    ),
    "phi3": Architecture(
        outer=_DECODER,
        prefix="model.layers",
        block={
            **_NORMS,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        layouts={},
        config=_phi3,
    ),
    "gpt2": Architecture(
        outer={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        prefix="transformer.h",
        block={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        layouts=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), "transposed"),
        config=_gpt2,
    ),
}
