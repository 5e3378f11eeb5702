"""A student while it learns: pieces, gradients, steps, held-out loss, and the best weights so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.calibrate.blocks import Workers
from compress.contracts import Checkpoint
from compress.errors import CompressError, SourceError, UsageError
from compress.prune.adam import Adam
from compress.prune.lessons import IntArray, Lesson, Replicas
from compress.prune.schedule import Course, batch, split
from compress.prune.state import State, save_tensors
from compress.validation.protocol import Json

#: Tokens, padding included, that one thread takes at a time.
PIECE_TOKENS = 512
#: Names of old checkpoints for a norm's weight and bias.
_OLD_NAMES = ((".gamma", ".weight"), (".beta", ".bias"))


class Student:
    """A model that learns.

    Attributes:
        history: Held-out losses: (steps done, loss), the first before any step.
        adam: The weights that learn, by tensor, and their moments.
        best: The best of them so far.

    Raises:
        SourceError: A weight that could learn is in no tensor of the checkpoint.
        CompressError: A loss is not finite.
    """

    def __init__(self, lesson: Lesson, checkpoint: Checkpoint, request: Json, course: Course, workers: Workers) -> None:
        self._lesson, self._course, self._workers = lesson, course, workers
        self._batch, self._seed = int(request["batch"]), int(request["seed"])
        self._threads = int(request["workers"])
        self._replicas = Replicas(lesson.model, self._threads)
        self.split = split(lesson.lengths, self._seed)
        self.places = places(lesson.model, checkpoint)
        self._learning = self._find_learning()
        unknown = next((name for name in request["frozen_zeros"] if name not in checkpoint.tensors()), None)
        if unknown is not None:
            raise UsageError(f"the student has no tensor {unknown!r} whose zeros could stay")
        weights = {name: parameter.data for name, parameter in self._learning.items()}
        frozen = {
            name: weight == 0
            for name, weight in weights.items()
            if any(self.places.get(other) is self._learning[name] for other in request["frozen_zeros"])
        }
        self.adam = Adam.of(weights, frozen)
        self.best = {name: weight.clone() for name, weight in weights.items()}
        self.history: list[tuple[int, float]] = []

    @property
    def before(self) -> float:
        """Held-out loss before the first step."""
        return self.history[0][1]

    @property
    def after(self) -> float:
        """Held-out loss of the best weights."""
        return min(loss for _, loss in self.history)

    def train(self, state: State | None, progress: Callable[[float], None]) -> None:
        """Go through the course from where the state, if there is one, left off."""
        if state is None or not state.restore(self.adam, self.best, self.history):
            self.history.append((0, self.held_out_loss()))
        step = self.history[-1][0]
        while step < self._course.end(self.history):
            step += 1
            self._step(step)
            if self._course.evaluates(step, self.history):
                loss = self.held_out_loss()
                if loss < self.after:
                    for name, weight in self.adam.weights.items():
                        self.best[name].copy_(weight)
                self.history.append((step, loss))
                if state is not None:
                    state.save(self.adam, self.best, self.history)
            progress(step / self._course.end(self.history))

    def held_out_loss(self) -> float:
        """Return the mean loss of the sequences that are held out, in full float32."""

        def measure(piece: IntArray) -> list[float]:
            with self._replicas.one() as model:
                return [float(loss) for loss in self._lesson.losses(model, piece)]

        found = self._workers.map(measure, self._pieces(self.split.held_out))
        losses = [loss for piece in found for loss in piece]
        return _finite(float(np.mean(np.array(losses, np.float64))), "loss")

    def _step(self, step: int) -> None:
        sequences = batch(self.split.training, step, self._batch, self._seed)
        total: dict[str, torch.Tensor] = {}

        def gradients(piece: IntArray) -> tuple[torch.Tensor, ...]:
            with self._replicas.one() as model, torch.enable_grad():
                loss = self._lesson.losses(model, piece).sum() / len(sequences)
                return torch.autograd.grad(loss, list(self._learning.values()))

        pieces = self._pieces(sequences)
        with products_in_bfloat16():
            # So many at a time as there are threads: gradients of all pieces at once would be a model each.
            for first in range(0, len(pieces), self._threads):
                for found in self._workers.map(gradients, pieces[first : first + self._threads]):
                    for name, gradient in zip(self._learning, found, strict=True):
                        total[name] = total[name].add_(gradient) if name in total else gradient.contiguous()
        rate = self._course.rate_of(step, self.history)
        _finite(self.adam.update(total, step, rate, self._workers), "gradient")

    def _pieces(self, sequences: IntArray) -> list[IntArray]:
        """Cut sequences into pieces of like length, :data:`PIECE_TOKENS` at most or one sequence, longest first."""
        lengths = self._lesson.lengths
        order = sequences[np.lexsort((sequences, -lengths[sequences]))]
        pieces, start = [], 0
        while start < len(order):
            size = max(1, PIECE_TOKENS // int(lengths[order[start]]))
            pieces.append(order[start : start + size])
            start += size
        return pieces

    def _find_learning(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters that learn, by their first tensor's name: no tables, and only those with a gradient."""
        model, shortest = self._lesson.model, np.argsort(self._lesson.lengths, kind="stable")[:1]
        tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        head = model.get_output_embeddings()
        fixed = tables if head is None else tables | {id(head.weight)}
        open_ones = {id(item): item for item in model.parameters() if id(item) not in fixed}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in open_ones)
        with torch.enable_grad():
            loss = self._lesson.losses(model, shortest).sum()
        reached: Sequence[torch.Tensor | None] = torch.autograd.grad(loss, list(open_ones.values()), allow_unused=True)
        names = {id(parameter): name for name, parameter in reversed(list(self.places.items()))}
        learning: dict[str, torch.nn.Parameter] = {}
        for parameter, gradient in zip(open_ones.values(), reached, strict=True):
            if gradient is None:
                parameter.requires_grad_(False)
            elif id(parameter) not in names:
                own = next(name for name, item in model.named_parameters() if item is parameter)
                raise SourceError(f"the student has no tensor for the parameter {own!r}")
            else:
                learning[names[id(parameter)]] = parameter
        return learning


