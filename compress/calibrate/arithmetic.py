"""The decoder block's arithmetic on small arrays: norms, rotary embedding, attention, activations.

Float32 NumPy, one sequence, for input statistics; drift is measured against transformers' own model.
Shapes: T tokens, H heads, G key-value heads, D head dimension, C channels.
"""

from __future__ import annotations

import math

import numpy as np

from compress.contracts import FloatArray


def rms_norm(x: FloatArray, weight: FloatArray, epsilon: float) -> FloatArray:
    """Return ``x / rms(x) * weight`` for x ``[T, C]`` (Zhang and Sennrich, 2019)."""
    scale = 1 / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + np.float32(epsilon))
    normed: FloatArray = (x * scale * weight).astype(np.float32, copy=False)
    return normed


def layer_norm(x: FloatArray, weight: FloatArray, bias: FloatArray, epsilon: float) -> FloatArray:
    """Return the layer norm of x ``[T, C]`` (Ba et al., 2016)."""
    centred = x - x.mean(axis=1, keepdims=True)
    scale = 1 / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + np.float32(epsilon))
    normed: FloatArray = (centred * scale * weight + bias).astype(np.float32, copy=False)
    return normed


def rotate(x: FloatArray, theta: float) -> FloatArray:
    """Return x ``[T, H, D]`` with rotary embedding of base ``theta``, halves layout (Su et al., 2021)."""
    tokens, _, size = x.shape
    frequency = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    angle = np.arange(tokens)[:, None] * frequency
    cos, sin = (function(angle).astype(np.float32)[:, None, :] for function in (np.cos, np.sin))
    low, high = x[..., : size // 2], x[..., size // 2 :]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def causal_attention(query: FloatArray, key: FloatArray, value: FloatArray) -> FloatArray:
    """Return ``[T, H * D]`` for query ``[T, H, D]``, key and value ``[T, G, D]``; every head of a group shares them."""
    tokens, heads, size = query.shape
    group = heads // key.shape[1]
    mask = np.triu(np.full((tokens, tokens), -np.inf, np.float32), 1)
    output = np.empty((tokens, heads, size), np.float32)
    for head in range(heads):
        scores = query[:, head] @ key[:, head // group].T / np.float32(math.sqrt(size)) + mask
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        output[:, head] = (weights / weights.sum(axis=1, keepdims=True)) @ value[:, head // group]
    return output.reshape(tokens, -1)


def silu(x: FloatArray) -> FloatArray:
    """Return ``x * sigmoid(x)``."""
    activated: FloatArray = x / (1 + np.exp(-np.clip(x, -80, 80)))
    return activated


def gelu_tanh(x: FloatArray) -> FloatArray:
    """Return the tanh form of GELU (Hendrycks and Gimpel, 2016)."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
    activated: FloatArray = np.float32(0.5) * x * (1 + np.tanh(inner))
    return activated
