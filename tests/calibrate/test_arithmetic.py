"""The decoder block's arithmetic against PyTorch's and transformers'; every check has a wrong variant that fails."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from compress.calibrate.arithmetic import causal_attention, gelu_tanh, layer_norm, rms_norm, rotate, silu

TOKENS, CHANNELS, HEADS, GROUPS, SIZE = 19, 48, 6, 2, 8
Array = np.ndarray


def sample(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(found: Array, expected: Array) -> bool:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    return bool(np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max())


# ------------------------------------------------------------------------------------------------------------- norms


def test_rms_norm() -> None:
    import torch

    x, weight = sample(TOKENS, CHANNELS), sample(CHANNELS, seed=1)
    for epsilon in (1e-6, 0.5):
        expected = torch.nn.functional.rms_norm(torch.tensor(x), (CHANNELS,), torch.tensor(weight), epsilon).numpy()
        assert close(rms_norm(x, weight, epsilon), expected)
        assert not close(rms_norm(x, weight, epsilon + 1e-4), expected)
        assert not close(rms_norm(x - x.mean(axis=1, keepdims=True), weight, epsilon), expected)


def test_layer_norm() -> None:
    import torch

    x, weight, bias = sample(TOKENS, CHANNELS) + 3, sample(CHANNELS, seed=1), sample(CHANNELS, seed=2)
    for epsilon in (1e-5, 0.5):
        expected = torch.nn.functional.layer_norm(
            torch.tensor(x), (CHANNELS,), torch.tensor(weight), torch.tensor(bias), epsilon
        ).numpy()
        assert close(layer_norm(x, weight, bias, epsilon), expected)
        assert not close(layer_norm(x, weight, bias, epsilon + 1e-4), expected)
        assert not close(rms_norm(x, weight, epsilon) + bias, expected)


def test_a_row_of_zeros_stays_finite() -> None:
    zero = np.zeros((2, CHANNELS), np.float32)
    one = np.ones(CHANNELS, np.float32)
    assert not rms_norm(zero, one, 1e-6).any()
    assert not layer_norm(zero, one, 0 * one, 1e-5).any()


# --------------------------------------------------------------------------------------------------------- attention


def transformers_rotation(x: Array, theta: float) -> Array:
    import torch
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = transformers.LlamaConfig(
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    heads_first = torch.tensor(x).transpose(0, 1)[None]
    cos, sin = LlamaRotaryEmbedding(config)(heads_first, torch.arange(len(x))[None])
    return apply_rotary_pos_emb(heads_first, heads_first, cos, sin)[0][0].transpose(0, 1).contiguous().numpy()


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotate(theta: float) -> None:
    x = sample(TOKENS, HEADS, SIZE)
    expected = transformers_rotation(x, theta)
    assert close(rotate(x, theta), expected)
    assert not close(rotate(x, theta * 1.1), expected)
    assert not close(rotate(x[..., ::-1], theta)[..., ::-1], expected), "the halves turn the other way"
    interleaved = x.reshape(TOKENS, HEADS, SIZE // 2, 2).swapaxes(2, 3).reshape(x.shape)
    assert not close(rotate(interleaved, theta), expected)


def torch_attention(query: Array, key: Array, value: Array) -> Array:
    import torch

    parts = [torch.tensor(part).transpose(0, 1)[None] for part in (query, key, value)]
    mixed = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
    return mixed[0].transpose(0, 1).reshape(len(query), -1).numpy()


@pytest.mark.parametrize("groups", [1, GROUPS, HEADS])
def test_causal_attention(groups: int) -> None:
    query, key, value = sample(TOKENS, HEADS, SIZE), sample(TOKENS, groups, SIZE, seed=1), sample(TOKENS, groups, SIZE)
    expected = torch_attention(query, key, value)
    assert close(causal_attention(query, key, value), expected)
    assert not close(causal_attention(1.001 * query, key, value), expected), "the scores' scale"
    ahead = causal_attention(query[::-1], key[::-1], value[::-1]).reshape(query.shape)[::-1].reshape(expected.shape)
    assert not close(ahead, expected), "a mask that looks ahead"
    if groups == GROUPS:
        # Heads dealt out in turn instead of group by group.
        dealt = np.arange(HEADS).reshape(GROUPS, -1).T.reshape(-1)
        mixed = causal_attention(query[:, np.argsort(dealt)], key, value).reshape(query.shape)[:, dealt]
        assert not close(np.ascontiguousarray(mixed).reshape(expected.shape), expected)


def test_attention_of_huge_scores_stays_finite() -> None:
    x = 1e4 * sample(TOKENS, 1, SIZE)
    found = causal_attention(x, x, x)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], x[0, 0])


# ------------------------------------------------------------------------------------------------------- activations


def torch_silu(x: Array) -> Array:
    import torch

    return torch.nn.functional.silu(torch.tensor(x)).numpy()


def torch_gelu(x: Array) -> Array:
    import torch

    return torch.nn.functional.gelu(torch.tensor(x), approximate="tanh").numpy()


def exact_gelu(x: Array) -> Array:
    import torch

    return torch.nn.functional.gelu(torch.tensor(x)).numpy()


@pytest.mark.parametrize(
    ("function", "expected", "wrong"),
    [(silu, torch_silu, gelu_tanh), (gelu_tanh, torch_gelu, exact_gelu), (gelu_tanh, torch_gelu, silu)],
)
def test_activations(
    function: Callable[[Array], Array], expected: Callable[[Array], Array], wrong: Callable[[Array], Array]
) -> None:
    x = np.concatenate([np.linspace(-8, 8, 4001, dtype=np.float32), np.float32([-1000, -100, 0, 100, 1000])])
    known = expected(x)
    for part in (slice(None), slice(1000, 3000)):  # large values must not hide the bend
        assert close(function(x[part]), known[part])
        if part.start:
            assert not close(wrong(x[part]), known[part])
