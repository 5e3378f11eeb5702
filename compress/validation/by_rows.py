"""Products with a weight that is never there as a whole: a band of its rows is read, used and dropped.

Before: a block's weights are in memory while it runs, ``y = x W^T + b``.
After:  ``y[:, i] = x W[i]^T + b[i]`` for one band of rows ``i`` after the other, each read when its turn comes.
        A weight that is stored ``[in, out]`` (GPT-2's Conv1D) gives a sum of bands: ``y = b + sum_i x[:, i] W[i]``.

It computes the same to float rounding, and reads the weights once for every few hundred tokens instead of once: so it
is used only where a whole block would take more memory than there may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

#: Bytes of a weight, as float32, that are held at once.
BAND_BYTES = 32 << 20

#: Given the first row and the one behind the last: those rows of a weight, float32.
Read = Callable[[int, int], npt.NDArray[np.float32]]


def products(layer: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the modules inside a block that do nothing but multiply by a weight (and add a bias)."""
    from transformers.pytorch_utils import Conv1D

    for module in layer.modules():
        if type(module) in (torch.nn.Linear, Conv1D):
            yield module


def install(module: torch.nn.Module, read: Read) -> None:
    """Let a module, of :func:`products`, read its weight when it is called; its bias is there. See :func:`remove`."""
    run = _linear if isinstance(module, torch.nn.Linear) else _transposed

    def forward(x: torch.Tensor) -> torch.Tensor:
        return run(x, read, module)

    module.forward = forward


def remove(module: torch.nn.Module) -> None:
    """Undo :func:`install`."""
    del module.forward


def _linear(x: torch.Tensor, read: Read, module: torch.nn.Module) -> torch.Tensor:
    weight, bias = module.get_parameter("weight"), _bias(module)
    result = x.new_empty((*x.shape[:-1], weight.shape[0]))
    for start, stop in _bands(weight.shape):
        band = torch.from_numpy(read(start, stop))
        result[..., start:stop] = torch.nn.functional.linear(x, band, None if bias is None else bias[start:stop])
    return result


def _transposed(x: torch.Tensor, read: Read, module: torch.nn.Module) -> torch.Tensor:
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    flat = x.reshape(-1, x.shape[-1])
    result = bias.repeat(len(flat), 1)
    for start, stop in _bands(weight.shape):
        result.addmm_(flat[:, start:stop], torch.from_numpy(read(start, stop)))
    return result.reshape(*x.shape[:-1], weight.shape[1])


def _bias(module: torch.nn.Module) -> torch.Tensor | None:
    return dict(module.named_parameters(recurse=False)).get("bias")


def _bands(shape: torch.Size) -> Iterator[tuple[int, int]]:
    step = max(1, BAND_BYTES // (4 * shape[1]))
    for start in range(0, shape[0], step):
        yield start, min(shape[0], start + step)
