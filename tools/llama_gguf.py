"""Write a checkpoint as a GGUF for speed measurements: ``llama_gguf.py CHECKPOINT OUT.gguf [--type Q4_0]``.

Every matrix gets the same type, the token table and the head included (what llama-quantize calls *pure*), vectors stay
float32. It is for timing, not for use: the file has no tokenizer, and the rows of query and key projections are not
rearranged for llama.cpp's order of rotary pairs. The work for a token does not depend on it; the logits do, and nobody
looks at them. Tensors are read, quantized and written one at a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.source.base import OpenCheckpoint

TYPES = ("Q4_0", "Q4_1", "Q8_0")
#: ``model_type`` -> GGUF architecture of the same computation.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "phi3": "phi3"}
HEAD = "output.weight"
TABLE = "token_embd.weight"
ROWS = 4096  # quantized at a time: numpy's temporaries are several times the values


class UnsupportedError(ValueError):
    """A checkpoint that cannot be written; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A tensor to write: its names in the checkpoint and in the file, shape, type and size in the file."""

    source: str
    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int


def entries(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], kind: str) -> list[Entry]:
    """Return the tensors of a file, in the checkpoint's order; a tied head is left out.

    Raises:
        UnsupportedError: The architecture, a tensor or a row's length has no place in such a file.
    """
    import gguf

    architecture = ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise UnsupportedError(f"{config['model_type']} is none of {', '.join(ARCHITECTURES)}")
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    found = []
    for source, shape in shapes.items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UnsupportedError(f"{source} has no name in a GGUF of {architecture}")
        if name == HEAD and config.get("tie_word_embeddings"):
            continue
        stored = kind if len(shape) == 2 else "F32"
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[stored]]
        if shape[-1] % block:
            raise UnsupportedError(f"rows of {source} are {shape[-1]} long, no multiple of {kind}'s block of {block}")
        count = 1
        for side in shape:
            count *= side
        found.append(Entry(source, name, tuple(shape), stored, count // block * size))
    return found


def token_bytes(sizes: Mapping[str, int]) -> int:
    """Return the bytes of weights that a decoded token reads, of a file's tensors: all, but a table only looked up."""
    return sum(sizes.values()) - (sizes[TABLE] if HEAD in sizes else 0)


def sizes_of(path: Path) -> dict[str, int]:
    """Return the bytes of every tensor in a GGUF file."""
    import gguf

    return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}


def _describe(writer: Any, config: Mapping[str, Any]) -> None:  # noqa: ANN401 - gguf has no type information
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    size = config.get("head_dim") or hidden // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(float(_rope_theta(config)))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _rope_theta(config: Mapping[str, Any]) -> float:
    parameters = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or parameters.get("rope_theta") or 10000.0)


def _quantized(checkpoint: OpenCheckpoint, entry: Entry) -> Iterator[Any]:
    """Yield a tensor's bytes by bands of rows."""
    import gguf

    kind = gguf.GGMLQuantizationType[entry.type]
    for start in range(0, entry.shape[0], ROWS):
        values = checkpoint.read(entry.source, start, min(start + ROWS, entry.shape[0]))
        yield gguf.quants.quantize(values, kind)


def write(source: Path, out: Path, kind: str) -> list[Entry]:
    """Write a checkpoint into a GGUF file and return its tensors.

    Raises:
        UnsupportedError: The checkpoint has no place in such a file.
        CompressError: The checkpoint cannot be read.
    """
    import gguf
    import numpy as np

    from compress.source import open_checkpoint

    with open_checkpoint(str(source)) as checkpoint:
        config = checkpoint.config
        shapes = {name: tuple(info.shape) for name, info in checkpoint.tensors().items()}
        wanted = entries(config, shapes, kind)
        writer = gguf.GGUFWriter(out, ARCHITECTURES[config["model_type"]])
        _describe(writer, config)
        for entry in wanted:
            stored = gguf.GGMLQuantizationType[entry.type]
            plain = entry.type == "F32"
            shape = entry.shape if plain else gguf.quant_shape_to_byte_shape(entry.shape, stored)
            dtype = np.dtype(np.float32 if plain else np.uint8)
            writer.add_tensor_info(entry.name, shape, dtype, entry.bytes, raw_dtype=None if plain else stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in wanted:
            writer.write_tensor_data(np.concatenate(list(_quantized(checkpoint, entry))))
        writer.close()
    return wanted


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a local Hugging Face directory")
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=TYPES, default=TYPES[0])
    options = parser.parse_args()
    try:
        write(options.checkpoint, options.out, options.type)
    except UnsupportedError as error:
        raise SystemExit(f"UnsupportedError: {error}") from error


if __name__ == "__main__":
    main()
