"""What AutoRound learns of a weight, rounding offsets and range factors, and from what: how far a block's outputs are.

N rows, B blocks a row, S weights a block; ``s`` scales, ``z`` zero points. The forward pass is what will be stored,
rounding of the scales to their format included::

    s = s0 * (alpha * z0 + beta * (top - z0)) / top     (the start's range, both ends scaled; symmetric: alpha * s0)
    z = round(alpha * z0 * s0 / s)
    q = clip(round(w / s + v) + z, 0, top)              (v in [-1/2, 1/2])
    w' = s * (q - z)

Gradients pass rounding as if it were not there (straight through). By hand, because of 3.5 million weights little is
needed: the sign of a weight's gradient and two sums a block. In automatic differentiation the same takes longer than
the block's own passes. The tests hold the hand's to torch's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from compress.calibrate.blocks import Workers, statistics
from compress.contracts import FloatArray, LearntBlock, QuantizedRows, Quantizer, ScaleFormat, Scheme
from compress.errors import CompressError
from compress.quantize.scales import round_scales
from compress.quantize.scheme import zero_code
from compress.validation.streaming import chunks

OFFSET_LIMIT = 0.5
"""Rounding offsets reach the next code on either side of a target, no further."""
FACTOR_RANGE = (0.5, 1.5)
"""What a searched range may be multiplied by. The paper starts from max and min and only shrinks."""

_MARGIN = 0.05
"""Codes' width that a target keeps from the edge of the cell that it starts in."""
_CHUNK = 128 * 1024


