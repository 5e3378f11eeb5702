"""Importance of input channels without any text: the model runs once on a few random tokens.

Which input channels of a linear are large is mostly a property of the weights (a handful of outlier channels, neurons
that fire on the first token), and shows on tokens drawn uniformly from the vocabulary. Each weight is read once more
for it and multiplied with 64 rows. What needs no pass, the squared weight of the norm in front, was measured to be
worse than no importance at all (docs/benchmarks.md).

The pass runs in its own thread, just ahead of quantization: a linear's statistics are there before its weights are
read.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from compress.contracts import Checkpoint, FloatArray, ForwardFamily
from compress.errors import CompressError, SourceError
from compress.planning import Fate, Plan
from compress.reading import CHUNK_WEIGHTS, read_rows
from compress.rotation.matrices import block_hadamard
from compress.weights import Stopped

TOKENS = 64


class RandomTokens:
    """Second moments of every linear's inputs; implements :class:`compress.contracts.Runner` for the family."""

    def __init__(
        self, plan: Plan, checkpoint: Checkpoint, family: ForwardFamily, seed: int, stopped: threading.Event
    ) -> None:
        self._plan, self._checkpoint, self._family, self._stopped = plan, checkpoint, family, stopped
        self._head = next(linear.name for linear in plan.decoder.linears if linear.role == "head")
        names = {linear.name for linear in plan.decoder.linears}
        self._blocks = {linear.name: linear.hadamard for linear in plan.decoder.linears if linear.hadamard}
        self._turn = next((linear.name for linear in plan.decoder.linears if linear.role == "rotation"), None)
        self._known: dict[str, FloatArray] = {}
        self._ready = {name: threading.Event() for name in names}
        self._fates = {self._statistics_name(fate): fate for fate in plan.fates if fate.kind != "vector"}
        generator = np.random.default_rng(seed)
        count = min(TOKENS, plan.decoder.context_length)
        self._tokens = generator.integers(0, plan.decoder.vocab_size, count, dtype=np.int64)

    def run(self) -> None:
        """Run the model; returns when every linear has its statistics, or raises.

        Raises:
            SourceError: A weight or an activation is not finite.
        """
        # One BLAS thread: the order of summation, and so the artifact's bytes, must not depend on the machine's cores.
        with threadpool_limits(limits=1, user_api="blas"), np.errstate(all="ignore"):
            self._family.forward(self._checkpoint.config, self._plan.decoder, self._tokens, self)
        forgotten = [name for name, ready in self._ready.items() if not ready.is_set()]
        if forgotten:  # quantization would wait for it for ever
            raise CompressError("the family's forward pass leaves out a linear that it describes", where=forgotten[0])

    def importance(self, fate: Fate) -> FloatArray | None:
        """Return float32 ``[columns]``, the largest between one half and one; ``None`` for a table that no head shares.

        Raises:
            Stopped: The run was stopped while this waited.
        """
        ready = self._ready.get(self._statistics_name(fate))
        if ready is None:
            return None
        while not ready.wait(0.1):
            if self._stopped.is_set():
                raise Stopped
        return self._known[self._statistics_name(fate)]

    # ------------------------------------------------------------------------------------- compress.contracts.Runner

    def observe(self, name: str, inputs: FloatArray) -> None:
        """Take the statistics of a linear's inputs ``[T, K]``; a tied head's are turned first where it is rotated."""
        if self._turn is not None and name == self._head:
            inputs = self.linear(self._turn, inputs)
        moments = np.square(inputs.astype(np.float64)).mean(axis=0)
        if not np.isfinite(moments).all():
            raise SourceError(
                "the model's activations overflow float32 on random tokens",
                where=name,
                hint="the checkpoint is damaged, or its training diverged; or --set quantize.importance=none",
            )
        _, exponent = np.frexp(moments.max())
        self._known[name] = np.ldexp(moments, -int(exponent)).astype(np.float32)
        self._ready[name].set()

    def linear(self, name: str, inputs: FloatArray) -> FloatArray:
        """Observe a linear's inputs ``[T, K]`` and return its outputs ``[T, N]``, reading a few rows at a time."""
        if name in self._blocks:
            inputs = block_hadamard(inputs, self._blocks[name])
        self.observe(name, inputs)
        fate = self._fates[name]
        outputs = np.empty((len(inputs), fate.rows), np.float32)
        whole = any(piece.whole for piece in fate.reads)
        step = fate.rows if whole else max(1, CHUNK_WEIGHTS // fate.columns)
        for start in range(0, fate.rows, step):
            if self._stopped.is_set():
                raise Stopped
            stop = min(start + step, fate.rows)
            outputs[:, start:stop] = inputs @ read_rows(self._checkpoint, fate, start, stop).T
        bias = self._plan.by_name.get(f"{name}.bias")
        if bias is not None:
            outputs += read_rows(self._checkpoint, bias, 0, bias.rows).reshape(-1)
        return outputs

    def vector(self, name: str) -> FloatArray:
        """Return a norm's weight or bias ``[C]``."""
        fate = self._plan.by_name[name]
        return read_rows(self._checkpoint, fate, 0, fate.rows).reshape(-1)

    def rows(self, table: str, indices: npt.NDArray[np.int64]) -> FloatArray:
        """Return rows ``[T, C]`` of a table."""
        fate = self._plan.by_name[table]
        return np.concatenate([read_rows(self._checkpoint, fate, int(row), int(row) + 1) for row in indices])

    def _statistics_name(self, fate: Fate) -> str:
        """Return the linear whose inputs a weight meets: a tied table is the head's weight."""
        return self._head if fate.tied else fate.name
