"""How large a block's keys and values get, from which the scales of a cache of bytes follow.

They are seen where transformers hands them to its cache: attention modules are given an object of that interface
instead of none, which keeps nothing but the largest sizes.

Keys come turned by their positions, two channels a pair (rotary embedding), and a text of 500 tokens does not show what
position 5,000 makes of them: scales of what 512 positions show cost SmolLM2-135M 0.06 nats a token at 2,048. So both
channels get the length of their pair, which no position changes. (Following every key through the angles that the
model's positions can turn it by gives scales that are 0.0002 nats better there.)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from compress.contracts import Decoder, FloatArray
from compress.errors import SourceError

#: Codes are -127 to 127; what is larger than the text's largest by this factor still has one.
HEADROOM = 1.25
_CODES = 127
#: The least that a channel's scale is of its head's largest: one that the text hardly moves may move elsewhere.
_LEAST = 1 / 1024


class CacheRanges:
    """Keeps the largest absolute keys and values ``[heads, head_dim]`` of one block; safe from several threads.

    ``pairs``: so many channels are turned, each with the one so many behind it (0: none).
    """

    def __init__(self, pairs: int) -> None:
        self._pairs = pairs
        self._largest: tuple[torch.Tensor, torch.Tensor] | None = None
        self._lock = threading.Lock()

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,  # noqa: ANN401 - what transformers' caches are given besides
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note keys and values ``[windows, heads, length, head_dim]`` and return them."""
        del args, kwargs
        found = self._along_pairs(key_states).amax((0, 2)), value_states.abs().amax((0, 2))
        with self._lock:
            before = self._largest
            first, second = found if before is None else map(torch.maximum, before, found)
            self._largest = first, second
        return key_states, value_states

    def scales(self, heads: int, where: str) -> tuple[FloatArray, FloatArray]:
        """Return the scales of keys and values of the first ``heads`` heads, float32 ``[heads, 1, head_dim]``.

        ``where`` names the block in errors.

        Raises:
            SourceError: The block never handed anything to its cache, or something that is not finite.
        """
        if self._largest is None:
            raise SourceError("the attention hands its keys to no cache: nobody knows how large they are", where=where)
        key, value = (_scales(largest[:heads].numpy(), where) for largest in self._largest)
        return key, value

    def _along_pairs(self, keys: torch.Tensor) -> torch.Tensor:
        """Return how large each channel of each key can be at any position."""
        if not self._pairs:
            return keys.abs()
        first, second, rest = keys.tensor_split((self._pairs, 2 * self._pairs), dim=-1)
        length = torch.hypot(first, second)
        return torch.cat([length, length, rest.abs()], dim=-1)


def _scales(largest: FloatArray, where: str) -> FloatArray:
    if not np.isfinite(largest).all():
        raise SourceError(
            "keys or values are not finite on the calibration text",
            where=where,
            hint="the checkpoint is damaged, or its training diverged; --set graph.cache_type=float keeps them so",
        )
    whole = largest.max(axis=1, keepdims=True)
    whole[whole == 0] = 1  # of nothing but zeros any scale is right
    scales: FloatArray = (np.maximum(largest, whole * _LEAST) * (HEADROOM / _CODES)).astype(np.float32)
    return scales[:, None]


@contextmanager
def watched(layer: torch.nn.Module, decoder: Decoder) -> Iterator[CacheRanges]:
    """Yield what notes the keys and values of a block while it runs."""
    ranges = CacheRanges(0 if decoder.rope_shape is None else decoder.rope_shape[1])

    def hook(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        del module
        return (args, {**kwargs, "cache": ranges}) if "cache" in kwargs else None

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in layer.modules()]
    try:
        yield ranges
    finally:
        for handle in handles:
            handle.remove()
