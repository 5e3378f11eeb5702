"""One block is pruned: what goes is chosen on what the block reads in the pruned model, what stays is fitted again.

Two streams of hidden states run through the model, the source's and the pruned one's. Attention first: heads are
chosen, then its output linear is fitted so that the residual stream after it is the source's again as nearly as can be,
whatever the blocks before have lost. Then the same for the feed-forward and its down projection. A token counts by the
inverse of its power: what reads the stream normalises it, and a first token of a thousandfold power would be all there
is to fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress.calibrate.blocks import Block, BlockLinear, Workers
from compress.contracts import Decoder, Encoder, FloatArray, IntArray, Pruner, Sparsifier, Structure, Units
from compress.prune.amounts import Amounts
from compress.prune.curves import least_neurons, of_units
from compress.prune.cuts import Kept, head_channels
from compress.prune.refit import moments, refit, refit_moments

#: Tokens that one thread multiplies at a time.
_ROWS = 1024


@dataclass(frozen=True)
class Pruned:
    """What was done to a block.

    ``changed`` are the linears, by name, whose weights are not the source's rows and columns. ``errors``: share of the
    power of what was wanted of each that it misses, without and with the fit, on tokens that it was not fitted on.
    """

    kept: Kept
    changed: tuple[str, ...] = ()
    errors: dict[str, tuple[float, float]] | None = None


class BlockPruner:
    """Prunes block after block of one model.

    Args:
        structure: The source's.
        amounts: What is to be left.
        pruner: Chooses neurons and heads.
        fit: Whether what stays is fitted again.
        real: bool ``[windows, length]``: which positions are no padding; ``None`` without a text.
        workers: Threads; the result does not depend on them.
        seed: Of algorithms that draw.
    """

    def __init__(
        self,
        structure: Structure,
        amounts: Amounts,
        pruner: Pruner,
        *,
        fit: bool,
        real: npt.NDArray[np.bool_] | None,
        workers: Workers,
        seed: int,
    ) -> None:
        self.structure, self.amounts, self._pruner = structure, amounts, pruner
        self._fit, self._workers, self._seed = fit, workers, seed
        self._real = None if real is None else real.reshape(-1)
        self._shared = structure.kv_heads if isinstance(structure, Decoder) else structure.heads

    # ------------------------------------------------------------------------------------------- without a text

    def choose(self, block: Block) -> Pruned:
        """Choose by the weights alone."""
        heads = self._heads(block, None)
        return Pruned(replace(heads, neurons=self._neurons(block, None)))

    # ------------------------------------------------------------------------------------------------ two streams

    def follow(self, block: Block, stream: torch.Tensor) -> tuple[Pruned, torch.Tensor, torch.Tensor]:
        """Prune a block that reads ``stream`` in the pruned model.

        The block's own inputs are the source's. It computes as pruned from then on.

        Returns:
            What was done, the source's outputs, and the pruned block's.
        """
        parts = _Parts(block)
        attended, wanted, outputs = self._source(block, parts)
        inputs, before = block.inputs(parts.attention, stream), _flat(stream)
        counts = self._counts(attended)
        kept = self._heads(block, inputs if self._pruner.reads_text else None, counts)
        errors: dict[str, tuple[float, float]] = {}
        attended -= before
        channels = self._head_channels(kept)
        inputs = inputs if channels is None else np.ascontiguousarray(inputs[:, channels])
        self._settle(parts.attention, inputs, attended, channels, counts, errors)
        del attended
        mixed = before + self._outputs(parts.attention, inputs, channels)
        del inputs
        if self._normed:
            seen, _ = block.watch((parts.up, parts.down), stream)
            mixed, inputs = seen.pop(parts.up.name), seen.pop(parts.down.name)
        else:
            inputs = block.inputs(parts.down, stream)
        counts = self._counts(_flat(outputs) if wanted is None else wanted)
        neurons = self._neurons(block, inputs if self._pruner.reads_text else None, counts)
        wanted = (_flat(outputs) if wanted is None else wanted) - mixed
        inputs = inputs if neurons is None else np.ascontiguousarray(inputs[:, neurons])
        self._settle(parts.down, inputs, wanted, neurons, counts, errors)
        if self._normed:
            after = block.outputs(stream)
        else:
            del wanted
            mixed += self._outputs(parts.down, inputs, neurons)
            after = torch.from_numpy(mixed).reshape(stream.shape)
        changed = (parts.attention.name, parts.down.name) if self._fit else ()
        return Pruned(replace(kept, neurons=neurons), changed, errors), outputs, after

    def _source(self, block: Block, parts: _Parts) -> tuple[FloatArray, FloatArray | None, torch.Tensor]:
        """Return the source's residual stream after attention and after the feed-forward, not normed; its outputs.

        Where the outputs are not normed they are the second, which is ``None`` then.
        """
        seen, outputs = block.watch((parts.attention, *((parts.up, parts.down) if self._normed else ())))
        attended = _flat(block.hidden) + self._outputs(parts.attention, seen[parts.attention.name])
        if not self._normed:
            return attended, None, outputs
        return attended, seen[parts.up.name] + self._outputs(parts.down, seen[parts.down.name]), outputs

    @property
    def _normed(self) -> bool:
        """Return whether the feed-forward adds to the normed sum that it reads, as in encoders."""
        return isinstance(self.structure, Encoder)

    def _outputs(self, linear: BlockLinear, inputs: FloatArray, channels: IntArray | None = None) -> FloatArray:
        """Return what a linear gives for some of its channels (default: all), ``[tokens, N]``, some tokens a thread."""
        weight, bias = linear.weight().T, linear.bias()
        weight = weight if channels is None else weight[channels]
        result = np.empty((len(inputs), weight.shape[1]), np.float32)

        def run(start: int) -> None:
            np.matmul(inputs[start : start + _ROWS], weight, out=result[start : start + _ROWS])

        self._workers.map(run, range(0, len(inputs), _ROWS))
        if bias is not None:
            result += bias
        return result

    def _counts(self, stream: FloatArray) -> FloatArray:
        assert self._real is not None
        centred = stream - stream.mean(axis=1, keepdims=True) if isinstance(self.structure, Encoder) else stream
        power = np.einsum("th,th->t", centred, centred) / stream.shape[1]
        counts = np.where(self._real, 1 / np.maximum(power, 1e-12), 0)
        return (counts / max(float(counts.sum()) / max(int(self._real.sum()), 1), 1e-30)).astype(np.float32)

    def _settle(
        self,
        linear: BlockLinear,
        inputs: FloatArray,
        wanted: FloatArray,
        channels: IntArray | None,
        counts: FloatArray,
        errors: dict[str, tuple[float, float]],
    ) -> None:
        """Let a linear read some channels only, with weights fitted to what is wanted of it; ``inputs`` are theirs.

        ``wanted`` is overwritten.
        """
        stay = np.arange(linear.linear.in_features) if channels is None else channels
        part = np.ascontiguousarray(linear.weight()[:, stay])
        if self._fit:
            bias = linear.bias()
            found = refit(inputs, wanted, part, bias, counts, self._workers.map)
            errors[linear.name], part = (found.before, found.after), found.weight
            if bias is not None and found.bias is not None:
                linear.set_bias(found.bias)
        weight = np.zeros((len(part), linear.linear.in_features), np.float32)
        weight[:, stay] = part
        linear.set_weight(weight)

    # ------------------------------------------------------------------------------------------------ predictions

    def costs(self, block: Block) -> tuple[dict[int, float], dict[int, float], torch.Tensor]:
        """Return what removing neurons and key-value heads of a block would cost, by how many stay; its outputs."""
        parts = _Parts(block)
        seen, outputs = block.watch((parts.attention, parts.down))
        counts = self._counts(_flat(outputs))
        assert self._real is not None
        # Counts are inverse powers of the stream, scaled to a mean of 1: undone, a power is a share of the stream's.
        powers = np.square(_flat(outputs)[self._real]).sum(axis=1, dtype=np.float64)
        scale = float((1 / np.maximum(powers, 1e-12)).mean())
        size = self.structure.head_dim * (self.structure.heads // self._shared)
        found = []
        for linear, unit in ((parts.down, 1), (parts.attention, size)):
            known = moments(seen.pop(linear.name), counts, self._workers.map)
            units = Units(linear.weight(), np.zeros(len(known), np.float32), known, unit)
            found.append(of_units(units, scale, least_neurons(units.count) if unit == 1 else 1))
        return found[0], found[1], outputs

    # --------------------------------------------------------------------------------------------- single weights

    def sparsify(
        self,
        block: Block,
        stream: torch.Tensor,
        sparsifier: Sparsifier,
        sparsity: float,
        pattern: tuple[int, int] | None,
    ) -> tuple[Pruned, torch.Tensor]:
        """Set single weights of every linear of a block to zero, one linear after the other; return the new outputs."""
        assert self._real is not None
        counts = self._real.astype(np.float32)
        for linear in block.linears:
            seen = moments(block.inputs(linear, stream), counts, self._workers.map)
            linear.set_weight(sparsifier.sparsify(linear.weight(), sparsity, pattern, seen))
        return Pruned(Kept(), tuple(linear.name for linear in block.linears)), block.outputs(stream)

    # ------------------------------------------------------------------------------------- blocks run several times

    def settle_shared(self, block: Block, seen: dict[str, FloatArray]) -> Pruned:
        """Prune a block that is run several times, by the second moments of its linears' inputs over all runs."""
        parts = _Parts(block)
        kept = self._heads(block, None, known=seen[parts.attention.name].copy())
        kept = replace(kept, neurons=self._neurons(block, None, known=seen[parts.down.name].copy()))
        for linear, channels in ((parts.attention, self._head_channels(kept)), (parts.down, kept.neurons)):
            if channels is None:
                continue
            weight = linear.weight()
            part = weight[:, channels]
            if self._fit:
                part = refit_moments(weight, seen[linear.name], channels)
            weight[:] = 0
            weight[:, channels] = part
            linear.set_weight(weight)
        changed = (parts.attention.name, parts.down.name) if self._fit else ()
        return Pruned(kept, changed)

    def observed(self, block: Block) -> dict[str, FloatArray]:
        """Return the second moments of what attention's output linear and the down projection read, by name."""
        assert self._real is not None
        parts, counts = _Parts(block), self._real.astype(np.float32)
        linears = (parts.attention, parts.down)
        return {item.name: moments(block.inputs(item), counts, self._workers.map) for item in linears}

    # --------------------------------------------------------------------------------------------------- choices

    def _neurons(
        self,
        block: Block,
        inputs: FloatArray | None,
        counts: FloatArray | None = None,
        known: FloatArray | None = None,
    ) -> IntArray | None:
        parts = _Parts(block)
        weight = parts.down.weight()
        count = weight.shape[1] - self.amounts.inner
        if not count:
            return None
        produced = _squares(parts.up.weight()).reshape(-1, weight.shape[1]).sum(axis=0)
        units = Units(weight, produced, self._moments(inputs, counts) if known is None else known)
        return _remaining(units, self._pruner.remove(units, count, seed=self._seed).order)

    def _heads(
        self,
        block: Block,
        inputs: FloatArray | None,
        counts: FloatArray | None = None,
        known: FloatArray | None = None,
    ) -> Kept:
        """Choose whole groups first, then heads of those that stay."""
        heads, shared, size = self.structure.heads, self._shared, self.structure.head_dim
        if (self.amounts.heads, self.amounts.kv_heads) == (heads, shared):
            return Kept()
        each = heads // shared
        parts = _Parts(block)
        produced = _head_weights(parts.qkv.weight(), heads, shared, size)
        seen = self._moments(inputs, counts) if known is None else known
        units = Units(parts.attention.weight(), produced, seen, each * size)
        groups, query = np.arange(shared), np.arange(heads)
        if self.amounts.kv_heads < shared:
            given = units if seen is None else replace(units, moments=seen.copy())
            gone = self._pruner.remove(given, shared - self.amounts.kv_heads, seed=self._seed).order
            groups = _remaining(units, gone)
            query = head_channels(groups, each)
        fewer = self.amounts.heads // self.amounts.kv_heads
        if fewer < each:
            units = _narrowed(replace(units, size=size), head_channels(query, size))
            units = replace(units, classes=np.arange(len(query)) // each)
            gone = self._pruner.remove(units, len(query) - self.amounts.heads, seed=self._seed).order
            query = query[_remaining(units, gone)]
        return Kept(heads=query, kv_heads=groups)

    def _head_channels(self, kept: Kept) -> IntArray | None:
        return None if kept.heads is None else head_channels(kept.heads, self.structure.head_dim)

    def _moments(self, inputs: FloatArray | None, counts: FloatArray | None) -> FloatArray | None:
        return None if inputs is None or counts is None else moments(inputs, counts, self._workers.map)


class _Parts:
    """A block's linears by what they do."""

    def __init__(self, block: Block) -> None:
        roles: dict[str, Any] = {item.linear.role: item for item in block.linears}
        self.qkv: BlockLinear = roles["qkv"]
        self.attention: BlockLinear = roles["attention_output"]
        self.up: BlockLinear = roles.get("gate_up") or roles["up"]
        self.down: BlockLinear = roles["down"]


def _flat(states: torch.Tensor) -> FloatArray:
    flat: FloatArray = states.flatten(0, -2).numpy()
    return flat


def _squares(weight: FloatArray) -> FloatArray:
    """Return the sum of every row's squares, without a second matrix."""
    found = np.einsum("nk,nk->n", weight, weight)
    return np.asarray(found, np.float32)


def _remaining(units: Units, gone: IntArray) -> IntArray:
    return np.setdiff1d(np.arange(units.count), gone)


def _narrowed(units: Units, channels: IntArray) -> Units:
    seen = None if units.moments is None else units.moments[np.ix_(channels, channels)]
    return replace(units, weight=units.weight[:, channels], produced=units.produced[channels], moments=seen)


def _head_weights(weight: FloatArray, heads: int, shared: int, size: int) -> FloatArray:
    """Return the squares of the weights behind every channel that attention mixes, float32 ``[heads * size]``.

    Keys and values count in equal parts for each query head that reads them.
    """
    squares = _squares(weight)
    query, key, value = np.split(squares, [heads * size, (heads + shared) * size])
    group = heads // shared
    pairs = ((key + value) / group).reshape(shared, size)
    return np.asarray(query + np.repeat(pairs, group, axis=0).reshape(-1), np.float32)
