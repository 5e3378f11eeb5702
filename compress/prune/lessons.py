"""What a student learns from: its own model, the teacher's outputs on the texts, and the loss of each sequence.

The teacher runs first and is gone before the student is read. A decoder's goes block by block
(:class:`~compress.validation.streaming.StreamedModel`) and leaves its last hidden states, from which logits are made
when they are needed; an encoder's is in memory whole, as everywhere, and leaves hidden states or logits.
"""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from compress.calibrate.blocks import Workers
from compress.contracts import Checkpoint
from compress.errors import CompressError, UsageError
from compress.prune import losses
from compress.source.sentence_transformers import Pooling
from compress.tasks import task_of
from compress.validation.encoded import Batch, Encoded, batch_of, unpadded_batches
from compress.validation.encoder_reference import Reference, load_model
from compress.validation.encoding import outputs_of, rows_of
from compress.validation.streaming import Call, StreamedModel, chunks

IntArray = npt.NDArray[np.int64]
Progress = Callable[[float], None]
#: Texts that an encoder's teacher runs at once.
TEACHER_BATCH = 8
#: Batches whose outputs wait to be put in their places.
TEACHER_ROUND = 16
#: The fused kernel's many small products take five times as long in bfloat16 as in float32; plain ones do not.
ATTENTION = "eager"
#: Texts are padded to such lengths: kernels are made anew for every shape.
LENGTH_MULTIPLE = 16
#: What the angle between sentence vectors counts beside the errors of the tokens' states.
POOLED_WEIGHT = 1.0


class Lesson(Protocol):
    """A student and what it is to come near to.

    Attributes:
        model: The student, a transformers model in float32 and in evaluation mode (no dropout).
        lengths: Tokens of every sequence, int64 ``[sequences]``.
    """

    model: Any
    lengths: IntArray

    def losses(self, model: Any, sequences: IntArray) -> torch.Tensor:
        """Return the loss of each sequence ``[len(sequences)]``, with gradients; ``model`` is a replica."""
        ...


class Replicas:
    """Copies of a model that share its parameters, one a thread: modules may keep notes while they run."""

    def __init__(self, model: Any, count: int) -> None:
        shared = {id(parameter): parameter for parameter in model.parameters()}
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(copy.deepcopy(model, dict(shared)))

    @contextmanager
    def one(self) -> Iterator[Any]:
        """Lend a replica that nobody else has meanwhile."""
        replica = self._free.get()
        try:
            yield replica
        finally:
            self._free.put(replica)


class DecoderLesson:
    """Next-token distributions of windows.

    Args:
        teacher: The original.
        student: What was made of it.
        windows: Token ids int64 ``[windows, length]``.
        workers: Threads that run the teacher.
        progress: Called with the fraction of the teacher's blocks that have run.

    Raises:
        CompressError: The teacher's hidden states are not finite, or the two cannot be compared.
    """

    def __init__(
        self, teacher: Checkpoint, student: Checkpoint, windows: IntArray, workers: Workers, progress: Progress
    ) -> None:
        self._windows = torch.from_numpy(windows)
        self.lengths = np.full(len(windows), windows.shape[1], np.int64)
        taught, head = _taught_states(teacher, windows, workers, progress)
        streamed = StreamedModel(student, ATTENTION)
        _require_equal("words in the vocabulary", streamed.vocab_size, len(head))
        streamed.fill_all()
        self.model = streamed.model
        own = self.model.get_output_embeddings().weight
        # Pruning leaves the head alone, nearly always: then one copy serves both.
        self._taught, self._head = taught, own.detach() if torch.equal(own, head) else head

    def losses(self, model: Any, sequences: IntArray) -> torch.Tensor:
        """Return the mean KL divergence of each window, nats a token."""
        rows = torch.from_numpy(sequences)
        hidden = model.get_decoder()(input_ids=self._windows[rows], use_cache=False).last_hidden_state
        own = model.get_output_embeddings().weight.detach()
        return losses.head_divergence(hidden, own, self._taught[rows], self._head)


