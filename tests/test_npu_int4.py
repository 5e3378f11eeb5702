"""Decoders through ``npu-qnn-int4``, on the CPU: 4-bit blocks between 16-bit activations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from compress import pipeline
from compress.contracts import Scheme
from compress.planning import INLINE_LIMIT, make_plan
from compress.profile import load_profile
from compress.source import open_checkpoint
from compress.validation.static_decoding import DECODE_NAME
from dequantized import dequantized, put
from static_sessions import divergence, open_static, source_logits
from tiny_models import VOCABULARY

NEW, SLOTS, LENGTH = 16, 48, 40
CHANGES = (
    f"graph.static_length={NEW}",
    f"graph.cache_length={SLOTS}",
    "targets=[]",
    "quantize.effort=fast",
    "quantize.algorithm=rtn",
    "validation.tokens=32",
    "validation.window=32",
    "validation.prompt_tokens=16",
    "validation.new_tokens=16",
)
#: To the source with the same 4-bit weights; what is left is 8 bits of table and head, and 16 of activations.
#: Observed: 0.0005.
LIMIT = 0.0015

Artifact = Callable[..., Path]


def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCABULARY, (1, LENGTH))


def test_logits_are_those_of_the_rounded_weights(tiny_artifact: Artifact, tiny_model: Callable[[str], Path]) -> None:
    import torch
    import transformers

    artifact = tiny_artifact("llama", "npu-qnn-int4", *CHANGES)
    found = open_static(artifact).feed(ids())[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    assert put(model, dequantized(artifact)) == 4 * 3
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor(ids())).logits[0].numpy()
    assert divergence(wanted, found) < LIMIT
    # Negative controls: what 4 bits cost, and the source itself, are beyond the limit.
    source = source_logits(tiny_model("llama"), ids())
    assert divergence(source, found) > 10 * LIMIT
    assert divergence(wanted, source) > 10 * LIMIT


def test_eight_bits_of_activations_lose_more(tiny_artifact: Artifact) -> None:
    sixteen, eight = (
        open_static(tiny_artifact("llama", "npu-qnn-int4", *CHANGES, f"quantize.activation_bits={bits}")).feed(ids())[0]
        for bits in (16, 8)
    )
    assert divergence(sixteen, eight) > 2 * LIMIT


def test_blocks_stand_between_integers_and_read_the_data_file(tiny_artifact: Artifact) -> None:
    artifact = tiny_artifact("llama", "npu-qnn-int4", *CHANGES)
    for name in ("model.onnx", DECODE_NAME):
        model = ir.load(artifact / name)
        assert set(model.opset_imports) == {"", "com.microsoft"}
        products = [node for node in model.graph if node.op_type == "MatMulNBits"]
        assert len(products) == 12
        for product in products:
            source, codes, scales = product.inputs
            assert source is not None and codes is not None and scales is not None
            made = source.producer()
            assert made is not None and made.op_type == "DequantizeLinear"
            assert [user.op_type for user, _ in product.outputs[0].uses()] in (["QuantizeLinear"], ["Add"])
            assert isinstance(codes.const_value, ir.ExternalTensor)
            # One copy for both graphs, unless it is too small for a place of its own.
            stored = scales.const_value
            assert stored is not None and (isinstance(stored, ir.ExternalTensor) or stored.nbytes < INLINE_LIMIT)
        onnx.checker.check_model(str(artifact / name))


def test_products_and_their_roles(tiny_model: Callable[[str], Path]) -> None:
    recipe = load_profile("npu-qnn-int4")
    with open_checkpoint(str(tiny_model("llama"))) as checkpoint:
        plan = make_plan(pipeline.describe(checkpoint), load_profile("npu-qnn-int4", CHANGES), checkpoint)
    schemes = {fate.role: fate.scheme for fate in plan.fates if fate.role}
    assert schemes["gate_up"] == schemes["down"] == Scheme(4, 32, symmetric=True)
    assert schemes["head"] == Scheme(8, 0, symmetric=True, activations="static")
    # An encoder has no linear in blocks: its recipe is npu-qnn-int8's.
    assert recipe.quantize.scheme("down") == load_profile("npu-qnn-int8").quantize.scheme("down")


@pytest.mark.parametrize("name", ["llama", "llama-untied"])
def test_predicted_bytes_come_true(name: str, tiny_model: Callable[[str], Path], tiny_artifact: Artifact) -> None:
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        structure = pipeline.describe(checkpoint)
        plan = make_plan(structure, load_profile("npu-qnn-int4", CHANGES), checkpoint)
        eight = make_plan(structure, load_profile("npu-qnn-int8", CHANGES), checkpoint)
    artifact = tiny_artifact(name, "npu-qnn-int4", *CHANGES)
    prefill, decode, data = (
        (artifact / file).stat().st_size for file in ("model.onnx", DECODE_NAME, "model.onnx.data")
    )
    assert data == plan.data_bytes < eight.data_bytes
    assert plan.graph_bytes == pytest.approx(prefill + decode, rel=0.05)
