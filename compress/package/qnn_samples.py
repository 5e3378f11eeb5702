"""Inputs on which a compiled graph is compared with the one it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.errors import UsageError

Samples = dict[str, npt.NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]
_PAST, _PRESENT = "past_key_values.", "present."


def input_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Return the inputs of a graph with their shapes.

    Raises:
        UsageError: A dimension is free.
    """
    import onnx_ir as ir

    found: dict[str, tuple[int, ...]] = {}
    for value in ir.load(model).graph.inputs:
        if value.shape is None or not value.shape.is_static():
            raise UsageError(
                f"input {value.name} has a free dimension: an NPU's graph has none",
                where=str(model),
                hint="--set graph.static_length=128",
            )
        found[str(value.name)] = value.shape.numpy()
    return found


def encoder_samples(shapes: Shapes, vocab_size: int) -> Samples:
    """Return two seeded texts as inputs: a row each, one without padding and one that is half padding."""
    generator = np.random.default_rng(0)
    found: Samples = {name: np.zeros((2, *shape), np.int64) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name == "input_ids":
            found[name][:] = generator.integers(0, vocab_size, (2, *shape))
        elif name == "attention_mask":
            found[name][0] = 1
            found[name][1, :, : -(-shape[-1] // 2)] = 1
    return found


def decoder_samples(
    prefill: Shapes, decode: Shapes, vocab_size: int, run: Callable[[Samples], Samples]
) -> tuple[Samples, Samples]:
    """Return seeded tokens as inputs of both graphs, one sample each, behind a cache that a first piece has filled.

    Args:
        prefill: Inputs of the graph for several tokens, by name.
        decode: Inputs of the graph for one.
        vocab_size: Tokens are drawn below it.
        run: Runs the first of them on samples, and returns its outputs, a sample a row.

    Returns:
        A piece of which half is padding, and a single token.
    """
    generator = np.random.default_rng(0)
    new = prefill["input_ids"][1]
    slots = prefill["attention_mask"][1] - new
    filled = max(1, min(new, slots // 2))
    begin = _piece(prefill, generator.integers(0, vocab_size, filled), 0, {})
    present = run(begin)
    past = [name for name in prefill if name.startswith(_PAST)]
    cache = {name: present[_PRESENT + name.removeprefix(_PAST)][0][:, :, :filled] for name in past}
    tokens = generator.integers(0, vocab_size, max(1, min(new // 2, slots - filled)))
    return _piece(prefill, tokens, filled, cache), _piece(decode, tokens[:1], filled, cache)


def _piece(shapes: Shapes, tokens: npt.NDArray[np.int64], start: int, cache: Samples) -> Samples:
    """Return one sample: tokens at the positions from ``start`` on, the cache in use up to there, the rest padding."""
    count, slots = len(tokens), shapes["attention_mask"][1] - shapes["input_ids"][1]
    found: Samples = {
        name: np.zeros((1, *shape), np.float32 if name.startswith(_PAST) else np.int64)
        for name, shape in shapes.items()
    }
    found["input_ids"][..., :count] = tokens
    found["position_ids"][..., :count] = np.arange(start, start + count)
    found["attention_mask"][..., :start] = found["attention_mask"][..., slots : slots + count] = 1
    for name, values in cache.items():
        found[name][0][:, :, :start] = values
    return found
