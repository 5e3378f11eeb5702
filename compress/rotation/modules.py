"""A rotated model in torch: what its linears read is turned before they read it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from compress.contracts import Structure
from compress.rotation.matrices import hadamard

if TYPE_CHECKING:
    from compress.validation.streaming import StreamedModel


def rotate_inputs(model: StreamedModel, structure: Structure) -> None:
    """Let the modules of linears with ``hadamard`` multiply their inputs by it, whenever they run."""
    for linear in structure.linears:
        if linear.hadamard:
            module = model.module_of(linear.weight[0].tensor)
            module.register_forward_pre_hook(partial(_turned, torch.from_numpy(hadamard(linear.hadamard).copy())))


def _turned(matrix: torch.Tensor, module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    del module
    inputs, *rest = given
    return (torch.matmul(inputs.reshape(*inputs.shape[:-1], -1, len(matrix)), matrix).flatten(-2), *rest)
