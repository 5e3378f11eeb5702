"""AutoRound: all linears of a block learn together how to round, from what the block should give.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", 2023 (SignRound).
Every weight has an offset in [-1/2, 1/2] that is added before it is rounded, every block of weights factors of its
range. All move by the sign of their gradient, by a rate that falls linearly to 0, and the parameters that were best on
all windows are kept: the start's, if nothing was better (:mod:`compress.calibrate.rounding` has the arithmetic).

What is unlike the paper:

- The start is GPTQ's result, not round-to-nearest's with the range of max and min, and scales are rounded to what they
  are stored as within the forward pass.
- Range factors move at a rate of their own, a fraction of the offsets': one moves all the weights of its block.

The authors' package ``auto-round`` is not among what is installed here, and neural-compressor drives the algorithm only
through it: there is no reference to compare bits with. The tests hold the gradients to torch's, and what is learnt to
the error of the block on windows that it did not see.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from compress.contracts import FloatArray, LearntBlock, QuantizedRows, ScaleFormat, Scheme
from compress.quantize.gptq import Gptq
from compress.quantize.round_to_nearest import RoundToNearest

STEPS = 60
"""Steps a block. From GPTQ's result few weights have to move; the paper takes 200 from round-to-nearest's."""
BATCH = 2
"""Pieces of at most 512 tokens (:data:`compress.validation.streaming.LAYER_TOKENS`) a step."""
RATE = 0.003
"""How far the first step moves an offset, in codes."""
FACTOR_RATE = 0.0002
"""How far the first step moves a factor."""
CHECKS = 5
"""How often all windows are looked at."""

_SEED = 42


class AutoRound:
    """Rounding learnt block by block; where there is no block (the head), GPTQ.

    Attributes:
        losses: What was made small, by block: at the start, and of what is returned.
    """

    name = "autoround"

    def __init__(
        self,
        steps: int = STEPS,
        *,
        batch: int = BATCH,
        rate: float = RATE,
        factor_rate: float = FACTOR_RATE,
        start: Literal["gptq", "rtn"] = "gptq",
    ) -> None:
        self.steps, self.batch, self.rate, self.factor_rate, self.start = steps, batch, rate, factor_rate, start
        self.losses: dict[int, tuple[float, float]] = {}
        self._compensating, self._nearest = Gptq(), RoundToNearest()

    def quantize(
        self,
        weight: FloatArray,
        scheme: Scheme,
        importance: FloatArray | None = None,
        *,
        scale_format: ScaleFormat = "float32",
        moments: FloatArray | None = None,
    ) -> QuantizedRows:
        """Quantize a weight outside the blocks: by GPTQ where moments are known, else to the nearest.

        See :meth:`compress.quantize.gptq.Gptq.quantize` for arguments and errors.
        """
        return self._compensating.quantize(weight, scheme, importance, scale_format=scale_format, moments=moments)

    def learn(
        self,
        block: LearntBlock,
        fates: Mapping[str, Any],
        targets: Any,  # noqa: ANN401 - torch is not imported here
        scale_format: ScaleFormat,
    ) -> dict[str, QuantizedRows]:
        """Return every planned linear of the block, quantized; the block computes with them from then on.

        The result has the same bits in every run if torch and BLAS use one thread each. Integer products are rounded
        to the nearest and not learnt: a code there depends on its neighbour's. In memory are, beside the block, its
        targets of rounding, offsets and gradients, 4 bytes a weight each, and one piece's activations.

        Args:
            block: Its inputs are those of the quantized blocks before it.
            fates: The plan's fate of each linear to quantize, by name.
            targets: The outputs to come near to, float32 ``[windows, length, hidden]``.
            scale_format: What block scales are rounded to.

        Raises:
            CompressError: The error is not finite; which block.
            SourceError: A linear's inputs are not finite; which.
        """
        from compress.calibrate.rounding import Error, Rounding, batches, begin, finite, trained, weight_gradient
        from compress.store import restored

        results: dict[str, QuantizedRows] = {}
        learnt: list[tuple[Any, Rounding]] = []
        for linear in block.linears:
            if linear.name not in fates:
                continue
            scheme: Scheme = fates[linear.name].scheme
            weight, found = linear.weight(), begin(self._starter(scheme), block, linear, scheme, scale_format)
            results[linear.name] = found
            if scheme.activations == "none":
                learnt.append((linear, Rounding(weight, scheme, found, scale_format)))
            linear.set_weight(restored(found, scheme, weight.shape[1]))
        error = Error(block, targets)
        best = started = finite(error.mean(), block)
        order = batches(len(error.pieces), min(self.batch, len(error.pieces)), [_SEED, block.index])
        with trained([linear for linear, _ in learnt]):
            for step in range(self.steps if learnt else 0):
                falling = 1 - step / self.steps
                finite(error.gradients(next(order)), block)
                for linear, rounding in learnt:
                    rounding.step(weight_gradient(linear), self.rate * falling, self.factor_rate * falling)
                    linear.set_weight(rounding.weight())
                if self._due(step):
                    now = finite(error.mean(), block)
                    if now < best:
                        best = now
                        results |= {linear.name: rounding.result() for linear, rounding in learnt}
        for linear, _ in learnt:
            found, scheme = results[linear.name], fates[linear.name].scheme
            linear.set_weight(restored(found, scheme, linear.linear.in_features))
        self.losses[block.index] = (started, best)
        return results

    def _starter(self, scheme: Scheme) -> Gptq | RoundToNearest:
        return self._compensating if self.start == "gptq" and scheme.activations == "none" else self._nearest

    def _due(self, step: int) -> bool:
        """Return whether all windows are looked at after a step; the last one included."""
        return (step + 1) * CHECKS // self.steps > step * CHECKS // self.steps
