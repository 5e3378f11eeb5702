"""What calibrating a decoder will take, from sizes alone: peak memory of its worker, and time on this machine.

Time is counted in floating-point operations of matrix products, at the rate that this machine shows in a product that
takes a few hundredths of a second. T tokens, N outputs and K inputs of a linear. A linear's weight is multiplied by
every token each time that the part of its block is run: once for its own and every later linear's inputs, once for the
block's outputs; three times more in the pass back.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from compress import assign
from compress.calibrate import decoder as calibration
from compress.contracts import FloatArray, Linear
from compress.planning import Plan
from compress.profile import Profile

_MB = 1_000_000
#: Python with torch and transformers.
_LIBRARIES = 340 * _MB
#: What the allocator keeps beside what is in use.
_SLACK = 1.1
_FLOAT = 4
#: Tokens that a thread runs through a block at a time, that gradients are kept of, and rows of the head at a time.
_CHUNK, _GROUP, _HEAD_ROWS, _HEAD_BANDS = 512, 2048, 1024, 4
#: Rows that stand for a linear in the pass back.
_SAMPLE = 1024
#: Share of the rate of a large product that the work as a whole reaches: the rest is attention, norms, searches.
EFFICIENCY = 0.55
#: Seconds a weight and option that a thread searches scales for.
_SEARCH = 2.5e-8
#: Operations a second that factorizing second moments reaches, of those that products do.
_FACTOR_RATE = 0.25


@dataclass(frozen=True)
class Estimate:
    """Peak bytes of the calibration worker, and seconds of all of it."""

    nbytes: int
    seconds: float


def estimate(plan: Plan, profile: Profile, threads: int, rate: float | None = None) -> Estimate | None:
    """Predict a calibration, ``None`` where the profile asks for none.

    Args:
        plan: Any plan of the model: what bits are chosen changes little.
        profile: Tokens, effort, allocation.
        threads: Threads that calibrate.
        rate: Operations a second of one thread; measured by default.
    """
    if not calibration.wanted(plan, profile):
        return None
    work = _Work(plan, profile)
    seconds = work.operations() / ((rate or measured_rate()) * EFFICIENCY) + work.searched() * _SEARCH
    return Estimate(work.peak(threads), seconds / threads)


def measured_rate(size: int = 1024) -> float:
    """Return the operations a second of one thread in a float32 matrix product."""
    generator = np.random.default_rng(0)
    left, right = (generator.random((size, size), np.float32) for _ in range(2))
    best = float("inf")
    with threadpool_limits(limits=1, user_api="blas"):
        for _ in range(3):
            start = time.perf_counter()
            _product(left, right)
            best = min(best, time.perf_counter() - start)
    return 2 * float(size) ** 3 / best


def _product(left: FloatArray, right: FloatArray) -> FloatArray:
    result: FloatArray = left @ right
    return result


class _Work:
    def __init__(self, plan: Plan, profile: Profile) -> None:
        self.plan, self.decoder = plan, plan.decoder
        self.tokens = profile.calibration.tokens
        self.window = min(profile.calibration.window, self.decoder.context_length)
        self.weighted = calibration.weighs_tokens(plan, profile)
        self.allocated = profile.quantize.allocation == "budget"
        self.back = self.tokens if self.weighted else calibration.LOSS_TOKENS if self.allocated else 0
        self.options = assign.open_tensors(plan, profile) if self.allocated else {}
        blocks: dict[int, list[Linear]] = {}
        for linear in self.decoder.linears:
            if linear.layer is not None:
                blocks.setdefault(linear.layer, []).append(linear)
        self.blocks = list(blocks.values())

    def operations(self) -> float:
        """Return the operations of all matrix products, in those of float32 ones."""
        total = sum(self._block(block) for block in self.blocks)
        head = 2.0 * self.decoder.vocab_size * self.decoder.hidden_size
        return total + head * self.back * (4 if self.options else 3)

    def _block(self, block: list[Linear]) -> float:
        attention = 4.0 * self.window * self.decoder.heads * self.decoder.head_dim
        passes = len(block) * attention * self.tokens + 3 * attention * self.back
        total = passes
        for position, linear in enumerate(block):
            outputs, inputs = float(linear.out_features), float(linear.in_features)
            total += 2 * outputs * inputs * (self.tokens * (len(block) - position) + 3 * self.back)
            total += inputs * inputs * self.tokens  # half of the symmetric moments
            total += inputs**3 / 3 / _FACTOR_RATE + outputs * inputs * inputs
            if linear.name in self.options:
                total += 2.0 * min(outputs, _SAMPLE) * inputs * self.back
        return total

    def searched(self) -> float:
        """Return how many weights' scales are searched, each option counted."""
        total = float(self.plan.weight_count)
        for name, schemes in self.options.items():
            fate = self.plan.by_name[name]
            rows = min(fate.rows, _SAMPLE) if fate.kind == "matmul" and fate.role != "head" else fate.rows
            total += len(schemes) * float(rows) * fate.columns
        return total

    def peak(self, threads: int) -> int:
        """Return the most bytes that the worker takes.

        Between pieces of work there are a block and its quantized codes, and its inputs and outputs. On top comes the
        most of: running it for a linear's inputs; second moments and their factor (float64, then float32 beside it);
        the pass back of some windows; the head's bands.
        """
        decoder = self.decoder
        weights = max(sum(item.out_features * item.in_features for item in block) for block in self.blocks)
        state = self.tokens * decoder.hidden_size * _FLOAT
        first = self.blocks[0]
        wide, deep = sum(item.out_features for item in first), sum(item.in_features for item in first)
        scores = decoder.heads * self.window**2 * _FLOAT
        running = threads * (_CHUNK * wide * _FLOAT + 2 * scores)
        inputs = max(item.in_features for item in first)
        rounding = max(16 * item.in_features**2 + _FLOAT * item.out_features * item.in_features for item in first)
        quantizing = int(1.2 * weights) + max(running + _FLOAT * self.tokens * inputs, rounding)
        back = head = 0
        if self.back:
            kept = _FLOAT * min(self.back, _GROUP) * (wide + deep)
            sums = 2 * _FLOAT * _SAMPLE * deep if self.options else 0
            back = state + kept + sums + threads * (3 * _FLOAT * self.window * wide + 4 * scores)
            drawing = threads * _HEAD_ROWS * self.back * 5 * _FLOAT  # logits, noise in float64, exponentials
            head = (_HEAD_BANDS + 3) * self.back * decoder.hidden_size * _FLOAT + drawing - _FLOAT * weights
        return int(_SLACK * (_LIBRARIES + _FLOAT * weights + 2 * state + max(quantizing, back, head)))
