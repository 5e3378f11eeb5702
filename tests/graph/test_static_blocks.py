"""Weights in blocks of 4 bits in a static decoder's graphs: read as they were stored, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from compress import pipeline
from compress.errors import UsageError
from compress.profile import load_profile
from compress.progress import Stages
from compress.validation.static_decoding import DECODE_NAME
from dequantized import dequantized, put
from static_sessions import Logits, open_static, source_logits
from tiny_models import VOCABULARY, save_tiny_model

NEW, SLOTS, PROMPT = 16, 48, 20
LINEARS = ("qkv", "attention_output", "gate_up", "down")
BLOCKS = (
    *(f"quantize.roles.{role}.bits=4" for role in LINEARS),
    "quantize.accuracy_level=0",
    'graph.fusions=["gelu"]',
    f"graph.static_length={NEW}",
    f"graph.cache_length={SLOTS}",
    "targets=[]",
    "validation.tokens=32",
    "validation.window=32",
    "validation.prompt_tokens=16",
    "validation.new_tokens=16",
)
#: Float activations: nothing but the weights' bytes and how they are read decides. Observed: 3e-6.
TOLERANCE = 3e-5


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCABULARY, (1, PROMPT + 3))


def static_logits(artifact: Path) -> Logits:
    decoder, ids = open_static(artifact), tokens()
    parts = [decoder.feed(ids[:, :PROMPT])[0]]
    return np.concatenate([*parts, *(decoder.feed(ids[:, at : at + 1])[0] for at in range(PROMPT, PROMPT + 3))])


@pytest.mark.parametrize(
    ("biased", "block", "symmetric"),
    [(False, 32, "true"), (False, 64, "false"), (True, 32, "true"), (True, 64, "false")],
)
def test_both_graphs_read_weights_as_they_were_stored(
    biased: bool, block: int, symmetric: str, fast_skeletons: None, tmp_path: Path
) -> None:
    import torch
    import transformers

    source = save_tiny_model("llama", tmp_path / "source", attention_bias=biased)
    recipe = load_profile("float", [*BLOCKS, f"quantize.block_size={block}", f"quantize.symmetric={symmetric}"])
    options = pipeline.ExportOptions(validate=False, threads=1)
    pipeline.export(pipeline.ModelReference(str(source)), recipe, tmp_path / "artifact", options, Stages())
    found, before = static_logits(tmp_path / "artifact"), source_logits(source, tokens())
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    assert put(model, dequantized(tmp_path / "artifact")) == 4 * 3
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor(tokens())).logits[0].numpy()
    assert np.abs(found - wanted).max() <= TOLERANCE
    # Negative control: 4 bits themselves move the logits by far more than the tolerance.
    assert np.abs(before - wanted).max() > 100 * TOLERANCE
    for name in ("model.onnx", DECODE_NAME):
        nodes = onnx.load(tmp_path / "artifact" / name, load_external_data=False).graph.node
        products = [node for node in nodes if node.op_type == "MatMulNBits"]
        assert len(products) == 12 and all(len(node.input) == 3 + (symmetric == "false") for node in products)
        # A bias is added behind: HTP leaves a product with one to the CPU.
        biases = [node for node in nodes if node.op_type == "Add" and any(i.endswith(".bias") for i in node.input)]
        assert len(biases) == (6 if biased else 0)


@pytest.mark.parametrize("scales", ["float16", "int8"])
def test_scales_that_a_runtime_would_widen_are_refused(
    scales: str, tiny_model: Callable[[str], Path], fast_skeletons: None, tmp_path: Path
) -> None:
    recipe = load_profile("float", [*BLOCKS, f"quantize.scale_format={scales}"])
    options = pipeline.ExportOptions(validate=False, threads=1)
    reference = pipeline.ModelReference(str(tiny_model("llama")))
    with pytest.raises(UsageError, match="have float32 scales") as caught:
        pipeline.export(reference, recipe, tmp_path / "artifact", options, Stages())
    assert caught.value.hint == "--set quantize.scale_format=float32"
    assert not (tmp_path / "artifact").exists()
