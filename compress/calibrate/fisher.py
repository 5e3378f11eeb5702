"""What each way to store each weight would cost, measured by one pass back through the model.

To second order, weights that are off by ``D`` change the model's answers by ``KL = 1/2 E[(g . D x)^2]`` nats a token,
where x is a linear's input and g the gradient, at its output, of the log-probability of a token drawn from the model's
own prediction (the Fisher information; Amari, 1998). Rounding errors of different weights are as good as independent,
so the sum over a weight's elements is taken: ``1/2 sum_ij M_ij D_ij^2`` with ``M_ij = E[(sum_t g_ti x_tj)^2]`` a token.
A weight's error is the same at every position, so t runs over a piece of a window: over all of it there would be too
few pieces to take the mean of, and one by one, query and key projections come out several times too low.

Forward: block by block, each block's inputs are kept. The head: a few thousand rows at a time, twice (normalizer and
draw; gradient). Backward: the blocks in reverse, each recomputed. One block is in memory, and the hidden states.

The losses are those of rounding to nearest with searched scales. GPTQ leaves less of some and errors add up beyond
second order: what is measured in the end came to between 0.9 and 1.2 of the prediction (docs/accuracy.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from compress.calibrate.blocks import Block, BlockLinear, Workers, require_finite
from compress.contracts import FloatArray, Scheme
from compress.planning import Fate
from compress.quantize.round_to_nearest import RoundToNearest
from compress.reading import read_rows
from compress.store import restored
from compress.validation.streaming import Call, StreamedModel, chunks, empty

if TYPE_CHECKING:
    from compress.calibrate.decoder_worker import Calibration

_ROWS = 512
#: Rows of a linear that stand for all of them, evenly spaced.
_SAMPLE = 1024
_HEAD_ROWS = 1024
#: Tokens whose gradients of a weight are summed before they are squared.
_PIECE = 64
#: Tokens whose gradients are in memory at once.
GROUP_TOKENS = 2048


@dataclass(frozen=True)
class Sensitivity:
    """What the pass back found.

    Attributes:
        losses: Nats a token of every option, by weight, in the order of its options.
        tokens: How much each token's errors matter to a linear, float32 ``[T]`` with mean 1, by linear: the root mean
            square of the gradients at its outputs.
    """

    losses: Mapping[str, list[float]]
    tokens: Mapping[str, FloatArray]


def measure(
    given: Calibration,
    options: Mapping[str, tuple[Scheme, ...]],
    *,
    seed: int,
    tokens: int,
    work: Path,
    progress: Callable[[float], None],
) -> Sensitivity:
    """Go through the model and back.

    Args:
        given: Model, plan and windows.
        options: Schemes by weight.
        seed: Of the tokens that are drawn.
        tokens: As many of the windows are used as these take, at least one.
        work: An existing directory for the blocks' inputs, which are removed again.
        progress: Called with the fraction that is done.

    Raises:
        SourceError: Hidden states or gradients are not finite; with the linear's name.
        UsageError: A scheme does not exist.
    """
    windows = given.windows[: max(1, tokens // given.windows.shape[1])]
    with _States(work) as states:
        fisher = _Fisher(given, windows, options, states)
        last, final = fisher.forward(lambda fraction: progress(0.25 * fraction))
        torch.autograd.backward(final, fisher.head(final, seed))
        progress(0.35)
        assert last.grad is not None
        fisher.backward(last.grad, lambda fraction: progress(0.35 + 0.65 * fraction))
    return Sensitivity({name: [float(value) for value in fisher.losses[name]] for name in options}, fisher.tokens)


class _States:
    """Every block's inputs, in files: for 8,192 tokens of a long model they would be gigabytes of memory."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._shapes: list[tuple[int, ...]] = []

    def push(self, state: torch.Tensor) -> None:
        """Keep the inputs of the next block."""
        array = np.ascontiguousarray(state.detach().numpy())
        with self._path(len(self._shapes)).open("wb") as file:
            file.write(array.data)
        self._shapes.append(array.shape)

    def pop(self) -> torch.Tensor:
        """Return the last that were kept, and forget them."""
        shape = self._shapes.pop()
        path = self._path(len(self._shapes))
        array = np.fromfile(path, np.float32).reshape(shape)
        path.unlink()
        return torch.from_numpy(array)

    def __len__(self) -> int:
        return len(self._shapes)

    def __enter__(self) -> _States:
        return self

    def __exit__(self, *failure: object) -> None:
        for index in range(len(self._shapes)):
            self._path(index).unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        return self._work / f".state-{index}"