def places(model: Any, checkpoint: Checkpoint) -> dict[str, torch.nn.Parameter]:
    """Return the parameter that each tensor of a checkpoint is in the model; a tensor that is in none is left out.

    Raises:
        SourceError: A parameter is not what the tensor of its name says.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{model.base_model_prefix}."
    found: dict[str, torch.nn.Parameter] = {}
    for name in checkpoint.tensors():
        new = next((name.removesuffix(old) + new for old, new in _OLD_NAMES if name.endswith(old)), name)
        own = next((item for item in (new, prefix + new, new.removeprefix(prefix)) if item in parameters), None)
        if own is None:
            continue
        if not torch.equal(parameters[own], torch.from_numpy(checkpoint.read(name))):
            raise SourceError(f"transformers changed the tensor on reading it: {own}", where=name)
        found[name] = parameters[own]
    return found


def write_weights(path: Path, student: Student, checkpoint: Checkpoint) -> None:
    """Write the best weights with all other tensors of the checkpoint, float32: beside, fsynced, renamed."""
    learnt = {id(student.places[name]): weight for name, weight in student.best.items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, info in checkpoint.tensors().items():
        weight = learnt.get(id(student.places.get(name)))
        if weight is not None:
            # A second tensor of one parameter gets bytes of its own: the format shares none.
            tensors[name] = weight if name in student.best else weight.clone()
        elif info.dtype.startswith(("F", "BF")):
            tensors[name] = torch.from_numpy(checkpoint.read(name))
    save_tensors(path, tensors, {"format": "pt"})


@contextmanager
def products_in_bfloat16() -> Iterator[None]:
    """Let matrix products round their inputs to bfloat16 where the processor multiplies those faster (AMX, AVX-512).

    SmolLM2-135M's steps took 0.6 of the time, MiniLM's 0.9. Sums, weights, moments and everything between products stay
    float32. For steps alone: the teacher's outputs and held-out losses are made in float32.
    """
    backend: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = backend.fp32_precision
    backend.fp32_precision = "bf16"
    try:
        yield
    finally:
        backend.fp32_precision = before


def _finite(value: float, what: str) -> float:
    if not np.isfinite(value):
        raise CompressError(f"the student's {what} is not finite", hint="a lower learning rate, or prune less at once")
    return value
