"""A decoder block while it is calibrated: its planned linears, what they read, and what it gives.

Nothing here is a family's: planned linears find their modules by the checkpoint's tensors. Work is cut into pieces
whose shapes do not depend on the number of threads, and every piece is computed by one thread, so that results have the
same bits however many there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from compress.contracts import FloatArray, InputStatistics, Linear, Slice, Structure
from compress.errors import SourceError
from compress.quantize.finite import first_nonfinite
from compress.validation.streaming import Call, chunks

#: Columns of second moments that are computed at a time.
_BAND = 512


class Workers:
    """A few threads that run pieces of work; results come in the order of the pieces."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="calibrate")

    def map(self, work: Callable[[Any], Any], pieces: Iterable[Any]) -> list[Any]:
        """Return ``work`` of every piece; gradients are off unless the work turns them on."""

        def run(piece: object) -> object:
            with torch.no_grad():  # a thread begins with gradients on
                return work(piece)

        return list(self._pool.map(run, pieces))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


class _Reached(Exception):
    """The linear whose inputs are wanted was reached: the rest of the block need not run."""


@dataclass(frozen=True)
class _Part:
    """Rows of a planned weight and where a module keeps them."""

    module: torch.nn.Module
    parameter: str
    piece: Slice
    rows: slice


class BlockLinear:
    """A planned linear inside a block: N outputs, K inputs."""

    def __init__(self, linear: Linear, places: Mapping[str, tuple[torch.nn.Module, str]]) -> None:
        self.linear, self.name = linear, linear.name
        self._weights = _parts(linear.weight, places, linear.out_features)
        self._biases = _parts(linear.bias, places, linear.out_features)

    @property
    def reader(self) -> torch.nn.Module:
        """Return a module that reads the linear's inputs."""
        return self._weights[0].module

    def modules(self) -> tuple[torch.nn.Module, ...]:
        """Return the modules that hold its weights, each once."""
        return tuple({id(part.module): part.module for part in self._weights}.values())

    def rows_of(self, module: torch.nn.Module) -> list[tuple[slice, slice]]:
        """Return which of the linear's outputs are which of a module's: pairs of slices."""
        return [
            (part.rows, slice(part.piece.start, part.piece.start + part.rows.stop - part.rows.start))
            for part in self._weights
            if part.module is module
        ]

    def weight(self) -> FloatArray:
        """Return the stacked weight, float32 ``[N, K]``."""
        return np.concatenate([self._view(part).numpy() for part in self._weights])

    def set_weight(self, weight: FloatArray) -> None:
        """Let the block compute with another weight ``[N, K]``."""
        for part in self._weights:
            self._view(part).copy_(torch.from_numpy(weight[part.rows]))

    def set_bias(self, bias: FloatArray) -> None:
        """Let the block compute with another bias ``[N]``."""
        for part in self._biases:
            view = getattr(part.module, part.parameter).data[part.piece.start : part.piece.stop]
            view.copy_(torch.from_numpy(bias[part.rows]))

    def divide_rows(self, start: int, divisors: FloatArray) -> None:
        """Divide rows from ``start`` on, and their biases, by ``divisors`` ``[rows]``."""
        whole = np.ones(self.linear.out_features, np.float32)
        whole[start : start + len(divisors)] = divisors
        self.set_weight(self.weight() / whole[:, None])
        for part in self._biases:
            view = getattr(part.module, part.parameter)[part.piece.start : part.piece.stop]
            view.div_(torch.from_numpy(whole[part.rows]))

    def check(self) -> None:
        """Refuse a damaged weight before anything is computed with it.

        Raises:
            SourceError: A weight is not a finite number; with the tensor and the row.
        """
        for part in self._weights:
            values = self._view(part).numpy()
            bad = first_nonfinite(values)
            if bad is not None:
                line = "column" if part.piece.transposed else "row"
                raise SourceError(
                    f"a weight is not a finite number: {values[bad]}",
                    where=f"{part.piece.tensor}, {line} {part.piece.start + bad[0]}",
                    hint="the checkpoint is damaged, or its training diverged; fetch it again",
                )

    def bias(self) -> FloatArray | None:
        """Return the stacked bias ``[N]``, ``None`` without one."""
        parts = [getattr(part.module, part.parameter)[part.piece.start : part.piece.stop] for part in self._biases]
        return np.concatenate([part.numpy() for part in parts]) if parts else None

    @staticmethod
    def _view(part: _Part) -> torch.Tensor:
        whole: torch.Tensor = getattr(part.module, part.parameter).data
        whole = whole.T if part.piece.transposed else whole
        return whole[part.piece.start : part.piece.stop, : part.piece.columns]


