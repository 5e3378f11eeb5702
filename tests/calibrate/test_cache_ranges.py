"""Scales of a cache of bytes: what keys can become at any position has a code, and what was never seen has one too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import Linear, Module
from visited_blocks import calibration, some_windows, visit

from compress.calibrate import cache_ranges
from compress.calibrate.blocks import Block
from compress.calibrate.cache_ranges import HEADROOM, CacheRanges
from compress.contracts import Decoder
from compress.errors import SourceError

HEADS, LENGTH, SIZE = 3, 20, 16


def states(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((2, HEADS, LENGTH, SIZE)).astype(np.float32))


def largest(scales: np.ndarray) -> np.ndarray:
    """Return the largest size that scales are of ``[heads, head_dim]``."""
    assert scales.dtype == np.float32 and scales.shape[1:] == (1, SIZE)
    return scales[:, 0] * 127 / HEADROOM


def turned(keys: torch.Tensor, position: int, pairs: int) -> torch.Tensor:
    """Return keys as position ``position`` makes them: rotary embedding of halves, written out."""
    result = keys.clone()
    for pair in range(pairs):
        angle = position * 10000 ** (-pair / pairs)
        first, second = keys[..., pair], keys[..., pair + pairs]
        result[..., pair] = first * np.cos(angle) - second * np.sin(angle)
        result[..., pair + pairs] = first * np.sin(angle) + second * np.cos(angle)
    return result


@pytest.mark.parametrize("pairs", [8, 5, 0])
def test_scales_are_of_the_largest_at_any_position(pairs: int) -> None:
    keys, values = states(1), states(2)
    ranges = CacheRanges(pairs)
    for rows in (slice(0, 1), slice(1, 2)):  # in any order, and back as they came
        given = keys[rows], values[rows]
        assert all(one is other for one, other in zip(ranges.update(*given, 0, kwargs={}), given, strict=True))
    key, value = (largest(scales) for scales in ranges.scales(HEADS, "block 0"))
    np.testing.assert_allclose(value, values.abs().amax((0, 2)), rtol=1e-5)
    seen = np.zeros_like(key)
    for position in range(3000):
        seen = np.maximum(seen, turned(keys, position, pairs).abs().amax((0, 2)).numpy())
    assert (seen <= key * (1 + 1e-5)).all()
    np.testing.assert_allclose(key[:, 2 * pairs :], seen[:, 2 * pairs :], rtol=1e-5)
    # Not larger than needed: many positions come near. Nor is it what the first position shows.
    assert pairs == 0 or np.median(seen[:, : 2 * pairs] / key[:, : 2 * pairs]) > 0.98
    assert pairs == 0 or (keys.abs().amax((0, 2)).numpy() < 0.95 * key)[:, : 2 * pairs].sum() > pairs


def test_only_the_first_heads_count() -> None:
    ranges = CacheRanges(0)
    ranges.update(states(1), states(2))
    assert [len(scales) for scales in ranges.scales(2, "")] == [2, 2]


def test_channels_that_never_move_have_a_scale() -> None:
    keys, values = states(1), states(2)
    keys[..., 3] = 0
    values[:, 1] = 0
    ranges = CacheRanges(0)
    ranges.update(keys, values)
    key, value = (largest(scales) for scales in ranges.scales(HEADS, ""))
    np.testing.assert_allclose(key[:, 3], key.max(axis=1) / 1024, rtol=1e-5)
    assert (value[1] > 0).all()


def test_what_cannot_be_known_is_told() -> None:
    with pytest.raises(SourceError, match="hands its keys to no cache"):
        CacheRanges(4).scales(HEADS, "block 7")
    for place in range(2):
        given = [states(1), states(2)]
        given[place][1, 2, 3, 4] = float("nan")
        ranges = CacheRanges(4)
        ranges.update(given[0], given[1])
        with pytest.raises(SourceError, match="not finite") as caught:
            ranges.scales(HEADS, "block 7")
        assert caught.value.where == "block 7"


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3-longrope", "gpt2"])
def test_a_block_is_watched_and_gives_what_it_gave(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    windows = some_windows()
    decoder = calibration(tiny_model(name), windows, tmp_path).decoder
    assert isinstance(decoder, Decoder)
    found = []

    def look(block: Block) -> None:
        plain = block.outputs()
        with cache_ranges.watched(block.layer, decoder) as ranges:
            assert torch.equal(block.outputs(), plain)
        found.append(ranges.scales(decoder.kv_heads, ""))
        with cache_ranges.watched(block.layer, decoder) as unused:
            pass
        block.outputs()  # nobody watches any more
        with pytest.raises(SourceError):
            unused.scales(decoder.kv_heads, "")

    visit(tiny_model(name), windows, look)
    assert len(found) == decoder.layers
    for key, value in found:
        assert key.shape == value.shape == (decoder.kv_heads, 1, decoder.head_dim)
        assert (key > 0).all() and (value > 0).all() and not np.array_equal(key, value)


def test_modules_that_know_no_cache_are_left_alone(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    decoder = calibration(tiny_model("llama"), some_windows(2), tmp_path).decoder
    layer: Module = Linear(4, 4)
    with cache_ranges.watched(layer, decoder):
        assert layer(torch.ones(1, 4)).shape == (1, 4)
