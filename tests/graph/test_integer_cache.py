"""A cache of bytes: what the graph computes is what PyTorch computes behind a cache that rounds, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers

import parity
from compress.errors import UsageError
from compress.planning import CACHE_SCALES
from parity import load
from plain_decoder import PlainDecoder
from tiny_models import FAMILIES, INT8_CACHE, LONG_ROPE_SWITCH, SLIDING_WINDOW, VOCABULARY

#: Mean and largest difference of logits: sums in another order turn a code or two, which moves some by a thousandth.
MEAN, MOST = 1e-4, 5e-3
PROMPT, TOTAL = 30, 38
assert SLIDING_WINDOW < PROMPT < LONG_ROPE_SWITCH < TOTAL
IDS = np.random.default_rng(0).integers(3, VOCABULARY, (1, TOTAL))
Scales = dict[str, np.ndarray]


class RoundedCache(transformers.DynamicCache):
    """Keeps what a byte holds of keys and values, at the scales of a graph."""

    def __init__(self, scales: Scales) -> None:
        super().__init__()
        self.rounding = scales

    def update(self, key: Any, value: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
        kept = []
        for name, states in zip(CACHE_SCALES, (key, value), strict=True):
            scale = torch.tensor(self.rounding[name.format(layer)])
            kept.append((states / scale).round().clamp(-128, 127) * scale)
        return super().update(*kept, layer, *args, **kwargs)


def scales_of(artifact: Path) -> Scales:
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    return {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer if i.name.startswith("cache.")}


def expected(model: Path, scales: Scales | None) -> np.ndarray:
    """Return PyTorch's logits of a prompt and of every token after it ``[TOTAL, V]``; without scales unrounded."""
    source, cache = load(model), transformers.DynamicCache() if scales is None else RoundedCache(scales)
    pieces = [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, TOTAL))]
    with torch.no_grad():
        logits = [source(input_ids=torch.tensor(IDS[:, a:b]), cache=cache).logits[0] for a, b in pieces]
    return torch.cat(logits).numpy()


def found(artifact: Path) -> np.ndarray:
    decoder = PlainDecoder(artifact)
    pieces = [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, TOTAL))]
    ones, positions = np.ones((1, TOTAL), np.int64), np.arange(TOTAL)[None]
    return np.concatenate([decoder.feed(IDS[:, a:b], ones[:, :b], positions[:, a:b])[0] for a, b in pieces])


@pytest.mark.parametrize("more", [(), ("graph.attention=materialized",)], ids=["tiled", "held"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_a_cache_that_rounds(
    name: str, more: tuple[str, ...], tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path]
) -> None:
    artifact = tiny_artifact(name, "float", *INT8_CACHE, *more)
    scales, logits = scales_of(artifact), found(artifact)
    assert sorted(scales) == sorted(name.format(layer) for layer in range(3) for name in CACHE_SCALES)
    off = np.abs(logits - expected(tiny_model(name), scales))
    assert off.mean() <= MEAN and off.max() <= MOST
    # The controls: rounding that is not the graph's, of one layer's values alone, and none at all.
    other = {**scales, "cache.1.value_scale": scales["cache.1.value_scale"] * np.float32(1.05)}
    for wrong in (other, None):
        assert np.abs(logits - expected(tiny_model(name), wrong)).mean() > 10 * MEAN


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_rows_of_a_padded_batch_are_what_they_are_alone(name: str, tiny_artifact: Callable[..., Path]) -> None:
    decoder = PlainDecoder(tiny_artifact(name, "float", *INT8_CACHE))
    random = np.random.default_rng(5)
    ids, new = random.integers(3, VOCABULARY, (2, parity.PROMPT)), random.integers(3, VOCABULARY, (4, 2, 1))
    lengths = (parity.PROMPT, parity.SHORT)
    together = parity.prefill(decoder, ids, lengths), parity.decode(decoder, new, lengths)
    for row, length in enumerate(lengths):
        alone = parity.prefill(decoder, ids[row : row + 1, :length], (length,))
        np.testing.assert_allclose(together[0][row, :length], alone[0], atol=1e-4)
        for step, token in enumerate(new[:, row]):
            last = decoder.feed(token[None], np.ones((1, length + step + 1), np.int64), np.array([[length + step]]))
            np.testing.assert_allclose(together[1][step, row], last[0, -1], atol=MOST)


def refusal(name: str, tiny_artifact: Callable[..., Path], *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        tiny_artifact(name, *overrides)
    return str(caught.value) + str(caught.value.hint)


def test_what_cannot_keep_bytes_is_refused_before_work(tiny_artifact: Callable[..., Path]) -> None:
    wanted, *calibrated, _ = INT8_CACHE
    cases = {
        ("x86-int4", wanted, 'targets=["genai"]'): "effort 'fast' reads none",
        ("float", wanted, *calibrated, 'targets=["optimum"]'): "optimum begins with an empty cache of floats",
        ("float", wanted, *calibrated, 'targets=["transformers-js"]'): "transformers.js begins with an empty cache",
        ("webgpu-int4", *INT8_CACHE): "no kernel on webgpu",
        ("cuda-fp16", *INT8_CACHE): "int8 is read wrongly on cuda",
        ("npu-qnn-int8", wanted): "leave out graph.cache_type",
        ("x86-int4", "graph.cache_type=int4"): "graph.cache_type",
    }
    for overrides, told in cases.items():
        assert told in refusal("llama", tiny_artifact, *overrides)
    # An encoder has no cache, so nothing is asked of it.
    assert (tiny_artifact("bert:embedding", "x86-int8", wanted) / "model.onnx").is_file()


def test_removed_heads_have_no_scales(tiny_artifact: Callable[..., Path]) -> None:
    pruned = ("float", "prune.heads=1", "prune.recover=none")
    kept, plain = (tiny_artifact("gpt2", *pruned, *INT8_CACHE[first:]) for first in (0, 1))
    assert {scales.shape for scales in scales_of(kept).values()} == {(3, 1, 16)}
    assert scales_of(plain) == {}
    off = np.abs(found(kept) - found(plain)).mean()
    assert 1e-4 < off < 0.03 * np.abs(found(plain)).mean()