def _parts(pieces: Sequence[Slice], places: Mapping[str, tuple[torch.nn.Module, str]], total: int) -> tuple[_Part, ...]:
    parts, below = [], 0
    for piece in pieces:
        module, parameter = places[piece.tensor]
        # A slice without an end is all that there is: only a lone one has none.
        length = total - below if piece.stop is None else piece.stop - piece.start
        parts.append(_Part(module, parameter, piece, slice(below, below + length)))
        below += length
    return tuple(parts)


class BlockModel(Protocol):
    """A model whose blocks are visited: what a :class:`Block` asks of it."""

    def parameters_of(self, layer: torch.nn.Module) -> dict[str, tuple[torch.nn.Module, str]]:
        """Return where a block keeps each of its tensors: module and parameter, by the checkpoint's name."""
        ...


class Block:
    """One block that is being visited (:meth:`StreamedModel.visit_blocks`).

    Attributes:
        index: Its place.
        linears: Its planned linears in the order that they run.
        hidden: What it reads, float32 ``[windows, length, hidden]``; ``None``, and no ``call``, for a block of which
            only the weights are looked at.

    Raises:
        SourceError: A planned weight is not there, or not finite.
    """

    def __init__(
        self,
        model: BlockModel,
        structure: Structure,
        index: int,
        layer: torch.nn.Module,
        call: Call | None,
        hidden: torch.Tensor | None,
        workers: Workers,
    ) -> None:
        self.index, self.layer, self._hidden, self._workers = index, layer, hidden, workers
        self._call = call
        self._places = model.parameters_of(layer)
        planned = [linear for linear in structure.linears if linear.layer == index]
        for linear in planned:
            missing = next((piece.tensor for piece in linear.weight if piece.tensor not in self._places), None)
            if missing is not None:
                raise SourceError("transformers' model keeps a linear's weight elsewhere", where=missing)
        self.linears = tuple(BlockLinear(linear, self._places) for linear in planned)
        for item in self.linears:
            item.check()

    @property
    def hidden(self) -> torch.Tensor:
        """Return what the block reads."""
        assert self._hidden is not None, "this block is only looked at"
        return self._hidden

    def call(self, hidden: torch.Tensor, rows: slice) -> torch.Tensor:
        """Run the block on the windows ``rows``, whose inputs are ``hidden`` ``[rows, length, hidden]``."""
        assert self._call is not None, "this block is only looked at"
        return self._call(hidden, rows)

    def parameter(self, tensor: str) -> torch.Tensor:
        """Return a parameter of the block by the checkpoint's name of it."""
        module, name = self._places[tensor]
        value: torch.Tensor = getattr(module, name).data
        return value

    def outputs(self, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the block gives for ``hidden`` (default: its own inputs), with the weights it has now."""
        given = self.hidden if hidden is None else hidden
        result = torch.empty_like(given)

        def run(rows: slice) -> None:
            result[rows] = self.call(given[rows], rows)

        self._workers.map(run, chunks(given))
        return result

    def inputs(self, linear: BlockLinear, hidden: torch.Tensor | None = None) -> FloatArray:
        """Return what a linear reads, float32 ``[tokens, K]``, with the weights that the block has now.

        ``hidden`` is what the block reads, its own inputs by default.
        """
        states = self.hidden if hidden is None else hidden
        length, columns = states.shape[1], linear.linear.in_features
        found = np.empty((states.shape[0] * length, columns), np.float32)
        place = threading.local()

        def hook(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            seen = given[0].flatten(0, -2)[:, :columns]
            found[place.rows.start * length : place.rows.stop * length] = seen.numpy()
            raise _Reached

        def run(rows: slice) -> None:
            place.rows = rows
            try:
                self.call(states[rows], rows)
            except _Reached:
                return
            raise SourceError("the block does not use a linear that the family describes", where=linear.name)

        handle = linear.reader.register_forward_pre_hook(hook)
        try:
            self._workers.map(run, chunks(states))
        finally:
            handle.remove()
        return found

    def watch(
        self, linears: Sequence[BlockLinear], hidden: torch.Tensor | None = None
    ) -> tuple[dict[str, FloatArray], torch.Tensor]:
        """Run the block once; return what linears read, float32 ``[tokens, K]`` by name, and the block's outputs.

        ``hidden`` is what the block reads, its own inputs by default.
        """
        states = self.hidden if hidden is None else hidden
        length, result, place = states.shape[1], torch.empty_like(states), threading.local()
        found = {
            item.name: np.empty((states.shape[0] * length, item.linear.in_features), np.float32) for item in linears
        }

        def note(item: BlockLinear) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
            def hook(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
                seen = given[0].flatten(0, -2)[:, : item.linear.in_features]
                found[item.name][place.rows.start * length : place.rows.stop * length] = seen.numpy()

            return hook

        def run(rows: slice) -> None:
            place.rows = rows
            result[rows] = self.call(states[rows], rows)

        handles = [item.reader.register_forward_pre_hook(note(item)) for item in linears]
        try:
            self._workers.map(run, chunks(states))
        finally:
            for handle in handles:
                handle.remove()
        return found, result


def statistics(name: str, inputs: FloatArray, workers: Workers, weights: FloatArray | None = None) -> InputStatistics:
    """Return the statistics of a linear's inputs ``[tokens, K]``.

    Args:
        name: The linear's.
        inputs: What it reads.
        workers: Who computes.
        weights: How much each token counts, ``[tokens]`` with mean 1; all the same by default. ``inputs`` are
            multiplied by their roots.

    Raises:
        SourceError: An input is not finite; with the linear's name.
    """
    require_finite(name, inputs)
    tokens, columns = inputs.shape
    magnitude: FloatArray = np.zeros(columns, np.float32)
    for start in range(0, tokens, _BAND):  # no second copy of the inputs
        rows = slice(start, start + _BAND)
        counted = np.abs(inputs[rows])
        if weights is not None:
            counted *= weights[rows, None]
            inputs[rows] *= np.sqrt(weights[rows, None])
        magnitude += counted.sum(axis=0)
    moments = np.empty((columns, columns), np.float32)

    def band(start: int) -> None:
        stop = min(start + _BAND, columns)
        moments[start:stop, start:] = inputs[:, start:stop].T @ inputs[:, start:]
        moments[start:stop, start:] /= tokens

    workers.map(band, range(0, columns, _BAND))
    for start in range(0, columns, _BAND):
        stop = min(start + _BAND, columns)
        moments[start:, start:stop] = moments[start:stop, start:].T
    return InputStatistics(moments, magnitude / np.float32(tokens), tokens)


def require_finite(name: str, inputs: FloatArray) -> None:
    """Refuse hidden states that are not finite.

    Raises:
        SourceError: With the linear's name.
    """
    bad = first_nonfinite(inputs)
    if bad is not None:
        raise SourceError(
            f"the model's hidden states are not finite on the calibration text: {inputs[bad]}",
            where=f"{name}, token {bad[0]}, channel {bad[1]}",
            hint="the checkpoint is damaged, or its training diverged; --set quantize.effort=fast needs no text",
        )