class Rounding:
    """One weight's learnt parameters.

    Attributes:
        offsets: ``v``, float32 ``[N, B, S]``.
        factors: alpha (and beta of asymmetric schemes), float32 ``[1 or 2, N, B]``.
        targets: What is rounded, float32 ``[N, B, S]``; padding is 0.
    """

    def __init__(self, weight: FloatArray, scheme: Scheme, start: QuantizedRows, scale_format: ScaleFormat) -> None:
        """Begin with ``start``, codes included.

        Args:
            weight: float32 ``[N, K]``, finite.
            scheme: Bits, block size, symmetry; no integer product.
            start: The weight quantized somehow. Where its code is not that of the nearest value (GPTQ), the target is
                moved to just inside the code's cell.
            scale_format: What scales are rounded to.
        """
        rows, columns = weight.shape
        blocks = scheme.blocks(columns)
        self.columns, self.scheme, self.scale_format = columns, scheme, scale_format
        self.top, self._symmetric = float((1 << scheme.bits) - 1), start.zero_points is None
        scales = torch.from_numpy(start.scales.copy())
        zeros = (
            torch.full_like(scales, float(zero_code(scheme.bits)))
            if start.zero_points is None
            else torch.from_numpy(start.zero_points.astype(np.float32))
        )
        self._scales, self._zeros, self._above = scales, zeros, self.top - zeros
        self.targets = torch.zeros((rows, blocks, start.codes.shape[1] // blocks))
        self.targets.view(rows, -1)[:, :columns] = torch.from_numpy(weight)
        self._move_into_cells(torch.from_numpy(start.codes).view(self.targets.shape))
        self.offsets = torch.zeros_like(self.targets)
        self.factors = torch.ones((1 if self._symmetric else 2, rows, blocks))
        self._step = max(1, _CHUNK // max(1, start.codes.shape[1]))

    def _move_into_cells(self, codes: torch.Tensor) -> None:
        """Let every target round to its code; those that do already stay where they are."""
        scales, zeros = self._scales[..., None], self._zeros[..., None]
        inverse = _reciprocal(scales)
        for part in self._parts(len(codes), max(1, _CHUNK // max(1, codes[0].numel()))) if len(codes) else ():
            units = self.targets[part] * inverse[part]
            wanted = codes[part] - zeros[part]
            moved = ((units.round() + zeros[part]).clamp_(0, self.top) - zeros[part]) != wanted
            inside = torch.minimum(torch.maximum(units, wanted - 0.5 + _MARGIN), wanted + 0.5 - _MARGIN)
            self.targets[part] = torch.where(moved, inside * scales[part], self.targets[part])

    @staticmethod
    def _parts(rows: int, step: int) -> list[slice]:
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scales, rounded to their format, and zero points, float32 ``[N, B]`` each."""
        if self._symmetric:
            exact, zeros = self.factors[0] * self._scales, self._zeros
        else:
            below = self.factors[0] * self._zeros
            width = below + self.factors[1] * self._above
            exact = self._scales * (width / self.top)
            zeros = (below * self.top / width).round_()
        return torch.from_numpy(round_scales(exact.numpy(), self.scale_format)), zeros

    def weight(self) -> FloatArray:
        """Return what the block computes with, float32 ``[N, K]``: exactly what :meth:`result` will restore to."""
        scales, zeros = self.grid()
        found = torch.empty_like(self.targets)
        for part in self._parts(len(found), self._step):
            values = self._codes(part, scales, zeros)
            values -= zeros[part, :, None]
            torch.mul(values, scales[part, :, None], out=found[part])
        return found.view(len(found), -1)[:, : self.columns].numpy()

    def result(self) -> QuantizedRows:
        """Return codes, scales and zero points."""
        scales, zeros = self.grid()
        codes = np.empty(self.targets.shape, np.uint8)
        for part in self._parts(len(codes), self._step):
            codes[part] = self._codes(part, scales, zeros).numpy().astype(np.uint8)
        points = None if self._symmetric else zeros.numpy().astype(np.uint8)
        return QuantizedRows(codes.reshape(len(codes), -1), scales.numpy().copy(), points)

    def step(self, gradient: FloatArray, rate: float, factor_rate: float) -> None:
        """Move everything against the sign of its gradient.

        Args:
            gradient: Of the loss by :meth:`weight`, float32 ``[N, K]``.
            rate: How far offsets are moved, in codes.
            factor_rate: How far the factors are moved.
        """
        by_offset, by_factor = self.gradients(gradient)
        if rate:
            self.offsets.sub_(by_offset.sign_(), alpha=rate).clamp_(-OFFSET_LIMIT, OFFSET_LIMIT)
        self.factors.sub_(by_factor.sign_(), alpha=factor_rate).clamp_(*FACTOR_RANGE)

    def gradients(self, gradient: FloatArray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss's gradients by offsets ``[N, B, S]`` and factors ``[1 or 2, N, B]``, straight through.

        Args:
            gradient: Of the loss by :meth:`weight`, float32 ``[N, K]``.
        """
        scales, zeros = self.grid()
        by_offset = torch.zeros_like(self.targets)
        by_offset.view(len(by_offset), -1)[:, : self.columns] = torch.from_numpy(gradient)
        by_scale, by_zero = torch.empty_like(scales), torch.empty_like(scales)
        inverse = _reciprocal(scales)
        for part in self._parts(len(by_offset), self._step):
            scale, zero, given = scales[part, :, None], zeros[part, :, None], by_offset[part]
            units = self.targets[part] * inverse[part, :, None]
            raw = units.add(self.offsets[part]).round_().add_(zero)
            codes = raw.clamp(0, self.top)
            inside = raw == codes
            units.mul_(inside)
            torch.sum((codes - zero).sub_(units).mul_(given), -1, out=by_scale[part])
            reached = given * inside
            torch.sum(reached - given, -1, out=by_zero[part])
            torch.mul(reached, scale, out=given)
        if self._symmetric:
            return by_offset, (by_scale * self._scales)[None]
        below, above = self.factors[0] * self._zeros, self.factors[1] * self._above
        by_zero *= scales * (self.top / torch.square(below + above))
        by_scale *= self._scales / self.top
        by_low = (by_scale + by_zero * above) * self._zeros
        by_high = (by_scale - by_zero * below) * self._above
        return by_offset, torch.stack([by_low, by_high])

    def _codes(self, part: slice, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        units = self.targets[part] * _reciprocal(scales[part, :, None])
        return units.add_(self.offsets[part]).round_().add_(zeros[part, :, None]).clamp_(0, self.top)


def _reciprocal(values: torch.Tensor) -> torch.Tensor:
    """Return ``1 / values``, 0 where a value is 0."""
    return torch.where(values != 0, 1 / torch.where(values != 0, values, 1.0), 0.0)


def weight_gradient(linear: Any) -> FloatArray:
    """Return the gradient that a block's planned linear (:class:`compress.calibrate.blocks.BlockLinear`) was given.

    Returns:
        float32 ``[N, K]``; 0 for rows that no gradient reached.
    """
    planned = linear.linear
    found = np.zeros((planned.out_features, planned.in_features), np.float32)
    transposed = planned.weight[0].transposed
    for module in linear.modules():
        gradient = module.weight.grad
        if gradient is None:
            continue
        whole = (gradient.T if transposed else gradient).numpy()
        for rows, own in linear.rows_of(module):
            found[rows] = whole[own]
    return found


class Error:
    """How far a block's outputs are from what they should be: the mean square of the difference.

    Attributes:
        pieces: Windows that are run at a time.
    """

    def __init__(self, block: LearntBlock, targets: torch.Tensor) -> None:
        self._block, self._targets = block, targets
        self.pieces = tuple(chunks(targets))

    def mean(self) -> float:
        """Return the mean over all tokens and channels."""
        with torch.no_grad():
            total = sum(float(self._of(rows).sum(dtype=torch.float64)) for rows in self.pieces)
        return total / self._targets.numel()

    def gradients(self, pieces: Iterable[int]) -> float:
        """Give the block's parameters the gradients of the error of some pieces, and return that error."""
        for parameter in self._block.layer.parameters():
            parameter.grad = None
        total = 0.0
        with torch.enable_grad():
            for piece in pieces:
                loss = self._of(self.pieces[piece]).sum()
                torch.autograd.backward(loss)
                total += float(loss.detach())
        return total

    def _of(self, rows: slice) -> torch.Tensor:
        given: torch.Tensor = self._block.call(self._block.hidden[rows], rows)
        return torch.square(given - self._targets[rows])


def finite(loss: float, block: LearntBlock) -> float:
    """Return a block's error, or refuse one that is none.

    Raises:
        CompressError: It is not finite; with the block's index.
    """
    if not np.isfinite(loss):
        raise CompressError(
            f"the block's error is not finite: {loss}",
            where=f"block {block.index}",
            hint="the checkpoint is damaged, or overflows on this text; --set quantize.effort=fast needs none",
        )
    return loss


def batches(pieces: int, size: int, seed: list[int]) -> Iterator[list[int]]:
    """Yield ``size`` pieces at a time, in a drawn order in which each comes once before any comes twice."""
    random, waiting = np.random.default_rng(seed), list[int]()
    while True:
        while len(waiting) < size:
            waiting += [int(piece) for piece in random.permutation(pieces)]
        yield waiting[:size]
        del waiting[:size]


@contextmanager
def trained(linears: Iterable[Any]) -> Iterator[None]:
    """Let torch compute the gradients of planned linears' weights; nothing of them is left afterwards."""
    parameters = {id(module.weight): module.weight for linear in linears for module in linear.modules()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters.values():
            parameter.grad = None
            parameter.requires_grad_(False)


def begin(quantizer: Quantizer, block: Any, linear: Any, scheme: Scheme, scale_format: ScaleFormat) -> QuantizedRows:
    """Quantize a planned linear of a :class:`compress.calibrate.blocks.Block` by its inputs' second moments.

    Raises:
        SourceError: An input is not finite; with the linear's name.
    """
    workers = Workers(1)
    try:
        found = statistics(linear.name, block.inputs(linear), workers)
    finally:
        workers.close()
    importance = np.ascontiguousarray(np.diagonal(found.moments))
    weight = linear.weight()
    return quantizer.quantize(weight, scheme, importance, scale_format=scale_format, moments=found.moments)