def _taught_states(
    teacher: Checkpoint, windows: IntArray, workers: Workers, progress: Progress
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a decoder's last hidden states ``[windows, length, H]`` and its head's weight ``[V, H]``."""
    streamed = StreamedModel(teacher)

    def visit(index: int, layer: torch.nn.Module, call: Call, hidden: torch.Tensor) -> torch.Tensor:
        result = torch.empty_like(hidden)

        def run(rows: slice) -> None:
            result[rows] = call(hidden[rows], rows)

        workers.map(run, chunks(hidden))
        return result

    with torch.no_grad():
        hidden = streamed.visit_blocks(windows, visit, progress)
    _require_finite(hidden)
    return hidden, streamed.head()


class EncoderLesson:
    """An encoder's hidden states and sentence vectors, or the logits of its task.

    Of an embedding, the loss of a text is the squared error of its tokens' states (a share of their power) and the
    angle between sentence vectors (of those that are not normalized: the squared error again). Of other tasks it is
    the KL divergence of each distribution: over labels, words, or, for an answer's start and end, places in the text.

    Args:
        teacher: The original.
        student: What was made of it.
        texts: The tokens.
        pooling: How states become one vector, where the task is an embedding.
        workers: Threads that run the teacher.
        memory_cap: The most bytes that a model may take.
        progress: Called with the fraction of the texts that the teacher has seen.

    Raises:
        CompressError: The teacher's outputs are not finite, or the two cannot be compared.
    """

    def __init__(
        self,
        teacher: Checkpoint,
        student: Checkpoint,
        texts: Encoded,
        pooling: Pooling,
        workers: Workers,
        threads: int,
        memory_cap: int | None,
        progress: Progress,
    ) -> None:
        self.task, self._texts, self._pooling = task_of(student.config).name, texts, pooling
        if self.task != task_of(teacher.config).name:
            raise UsageError(f"the student's task is {self.task}, the teacher's {task_of(teacher.config).name}")
        self.lengths = texts.lengths
        # Rows of targets a text: an answer's places compete with each other, so all of them count.
        every = self.task in ("embedding", "question-answering")
        self._counts = texts.lengths if every else texts.rows_of_texts(self.task)
        self._starts = np.cumsum(self._counts) - self._counts
        self._taught = self._run(load_model(teacher, memory_cap), workers, threads, progress)
        _require_finite(self._taught)
        self.model = load_model(student, memory_cap)
        self.model.set_attn_implementation(ATTENTION)
        if self.task == "embedding":
            _require_equal("hidden channels", self.model.config.hidden_size, self._taught.shape[1])
        elif "classification" in self.task:
            _require_equal("labels", self.model.config.num_labels, self._taught.shape[1])
        self._power = float(self._taught.double().square().sum(dim=1).mean()) if self.task == "embedding" else 1.0
        self._regresses = self.task == "text-classification" and (
            self._taught.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
        )

    def losses(self, model: Any, sequences: IntArray) -> torch.Tensor:
        """Return the loss of each text."""
        rounded = -(-int(self.lengths[sequences].max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        batch = batch_of(self._texts, sequences, 0, min(rounded, int(self.lengths.max())))
        found = _outputs(model, batch)
        mask = torch.from_numpy(batch.mask).bool()
        if self.task == "embedding":
            return self._states_loss(found.last_hidden_state, mask, batch)
        if self.task == "text-classification":
            taught = self._taught[torch.from_numpy(sequences)]
            if self._regresses:
                return losses.squared_error(found.logits, taught, taught.shape[1])
            return losses.divergence(found.logits, taught)
        if self.task == "question-answering":
            taught = self._padded(batch, mask, -torch.inf)
            ends = (found.start_logits, found.end_logits)
            pairs = [(end.masked_fill(~mask, -torch.inf), taught[..., side]) for side, end in enumerate(ends)]
            return losses.divergence(*pairs[0]) + losses.divergence(*pairs[1])
        keep = torch.from_numpy(batch.keep)
        return losses.mean_of_tokens(losses.divergence(found.logits, self._padded(batch, keep, 0.0)), keep)

    def _states_loss(self, hidden: torch.Tensor, mask: torch.Tensor, batch: Batch) -> torch.Tensor:
        taught = self._padded(batch, mask, 0.0)
        of_tokens = losses.mean_of_tokens(losses.squared_error(hidden, taught, self._power), mask)
        vectors, wanted = (losses.pooled(states, mask, self._pooling.mode) for states in (hidden, taught))
        if self._pooling.normalize:
            return of_tokens + POOLED_WEIGHT * losses.angle(vectors, wanted)
        return of_tokens + POOLED_WEIGHT * losses.squared_error(vectors, wanted, self._power)

    def _padded(self, batch: Batch, mask: torch.Tensor, filler: float) -> torch.Tensor:
        """Return the targets of a batch's tokens that ``mask`` keeps, ``[B, T, C]``, ``filler`` elsewhere."""
        result = torch.full((*mask.shape, self._taught.shape[1]), filler)
        result[mask] = self._taught[self._places(batch)]
        return result

    def _places(self, batch: Batch) -> torch.Tensor:
        """Return which rows of the targets a batch's texts have."""
        rows = [np.arange(self._starts[text], self._starts[text] + self._counts[text]) for text in batch.texts]
        return torch.from_numpy(np.concatenate(rows))

    def _run(self, model: Any, workers: Workers, threads: int, progress: Progress) -> torch.Tensor:
        """Return the teacher's outputs, a row for every token, kept token or text, in the order of the texts."""
        batches, replicas = list(unpadded_batches(self._texts, TEACHER_BATCH)), Replicas(model, threads)
        taught, done = torch.empty(0), 0

        def run(batch: Batch) -> npt.NDArray[np.float32]:
            with replicas.one() as replica:
                return self._rows(Reference(replica, self.task, "none", False).forward(batch), batch)

        for first in range(0, len(batches), TEACHER_ROUND):
            some = batches[first : first + TEACHER_ROUND]
            for batch, rows in zip(some, workers.map(run, some), strict=True):
                if not done:
                    taught = torch.empty(int(self._counts.sum()), rows.shape[1])
                taught[self._places(batch)] = torch.from_numpy(rows)
                done += len(batch.texts)
            progress(done / len(self._texts))
        return taught

    def _rows(self, found: Any, batch: Batch) -> npt.NDArray[np.float32]:
        if self.task == "embedding":
            states: npt.NDArray[np.float32] = found.last_hidden_state.flatten(0, 1).numpy()
            return states
        outputs = {name: found[name].numpy() for name in outputs_of(self.task, list(found.keys()))}
        if self.task == "question-answering":
            return np.stack(list(outputs.values()), axis=-1).reshape(-1, 2)
        return rows_of(self.task, outputs, batch)


def _outputs(model: Any, batch: Batch) -> Any:
    """Run a student on a padded batch, with gradients."""
    import inspect

    given = {"input_ids": torch.from_numpy(batch.ids), "attention_mask": torch.from_numpy(batch.mask)}
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        given["token_type_ids"] = torch.from_numpy(batch.types)
    return model(**given)


def _require_equal(what: str, student: int, teacher: int) -> None:
    if student != teacher:
        raise UsageError(
            f"the student has {student} {what}, the teacher {teacher}: their outputs cannot be compared",
            hint="distil before the vocabulary is cut",
        )


def _require_finite(values: torch.Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise CompressError("the original's outputs are not finite on the calibration texts")
