"""Write a random-weight checkpoint with the exact shape of a real model: ``geometry.py phi-3 OUT``.

Memory and time of an export depend on a model's geometry, not on what it has learnt, so they can be measured where the
real weights cannot be had. What comes out is an ordinary Hugging Face directory (config.json, sharded safetensors with
an index, tokenizer) whose values look like a trained model's to a quantizer: normal, a spread of row norms, and a few
outlier channels in the residual stream. It has learnt nothing: accuracy measured on it means nothing.

Method. Drawing 3.8 billion normals takes minutes. Instead one pool of float32 normals is drawn, and a block of rows is
a random stretch of it, multiplied by factors of its own for each row and for each outlier channel, then rounded to
bfloat16. Stretches and factors come from a generator seeded with the tensor's name, so no two tensors are alike, and
the same seed gives the same bytes. Blocks are written as they are made: memory is the pool plus one block.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

POOL = (1 << 24) + 43  # normals; 64 MiB, and no multiple of any row length
BLOCK = 1 << 22  # elements made at a time
SHARD_BYTES = 2 * 10**9
_SPECIAL: tuple[str, ...] = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = {"bf16": ("BF16", 2, "bfloat16"), "f16": ("F16", 2, "float16"), "f32": ("F32", 4, "float32")}

# The published config.json of each model, less the keys that name remote code.
CONFIGS: dict[str, dict[str, Any]] = {
    "phi-3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 32064,
    },
    "tinyllama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 32000,
    },
    "zephyr": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 32000,
    },
    "smollm2": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 49152,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "embd_pdrop": 0.1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "vocab_size": 50257,
    },
}


@dataclass(frozen=True)
class Spec:
    """One tensor to write.

    Attributes:
        name: Its name in the checkpoint.
        shape: Dimensions, outermost first.
        kind: ``matrix``; ``norm`` (around 1); ``bias`` (around 0); ``mask`` (GPT-2's causal mask, always float32).
        scale: Standard deviation of a matrix.
        channels: Which axis of a matrix runs along the residual stream and has its outliers; ``None`` if neither does.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = "matrix"
    scale: float = 0.02
    channels: int | None = None

    def stored(self, dtype: str) -> tuple[str, int]:
        """Return the safetensors dtype and the size in bytes."""
        label, width, _ = DTYPES["f32" if self.kind == "mask" else dtype]
        return label, width * int(np.prod(self.shape))


def specs(config: Mapping[str, Any]) -> list[Spec]:
    """Return the tensors of a model in the order of the published checkpoints, which GPT-2 stores without a prefix."""
    return _gpt2_specs(config) if config["model_type"] == "gpt2" else _gated_specs(config)


def _gated_specs(config: Mapping[str, Any]) -> list[Spec]:
    """Llama, Mistral and Phi-3: RMS norms, rotary positions, a gated MLP; Phi-3 packs QKV and gate/up."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    kv = hidden // heads * config["num_key_value_heads"]
    into = 0.02 / np.sqrt(2 * layers)  # what writes into the residual stream is scaled down with depth, as GPT-2 does
    packed = config["model_type"] == "phi3"
    table = Spec("model.embed_tokens.weight", (vocab, hidden), channels=1)
    found = [table]
    for index in range(layers):
        block = f"model.layers.{index}"
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        found.append(Spec(f"{block}.input_layernorm.weight", (hidden,), "norm"))
        if packed:
            found.append(Spec(f"{attention}.qkv_proj.weight", (hidden + 2 * kv, hidden), channels=1))
        else:
            found += [
                Spec(f"{attention}.{name}_proj.weight", (rows, hidden), channels=1)
                for name, rows in (("q", hidden), ("k", kv), ("v", kv))
            ]
        found.append(Spec(f"{attention}.o_proj.weight", (hidden, hidden), scale=into, channels=0))
        found.append(Spec(f"{block}.post_attention_layernorm.weight", (hidden,), "norm"))
        ups = (("gate_up_proj", 2 * ffn),) if packed else (("gate_proj", ffn), ("up_proj", ffn))
        found += [Spec(f"{mlp}.{name}.weight", (rows, hidden), channels=1) for name, rows in ups]
        found.append(Spec(f"{mlp}.down_proj.weight", (hidden, ffn), scale=into, channels=0))
    found.append(Spec("model.norm.weight", (hidden,), "norm"))
    if not config["tie_word_embeddings"]:
        found.append(Spec("lm_head.weight", (vocab, hidden), channels=1))
    return found


def _gpt2_specs(config: Mapping[str, Any]) -> list[Spec]:
    """GPT-2: layer norms with bias, learnt positions, Conv1D weights stored ``[in, out]``, and its mask buffers."""
    hidden, layers, positions = config["n_embd"], config["n_layer"], config["n_positions"]
    into = 0.02 / np.sqrt(2 * layers)
    found = [
        Spec("wte.weight", (config["vocab_size"], hidden), channels=1),
        Spec("wpe.weight", (positions, hidden), scale=0.01, channels=1),
    ]
    for index in range(layers):
        block = f"h.{index}"
        found.append(Spec(f"{block}.attn.bias", (1, 1, positions, positions), "mask"))
        for norm in ("ln_1", "ln_2"):
            found += [
                Spec(f"{block}.{norm}.weight", (hidden,), "norm"),
                Spec(f"{block}.{norm}.bias", (hidden,), "bias"),
            ]
        for name, rows, columns, scale, channels in (
            ("attn.c_attn", hidden, 3 * hidden, 0.02, 0),
            ("attn.c_proj", hidden, hidden, into, 1),
            ("mlp.c_fc", hidden, 4 * hidden, 0.02, 0),
            ("mlp.c_proj", 4 * hidden, hidden, into, 1),
        ):
            found.append(Spec(f"{block}.{name}.weight", (rows, columns), scale=scale, channels=channels))
            found.append(Spec(f"{block}.{name}.bias", (columns,), "bias"))
    return [*found, Spec("ln_f.weight", (hidden,), "norm"), Spec("ln_f.bias", (hidden,), "bias")]


class Weights:
    """Makes the values of tensors, block by block.

    ``tame`` is what norms of the residual stream multiply its outlier channels by.
    """

    def __init__(self, hidden_size: int, seed: int, dtype: str, *, tame: float = 0.25) -> None:
        self.seed, self.dtype, self.hidden_size, self.tame = seed, dtype, hidden_size, tame
        rng = np.random.default_rng(seed)
        self.pool = rng.standard_normal(POOL, dtype=np.float32)
        # Trained models have a handful of residual channels many times larger than the rest, the same in every layer.
        self.outliers = rng.choice(hidden_size, size=max(1, hidden_size // 512), replace=False)

    def blocks(self, spec: Spec) -> Iterator[bytes]:
        """Yield the tensor's bytes in order."""
        rng = np.random.default_rng([self.seed, zlib.crc32(spec.name.encode())])
        if spec.kind == "mask":
            yield np.tril(np.ones(spec.shape, dtype=np.float32)).tobytes()
            return
        if spec.kind in ("norm", "bias"):
            centre, spread = (1.0, 0.1) if spec.kind == "norm" else (0.0, 0.02)
            values = rng.normal(centre, spread, size=spec.shape).astype(np.float32)
            if spec.kind == "norm" and spec.shape == (self.hidden_size,):
                values[self.outliers] *= self.tame  # a norm tames the channels that the stream lets grow
            yield _cast(values, self.dtype)
            return
        rows, columns = spec.shape
        gain = np.full(columns, spec.scale, dtype=np.float32)
        if spec.channels == 1:
            gain[self.outliers] *= rng.uniform(4, 12, size=len(self.outliers))
        step = max(1, BLOCK // columns)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            begin = int(rng.integers(0, POOL - count * columns))
            values = self.pool[begin : begin + count * columns].reshape(count, columns) * gain
            row_gain = rng.lognormal(0.0, 0.15, size=count).astype(np.float32)
            if spec.channels == 0:
                hit = self.outliers[(self.outliers >= start) & (self.outliers < start + count)] - start
                row_gain[hit] *= rng.uniform(4, 12, size=len(hit))
            values *= row_gain[:, None]
            yield _cast(values, self.dtype)


def _cast(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    """Return float32 values as the bytes of ``dtype``; bfloat16 rounds to nearest, ties to even."""
    if dtype == "f32":
        return values.tobytes()
    if dtype == "f16":
        return values.astype(np.float16).tobytes()
    bits = values.view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return bits.view(np.uint16)[..., 1::2].tobytes()


def shards(wanted: list[Spec], dtype: str, limit: int = SHARD_BYTES) -> list[list[Spec]]:
    """Group tensors, in order, into shards of at most ``limit`` bytes; a tensor larger than that has its own."""
    groups: list[list[Spec]] = [[]]
    size = 0
    for spec in wanted:
        nbytes = spec.stored(dtype)[1]
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += nbytes
    return groups


def write_shard(file: BinaryIO, group: list[Spec], weights: Weights) -> int:
    """Write one safetensors file (8-byte header length, JSON, data); return the bytes of data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in group:
        label, nbytes = spec.stored(weights.dtype)
        header[spec.name] = {"dtype": label, "shape": list(spec.shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for spec in group:
        written = sum(file.write(block) for block in weights.blocks(spec))
        if written != spec.stored(weights.dtype)[1]:
            raise AssertionError(f"{spec.name}: {written} bytes instead of {spec.stored(weights.dtype)[1]}")
    return offset


def write_tokenizer(directory: Path, config: Mapping[str, Any]) -> None:
    """Write a byte-level BPE tokenizer trained on Python's own documentation, padded to the model's vocabulary.

    Every id decodes to something: ids that training did not use are filler tokens, so that text a random model makes
    can be shown.
    """
    from pydoc_data.topics import topics

    from tokenizers import ByteLevelBPETokenizer

    vocab_size, bos, eos = config["vocab_size"], config["bos_token_id"], config["eos_token_id"]
    special = {bos: "<|endoftext|>"} if bos == eos else {0: "<unk>", 1: "<s>", 2: "</s>", eos: "<|endoftext|>"}
    if eos == 2:
        special[2] = "</s>"
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(topics.values(), vocab_size=min(4096, vocab_size // 2), show_progress=False)
    document = json.loads(trainer.to_str())
    free = iter(index for index in range(vocab_size) if index not in special)
    vocab = {token: next(free) for token, _ in sorted(document["model"]["vocab"].items(), key=lambda item: item[1])}
    vocab |= {f"<filler_{index}>": index for index in free}
    vocab |= {token: index for index, token in special.items()}
    document["model"]["vocab"] = vocab
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document["added_tokens"] = [{"id": index, "content": token, **flags} for index, token in sorted(special.items())]
    _dump(directory / "tokenizer.json", document)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special[bos],
        "eos_token": special[eos],
        "pad_token": special[eos],
        "unk_token": special.get(0, special[eos]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("max_position_embeddings", config.get("n_positions")),
    }
    _dump(directory / "tokenizer_config.json", settings)


def _dump(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write(
    name: str, out: Path, *, layers: int | None = None, dtype: str = "bf16", seed: int = 0, limit: int = SHARD_BYTES
) -> int:
    """Write the checkpoint into the new directory ``out`` and return the bytes of its weights.

    Args:
        name: A key of ``CONFIGS``.
        out: A directory that does not exist, or is empty.
        layers: Number of decoder blocks, if not the model's own.
        dtype: ``bf16``, ``f16`` or ``f32``.
        seed: The same seed gives the same bytes.
        limit: Bytes a shard may hold.
    """
    config = dict(CONFIGS[name])
    if layers is not None:
        config["n_layer" if name == "gpt2" else "num_hidden_layers"] = layers
    config["torch_dtype"] = DTYPES[dtype][2]
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty\n  try: another directory, or delete it first")
    out.mkdir(parents=True, exist_ok=True)
    _dump(out / "config.json", config)
    tokens: dict[str, Any] = {key: config[key] for key in _SPECIAL if key in config}
    _dump(out / "generation_config.json", {"_from_model_config": True, **tokens})
    write_tokenizer(out, config)
    return write_weights(out, specs(config), Weights(config.get("hidden_size") or config["n_embd"], seed, dtype), limit)


def write_weights(out: Path, wanted: list[Spec], weights: Weights, limit: int = SHARD_BYTES) -> int:
    """Write the tensors into ``out``, an index too if there are several shards, and return the bytes of data."""
    groups = shards(wanted, weights.dtype, limit)
    total = 0
    where: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        single = len(groups) == 1
        file_name = "model.safetensors" if single else f"model-{number:05}-of-{len(groups):05}.safetensors"
        with (out / file_name).open("wb") as file:
            total += write_shard(file, group, weights)
        where |= {spec.name: file_name for spec in group}
        print(f"{file_name}: {len(group)} tensors, {total / 1e9:.2f} GB so far", file=sys.stderr)
    if len(groups) > 1:
        _dump(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=sorted(CONFIGS))
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="decoder blocks, instead of the model's own number")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.layers is not None and arguments.layers < 1:
        parser.error("--layers must be at least 1")
    started = time.perf_counter()
    options = {"layers": arguments.layers, "dtype": arguments.dtype, "seed": arguments.seed}
    total = write(arguments.model, arguments.out, **options)
    print(f"{arguments.out}: {total / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
