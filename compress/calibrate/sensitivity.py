"""How much a model's answers change when one of its linears is computed in 8-bit integers, measured.

The loss of a linear is ``sum |y' - y|^2 / sum |y - mean y|^2`` over the rows of the model's outputs (embeddings,
logits) on a few texts, with that linear alone quantized as it will be: inputs smoothed and rounded to 8 bits over the
whole tensor, weights rounded per output channel. Everything else stays in float32, so that losses of different linears
can be compared, and nearly add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.adjust import Adjustment
from compress.contracts import FloatArray
from compress.quantize.integer import quantize_channels

if TYPE_CHECKING:
    import torch


def losses(
    modules: Mapping[str, tuple[torch.nn.Linear, ...]],
    adjustments: Mapping[str, Adjustment],
    bits: Mapping[str, int],
    run: Callable[[], FloatArray],
    progress: Callable[[float], None],
) -> dict[str, float]:
    """Measure every linear.

    Args:
        modules: What a planned linear is made of, stacked along its outputs, by name; all read the same input.
        adjustments: How its inputs and weights are changed before.
        bits: Bits of its weights.
        run: Runs the model on the texts and returns its outputs, float32 ``[rows, columns]``.
        progress: Called with the fraction that is done.
    """
    wanted = run().astype(np.float64)
    spread = float(np.sum(np.square(wanted - wanted.mean(axis=0))))
    found: dict[str, float] = {}
    for index, (name, parts) in enumerate(modules.items()):
        with _quantized(parts, adjustments.get(name, Adjustment()), bits[name]):
            got = run().astype(np.float64)
        found[name] = float(np.sum(np.square(got - wanted))) / spread if spread > 0 else 0.0
        progress((index + 1) / len(modules))
    return found


@contextmanager
def _quantized(parts: tuple[torch.nn.Linear, ...], change: Adjustment, bits: int) -> Iterator[None]:
    """Let modules compute as their quantized product would, for a while."""
    import torch

    handles = []
    for part in parts:
        weight = part.weight.detach().numpy()
        stored = Adjustment(columns=change.columns, column_scale=change.column_scale).weight(weight)
        codes, scales = quantize_channels(stored, bits)
        bias = part.bias.detach().numpy()
        whole = Adjustment(shift=change.shift).bias(bias, weight)
        product = _Product(torch.from_numpy(codes * scales[:, None]), torch.from_numpy(whole), change)
        handles.append(part.register_forward_hook(product))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Product:
    """A forward hook that answers with the quantized product instead."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, change: Adjustment) -> None:
        self.weight, self.bias, self.change = weight, bias, change

    def __call__(self, module: Any, inputs: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401 - torch's hooks
        """Return ``[..., N]``."""
        import torch

        values = torch.from_numpy(self.change.inputs(inputs[0].detach().numpy()))
        return torch.nn.functional.linear(round_dynamically(values), self.weight, self.bias)


def round_dynamically(values: torch.Tensor) -> torch.Tensor:
    """Return what 8 bits with one range for the whole tensor leave of it, as ONNX's ``DynamicQuantizeLinear`` does."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = min(max(round(-low / scale), 0), 255)
    return ((values / scale).round().add(zero).clamp(0, 255) - zero) * scale