class _Fisher:
    def __init__(
        self,
        given: Calibration,
        windows: npt.NDArray[np.int64],
        options: Mapping[str, tuple[Scheme, ...]],
        states: _States,
    ) -> None:
        self.given, self.windows, self.options, self.states = given, windows, options, states
        self.tokens: dict[str, FloatArray] = {}
        self.model: StreamedModel = given.model
        self.workers: Workers = given.workers
        self.layers: list[tuple[torch.nn.Module, Call]] = []
        self.nearest = RoundToNearest()
        self.losses: dict[str, npt.NDArray[np.float64]] = {}

    def forward(self, progress: Callable[[float], None]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep every block's inputs; return the last block's outputs, and what the final norm makes of them.

        The last follows from the one before it by torch's graph, the only one that is kept.
        """
        ends: list[torch.Tensor] = []

        def visit(index: int, layer: torch.nn.Module, call: Call, hidden: torch.Tensor) -> torch.Tensor:
            self.states.push(hidden)
            self.layers.append((layer, call))
            block = Block(self.model, self.given.decoder, index, layer, call, hidden, self.workers)
            require_finite(block.linears[0].name, hidden.detach().flatten(0, -2).numpy())
            result = block.outputs()
            progress((index + 1) / self.given.decoder.layers)
            if index + 1 == self.given.decoder.layers:
                ends.append(result.requires_grad_())
            return result

        final = self.model.visit_blocks(self.windows, visit)
        return ends[0], final

    def head(self, final: torch.Tensor, seed: int) -> torch.Tensor:
        """Draw a token at every position; return the gradient at ``final``, of its shape, note the head's losses."""
        fate = self.given.head()
        hidden = np.ascontiguousarray(final.detach().flatten(0, -2).numpy())
        require_finite(fate.name, hidden)
        bands = range(0, fate.rows, _HEAD_ROWS)
        normalizer, token = _draw(lambda start: hidden @ self._head_rows(fate, start).T, bands, seed, self.workers)
        squares = np.square(hidden)
        importance = squares.mean(axis=0)

        def back(start: int) -> tuple[FloatArray, npt.NDArray[np.float64]]:
            rows = self._head_rows(fate, start)
            error = np.exp(hidden @ rows.T - normalizer[:, None])
            inside = (token >= start) & (token < start + len(rows))
            error[inside, token[inside] - start] -= 1
            gradient = error @ rows
            np.square(error, out=error)
            return gradient, self._cost(fate.name, rows, (error.T @ squares) / len(hidden), importance)

        gradient = np.zeros_like(hidden)
        total: npt.NDArray[np.float64] = np.zeros(len(self.options.get(fate.name, ())))
        step = 4  # so many bands' gradients are in memory at once
        for start in range(0, len(bands), step):
            for part, cost in self.workers.map(back, bands[start : start + step]):
                gradient += part
                total += cost
        self.losses[fate.name] = total
        self._head_importance = importance
        return torch.from_numpy(gradient.reshape(final.shape))

    def backward(self, gradient: torch.Tensor, progress: Callable[[float], None]) -> None:
        """Go back through the blocks and note the losses of their linears and of the token table."""
        for index in reversed(range(len(self.states))):
            layer, call = self.layers[index]
            self.model.fill(layer)
            block = Block(self.model, self.given.decoder, index, layer, call, self.states.pop(), self.workers)
            gradient = self._block(block, gradient)
            empty(layer)
            progress((len(self.layers) - index) / len(self.layers))
        self._table(gradient)

    def _block(self, block: Block, gradient: torch.Tensor) -> torch.Tensor:
        """Note a block's token weights and the losses of its linears; return the gradient at its inputs."""
        linears = [linear for linear in block.linears if self._wanted(linear.name)]
        sums = {linear.name: _Sums(linear, linear.name in self.options) for linear in linears}
        result = torch.empty_like(gradient)
        step = max(1, GROUP_TOKENS // gradient.shape[1])
        for start in range(0, len(gradient), step):
            recorder = _Recorder(block, linears, slice(start, min(start + step, len(gradient))))
            result[recorder.rows] = recorder.run(gradient, self.workers)
            for linear, inputs, gradients in recorder.found():
                require_finite(linear.name, gradients)
                sums[linear.name].add(inputs, gradients, gradient.shape[1], self.workers)
        for name, found in sums.items():
            # The root: squares leave too few tokens to count (docs/accuracy.md).
            self.tokens[name] = _relative(np.sqrt(np.concatenate(found.tokens)))
            if name in self.options:
                self.losses[name] = self._spread(name, found)
        return result

    def _spread(self, name: str, found: _Sums) -> npt.NDArray[np.float64]:
        """Return the losses of a linear's options, from the rows that stand for all."""
        count = sum(map(len, found.tokens))
        importance = found.squares / np.float32(count)
        found.spread /= np.float32(count)

        def cost(start: int) -> npt.NDArray[np.float64]:
            rows = slice(start, start + _ROWS)
            return self._cost(name, found.weight[rows], found.spread[rows], importance)

        parts = self.workers.map(cost, range(0, len(found.weight), _ROWS))
        total: npt.NDArray[np.float64] = np.sum(parts, axis=0) * (found.rows / len(found.weight))
        return total

    def _table(self, gradient: torch.Tensor) -> None:
        """Note what errors of the looked-up rows cost."""
        fate = next(fate for fate in self.given.plan.fates if fate.role == "embedding")
        if fate.name not in self.options:
            return
        slopes = np.square(gradient.flatten(0, -2).numpy())
        used, place = np.unique(self.windows.reshape(-1), return_inverse=True)
        weights: FloatArray = np.zeros((len(used), fate.columns), np.float32)
        np.add.at(weights, place.reshape(-1), slopes / len(slopes))
        rows = np.concatenate([read_rows(self.given.checkpoint, fate, int(row), int(row) + 1) for row in used])
        importance = self._head_importance if fate.tied else None
        cost = self._cost(fate.name, rows, weights, importance)
        self.losses[fate.name] = self.losses.get(fate.name, np.zeros_like(cost)) + cost

    def _wanted(self, name: str) -> bool:
        return self.given.plan.by_name[name].scheme is not None

    def _head_rows(self, fate: Fate, start: int) -> FloatArray:
        return read_rows(self.given.checkpoint, fate, start, min(start + _HEAD_ROWS, fate.rows))

    def _cost(
        self, name: str, rows: FloatArray, weights: FloatArray, importance: FloatArray | None
    ) -> npt.NDArray[np.float64]:
        """Return ``1/2 sum M D^2`` of some rows ``[n, K]`` with M ``[n, K]``, for every option of their weight."""
        found = []
        for scheme in self.options.get(name, ()):
            result = self.nearest.quantize(rows, scheme, importance, scale_format=self.given.plan.scale_format)
            error = restored(result, scheme, rows.shape[1])
            error -= rows
            found.append(0.5 * float(np.einsum("nk,nk,nk->", weights, error, error, dtype=np.float64)))
        return np.array(found)


class _Sums:
    """What is summed over tokens for one linear; n of its rows stand for all of them."""

    def __init__(self, linear: BlockLinear, spread: bool) -> None:
        self.rows = linear.linear.out_features
        count = min(self.rows, _SAMPLE) if spread else 0
        self._sample = np.unique(np.linspace(0, self.rows - 1, count).round().astype(np.int64))
        self.weight = np.ascontiguousarray(linear.weight()[self._sample])
        self.spread: FloatArray = np.zeros(self.weight.shape, np.float32)
        self.squares: FloatArray = np.zeros(linear.linear.in_features, np.float32)
        self.tokens: list[FloatArray] = []

    def add(self, inputs: FloatArray, gradients: FloatArray, length: int, workers: Workers) -> None:
        """Take some windows' inputs ``[t, K]`` and gradients ``[t, N]``, ``length`` tokens a window."""
        self.tokens.append(np.einsum("tn,tn->t", gradients, gradients) / np.float32(gradients.shape[1]))
        if not len(self._sample):
            return
        self.squares += np.einsum("tk,tk->k", inputs, inputs)
        pieces = [
            slice(start, min(start + _PIECE, window + length))
            for window in range(0, len(inputs), length)
            for start in range(window, window + length, _PIECE)
        ]

        def band(start: int) -> None:
            chosen, total = self._sample[start : start + _ROWS], self.spread[start : start + _ROWS]
            for piece in pieces:
                product = gradients[piece, chosen].T @ inputs[piece]
                product *= product
                total += product

        workers.map(band, range(0, len(self._sample), _ROWS))


class _Recorder:
    """Keeps what a block's linears read on some windows, and the gradients at what they give; t tokens."""

    def __init__(self, block: Block, linears: list[BlockLinear], rows: slice) -> None:
        self.block, self.linears, self.rows = block, linears, rows
        tokens = (rows.stop - rows.start) * block.hidden.shape[1]
        self._inputs = {item.name: np.empty((tokens, item.linear.in_features), np.float32) for item in linears}
        self._gradients = {item.name: np.empty((tokens, item.linear.out_features), np.float32) for item in linears}
        self._place = threading.local()

    def run(self, gradient: torch.Tensor, workers: Workers) -> torch.Tensor:
        """Return the gradient at the block's inputs for its windows, given that at the outputs of all."""
        handles = [
            module.register_forward_hook(partial(self._watch, linear, module))
            for linear in self.linears
            for module in linear.modules()
        ]
        first, length = self.rows.start, gradient.shape[1]
        result = torch.empty_like(gradient[self.rows])

        def run(part: slice) -> None:
            self._place.tokens = slice(part.start * length, part.stop * length)
            rows = slice(first + part.start, first + part.stop)
            with torch.enable_grad():
                inputs = self.block.hidden[rows].clone().requires_grad_()
                torch.autograd.backward(self.block.call(inputs, rows), gradient[rows])
            assert inputs.grad is not None
            result[part] = inputs.grad

        try:
            workers.map(run, chunks(result))
        finally:
            for handle in handles:
                handle.remove()
        return result

    def found(self) -> Iterator[tuple[BlockLinear, FloatArray, FloatArray]]:
        """Yield every linear with its inputs ``[T, K]`` and gradients ``[T, N]``."""
        for linear in self.linears:
            yield linear, self._inputs.pop(linear.name), self._gradients.pop(linear.name)

    def _watch(
        self,
        linear: BlockLinear,
        module: torch.nn.Module,
        _: object,
        given: tuple[torch.Tensor, ...],
        out: torch.Tensor,
    ) -> None:
        tokens = self._place.tokens
        if module is linear.reader:
            self._inputs[linear.name][tokens] = given[0].detach().flatten(0, -2).numpy()

        def keep(gradient: torch.Tensor) -> None:
            for rows, columns in linear.rows_of(module):
                self._gradients[linear.name][tokens, rows] = gradient.flatten(0, -2)[:, columns].numpy()

        out.register_hook(keep)  # type: ignore[no-untyped-call]


def _relative(weights: FloatArray) -> FloatArray:
    """Return weights with mean 1; all 1 where there are none."""
    mean = float(weights.mean(dtype=np.float64))
    return weights / np.float32(mean) if mean > 0 else np.ones_like(weights)


def _draw(
    logits: Callable[[int], FloatArray], bands: range, seed: int, workers: Workers
) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """Return the logarithm of the softmax's denominator ``[T]`` and a token drawn from it ``[T]``, band by band."""

    def draw(start: int) -> tuple[FloatArray, FloatArray, npt.NDArray[np.int64], FloatArray]:
        band = logits(start)
        peak = band.max(axis=1)
        total = np.exp(band - peak[:, None]).sum(axis=1)
        # The greatest of logits plus Gumbel noise is a draw from the softmax (Gumbel, 1954).
        band += np.random.default_rng((seed, start)).gumbel(size=band.shape).astype(np.float32)
        best = band.argmax(axis=1)
        return peak, total, best + start, band[np.arange(len(best)), best]

    peaks, totals, drawn, noisy = (np.stack(parts) for parts in zip(*workers.map(draw, bands), strict=True))
    peak = peaks.max(axis=0)
    normalizer = peak + np.log((totals * np.exp(peaks - peak)).sum(axis=0))
    return normalizer, drawn[noisy.argmax(axis=0), np.arange(drawn.shape[1])]
