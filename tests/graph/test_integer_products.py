"""An integer product of an artifact, against the same integers multiplied by NumPy.

Whatever operator does it: its float input is taken from the running graph, rounded to unsigned bytes as ONNX's
DynamicQuantizeLinear says, and multiplied by the stored codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from compress import pipeline
from compress.source import open_checkpoint
from plain_encoder import PlainEncoder, example
from tiny_models import PLAIN_INT8, VOCABULARY

#: Relative to the largest output. Integers are exact; what is left is the rounding of two float32 factors.
TOLERANCE = 2e-6


@dataclass(frozen=True)
class Product:
    """One integer product of a graph: names of its float input, its output and its constants."""

    source: str
    output: str
    codes: str
    scales: str
    bias: str


def products(graph: onnx.GraphProto) -> list[Product]:
    made = {output: node for node in graph.node for output in node.output}
    found = []
    for node in graph.node:
        if node.op_type == "DynamicQuantizeMatMul":
            source, codes, scales, _, bias = node.input
            found.append(Product(source, node.output[0], codes, scales, bias))
        elif node.op_type == "MatMulIntegerToFloat":
            quantized, codes, _, scales, _, _, bias = node.input
            found.append(Product(made[quantized].input[0], node.output[0], codes, scales, bias))
    return found


def run(artifact: Path, found: list[Product]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return what the products read and wrote for a batch, and the stored arrays."""
    model = onnx.load(artifact / "model.onnx")
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    names = {name for product in found for name in (product.source, product.output)}
    for name in sorted(names - {value.name for value in model.graph.output}):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    batch = example((13, 9, 13), 13, vocabulary=VOCABULARY)
    return PlainEncoder(model.SerializeToString())(*batch), arrays


def round_inputs(values: np.ndarray) -> tuple[np.ndarray, np.float32, int]:
    """Return unsigned bytes, scale and zero point of the whole array, as DynamicQuantizeLinear defines them."""
    low, high = min(np.float32(0), values.min()), max(np.float32(0), values.max())
    scale = np.float32((high - low) / np.float32(255))
    zero = int(np.clip(np.rint(-low / scale), 0, 255))
    codes = np.clip(np.rint(values / scale) + zero, 0, 255).astype(np.int64)
    return codes, scale, zero


def simulate(values: np.ndarray, codes: np.ndarray, scales: np.ndarray, bias: np.ndarray) -> np.ndarray:
    quantized, scale, zero = round_inputs(values)
    whole = (quantized - zero) @ codes.astype(np.int64)
    return whole * (scale.astype(np.float64) * scales) + bias


@pytest.mark.parametrize("name", ["bert:embedding", "albert:embedding", "electra:text-classification"])
def test_products_are_exact(name: str, tiny_artifact: Callable[..., Path]) -> None:
    artifact = tiny_artifact(name, PLAIN_INT8, 'graph.fusions=["attention", "gelu"]')
    found = products(onnx.load(artifact / "model.onnx", load_external_data=False).graph)
    assert len(found) >= 12
    values, arrays = run(artifact, found)
    for item in found:
        codes, scales, bias = arrays[item.codes], arrays[item.scales].astype(np.float64), arrays[item.bias]
        assert codes.dtype == np.int8
        given, got = values[item.source], values[item.output]
        tolerance = TOLERANCE * float(np.abs(got).max())
        error = np.abs(simulate(given, codes, scales, bias) - got).max()
        assert error <= tolerance, item.codes
        # Negative controls: a scale of another channel, one code, inputs that were not rounded.
        changed = codes.copy()
        changed[0, 0] ^= 4
        for wrong in (
            simulate(given, codes, np.roll(scales, 1), bias),
            simulate(given, changed, scales, bias),
            given.astype(np.float64) @ (codes * scales) + bias,
        ):
            assert np.abs(wrong - got).max() > 20 * tolerance, item.codes


@pytest.mark.parametrize("bits", [7, 8])
def test_stored_codes_are_the_weights(
    bits: int, tiny_artifact: Callable[..., Path], tiny_model: Callable[[str], Path]
) -> None:
    """Codes ``[K, N]`` times a scale a column give the checkpoint's weight back, to half a step where none was cut."""
    name = "distilbert:text-classification"
    artifact = tiny_artifact(name, PLAIN_INT8, f"quantize.bits={bits}", "quantize.roles.embedding.bits=8")
    model = onnx.load(artifact / "model.onnx")
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        linears = pipeline.describe(checkpoint).linears
        for linear in linears:
            weight = np.concatenate([checkpoint.read(piece.tensor) for piece in linear.weight])
            codes, scales = arrays[f"{linear.name}.codes"], arrays[f"{linear.name}.scales"].astype(np.float64)
            assert codes.shape == (linear.in_features, linear.out_features) and scales.shape == (linear.out_features,)
            assert np.abs(codes.astype(int)).max() <= (1 << (bits - 1)) - 1
            error = np.abs(codes * scales - weight.T) / np.abs(scales)
            assert np.median(error) < 0.5
            lost = np.sum((codes * scales - weight.T) ** 2) / np.sum(weight.astype(np.float64) ** 2)
            assert lost < {7: 4e-4, 8: 1e-4}[bits], linear.name
            assert np.sum((np.roll(codes, 1, 1) * scales - weight.T) ** 2) > 0.5 * np.sum(weight**2)
    assert len(linears) == 14


def test_sums_of_neighbours_fit_into_sixteen_bits(tiny_artifact: Callable[..., Path]) -> None:
    """Processors without VNNI add two products of neighbours in 16 bits and clip."""
    model = onnx.load(tiny_artifact("bert:embedding", PLAIN_INT8) / "model.onnx")
    seen = 0
    for item in model.graph.initializer:
        if not item.name.endswith(".codes") or item.data_type != onnx.TensorProto.INT8:
            continue
        codes = onnx.numpy_helper.to_array(item).astype(int)
        rows = len(codes) // 2 * 2
        pairs: Any = codes[:rows].reshape(rows // 2, 2, -1)
        most = np.where(pairs > 0, pairs, 0).sum(1).max() * 255
        least = np.where(pairs < 0, pairs, 0).sum(1).min() * 255
        assert most <= 32767 and least >= -32768, item.name
        assert most > 127 * 255, "the codes use their range"
        seen += 1
    assert seen == 12
