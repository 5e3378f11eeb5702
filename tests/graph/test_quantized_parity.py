"""A quantized graph computes what PyTorch computes with the dequantized weights: every storage form, end to end.

Activations stay float32 here (accuracy level 0), so that nothing but the weights' bytes and how the graph reads them
decides.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from plain_decoder import PlainDecoder
from tiny_models import VOCABULARY

TOLERANCE = 2e-4
EXACT = "quantize.accuracy_level=0"
FLOAT32, TABLE = "quantize.scale_format=float32", "quantize.roles.embedding"
VARIANTS = {
    "profile": (),
    "symmetric": (FLOAT32, f"{TABLE}.symmetric=true", f"{TABLE}.block_size=32"),
    "asymmetric": (FLOAT32, "quantize.symmetric=false"),
    "padded": (FLOAT32, "quantize.block_size=128", f"{TABLE}.block_size=64", "quantize.symmetric=false"),
    "int8": (FLOAT32, "quantize.bits=8", "quantize.symmetric=false"),
    "int2": ("quantize.bits=2", f"{TABLE}.block_size=64"),
    "float16-scales": ("quantize.scale_format=float16",),
    "int8-scales": ("quantize.symmetric=false",),
    "mixed": ("quantize.roles.down.bits=8", f"{TABLE}.bits=8", "quantize.roles.qkv.bits=32"),
}


def unpack(array: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return codes ``[rows, count]`` of packed bytes ``[rows, ...]``, the first in the lowest bits."""
    numbers = [int.from_bytes(row.tobytes(), "little") for row in array.reshape(len(array), -1)]
    return np.array([[(number >> (bits * index)) & ((1 << bits) - 1) for index in range(count)] for number in numbers])


def dequantized(artifact: Path) -> dict[str, np.ndarray]:
    """Return every quantized weight ``[rows, columns]`` by its name, from graph and data file, by plain arithmetic."""
    model = onnx.load(artifact / "model.onnx")
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        given = {item.name: item.i for item in node.attribute}
        packed = node.input[1 if node.op_type == "MatMulNBits" else 0]
        name = packed.removesuffix(".codes").removesuffix(".blocked_codes")
        scales = arrays[f"{name}.scales"].astype(np.float64)
        if f"{name}.row_scales" in arrays:
            scales = scales * arrays[f"{name}.row_scales"].reshape(-1, 1)
        bits, size = given["bits"], given["block_size"]
        columns = given.get("K", arrays[packed].size * 8 // bits // len(scales))
        codes = unpack(arrays[packed], bits, columns)
        zero = np.full(scales.shape, 1 << (bits - 1))
        if f"{name}.zero_points" in arrays:
            zero = unpack(arrays[f"{name}.zero_points"], bits, scales.shape[1])
        block = np.arange(columns) // size
        found[name] = ((codes - zero[:, block]) * scales[:, block]).astype(np.float32)
    return found


def put(model: Any, weights: dict[str, np.ndarray]) -> int:
    """Overwrite PyTorch's weights; returns how many arrays had a place."""
    import torch

    gpt2 = model.config.model_type == "gpt2"
    blocks = model.transformer.h if gpt2 else model.model.layers
    places: dict[str, list[Any]] = {
        "transformer.wte" if gpt2 else "model.embed_tokens": [model.get_input_embeddings().weight],
        "lm_head": [model.lm_head.weight],
    }
    for index, block in enumerate(blocks):
        if gpt2:
            start = f"transformer.h.{index}"
            attention, mlp = block.attn, block.mlp
            modules = {"attn.qkv_proj": attention.c_attn, "attn.o_proj": attention.c_proj}
            modules |= {"mlp.up_proj": mlp.c_fc, "mlp.down_proj": mlp.c_proj}
            places |= {f"{start}.{name}": [module.weight.T] for name, module in modules.items()}
            continue
        start, attention, mlp = f"model.layers.{index}", block.self_attn, block.mlp
        packed = hasattr(attention, "qkv_proj")
        qkv = [attention.qkv_proj] if packed else [attention.q_proj, attention.k_proj, attention.v_proj]
        gate_up = [mlp.gate_up_proj] if packed else [mlp.gate_proj, mlp.up_proj]
        stacks = {"self_attn.qkv_proj": qkv, "self_attn.o_proj": [attention.o_proj]}
        stacks |= {"mlp.gate_up_proj": gate_up, "mlp.down_proj": [mlp.down_proj]}
        places |= {f"{start}.{name}": [module.weight for module in stack] for name, stack in stacks.items()}
    with torch.no_grad():
        for name, array in weights.items():
            rows = 0
            for target in places[name]:
                target.copy_(torch.from_numpy(array[rows : rows + len(target)]))
                rows += len(target)
            assert rows == len(array), name
    return len(weights)


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits.numpy()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "llama-untied", "phi3", "gpt2"])
def test_graph_reads_weights_as_they_were_stored(
    name: str, variant: str, tiny_artifact: Callable[..., Path], tiny_model: Callable[[str], Path]
) -> None:
    import torch
    import transformers

    artifact = tiny_artifact(name, "arm-int4", EXACT, *VARIANTS[variant])
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(name), dtype=torch.float32).eval()
    ids = np.random.default_rng(5).integers(3, VOCABULARY, (1, 24))
    before = logits_of(model, ids)
    tied = bool(model.config.tie_word_embeddings)
    untouched = 3 if variant == "mixed" else 0
    assert put(model, dequantized(artifact)) == 4 * 3 + 1 + (not tied) - untouched
    expected = logits_of(model, ids)
    found = PlainDecoder(artifact).feed(ids, np.ones_like(ids), np.arange(24)[None])
    assert np.abs(found - expected).max() <= TOLERANCE
    # Negative control: quantization itself moves the logits by far more than the tolerance.
    assert np.abs(before - expected).max() > 20 * TOLERANCE
