"""The worker that lets a pruned model learn from its original: ``python -m compress.prune.distill_worker``.

Request (see ``validate.protocol``): ``checkpoint`` {reference, adapter, revision, task} (the teacher), ``student`` (a
directory), ``windows`` (.npy int64 ``[windows, length]``) or ``texts`` (an ``.npz`` of
:class:`~compress.validation.encoded.Encoded`) with ``pooling`` {mode, normalize}, ``frozen_zeros`` [tensors whose zeros
stay], ``steps``, ``rate``, ``batch`` (sequences a step), ``seed``, ``workers`` (threads), ``memory_cap``, ``output``
(the weights' file), ``state`` (a file, or null). It answers ``steps``, ``stopped``, ``before``, ``after``, ``history``,
``seconds``, ``predicted_bytes``; ``output`` is written only where ``after`` is less than ``before``.

Token tables and a decoder's head stay as they are: pruning leaves them alone, a short text shows few of their rows, and
they are most of a small model. Everything else learns. In memory are the student, its gradients (one set a thread, and
their sum), two moments, the best weights so far, and the teacher's outputs; :func:`predict_bytes` counts them first.

A step's sequences are cut into pieces of like length that do not depend on how many threads there are; a piece is one
thread's work, and gradients are added in the order of the pieces. So the bytes depend on inputs and seed alone.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.calibrate.blocks import Workers
from compress.contracts import Checkpoint
from compress.families import load_family
from compress.prune.distill_memory import predict_bytes, require_memory
from compress.prune.lessons import DecoderLesson, EncoderLesson, Lesson
from compress.prune.losses import LOGITS_BYTES
from compress.prune.schedule import Course
from compress.prune.state import State, digest_of
from compress.prune.student import PIECE_TOKENS, Student, write_weights
from compress.source import OpenCheckpoint, open_checkpoint
from compress.source.sentence_transformers import Pooling
from compress.tasks import task_of
from compress.validation.encoded import Encoded
from compress.validation.protocol import Json, peak_rss_bytes, report_progress, serve

#: Part of the work that the teacher's run is, for the progress.
_TEACHER_SHARE = 0.1


def handle(request: Json, job: Path) -> Json:
    """Run the teacher, train the student, and write its weights if they are better than they were."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    workers = Workers(int(request["workers"]))
    wanted = request["checkpoint"]
    adapter = wanted.get("adapter")
    try:
        with (
            open_checkpoint(
                wanted["reference"],
                adapter=Path(adapter) if adapter else None,
                revision=wanted.get("revision"),
                task=wanted.get("task"),
            ) as teacher,
            open_checkpoint(str(request["student"]), task=wanted.get("task")) as student,
        ):
            result = _distill(request, job, teacher, student, workers)
    finally:
        workers.close()
    return {
        "results": [{**result, "seconds": time.perf_counter() - start}],
        "load_seconds": None,
        "peak_rss_bytes": peak_rss_bytes(),
        "placement": None,
    }


def _distill(
    request: Json, job: Path, teacher: OpenCheckpoint, student: OpenCheckpoint, workers: Workers
) -> dict[str, Any]:
    state = None
    if request["state"] is not None:
        state = State(Path(request["state"]), digest_of(request, teacher, student))
        state.check()
    predicted = predicted_bytes(request, student)
    require_memory(predicted, request["memory_cap"])
    lesson = _lesson(request, job, teacher, student, workers)
    course = Course(int(request["steps"]), float(request["rate"]))
    learner = Student(lesson, student, request, course, workers)
    learner.train(state, lambda done: report_progress(job, _TEACHER_SHARE + (1 - _TEACHER_SHARE) * done))
    if learner.after < learner.before:
        write_weights(Path(request["output"]), learner, student)
    if state is not None:
        state.remove()
    return {
        "steps": learner.history[-1][0],
        "stopped": "steps" if course.turn(learner.history) >= course.steps - course.descent else "plateau",
        "before": learner.before,
        "after": learner.after,
        "history": learner.history,
        "predicted_bytes": predicted,
    }


def predicted_bytes(request: Json, student: Checkpoint) -> int:
    """Predict the peak of a request."""
    structure = load_family(student.config).describe(student.config, student.tensors())
    weights = sum(int(np.prod(info.shape, dtype=np.int64)) for info in student.tensors().values())
    if request.get("windows") is not None:
        windows = np.load(request["windows"], mmap_mode="r")
        targets, longest = structure.hidden_size * (structure.vocab_size + windows.size), windows.shape[1]
        logits = min(LOGITS_BYTES // 4, max(longest, PIECE_TOKENS) * structure.vocab_size)
    else:
        texts, task = Encoded.load(request["texts"]), task_of(student.config).name
        longest = int(texts.lengths.max())
        words = structure.vocab_size if task == "fill-mask" else 0
        targets = texts.rows(task) * words if words else len(texts.ids) * structure.hidden_size
        logits = max(longest, PIECE_TOKENS) * words
    return predict_bytes(
        structure,
        weights,
        targets=targets,
        tokens=max(longest, PIECE_TOKENS),
        length=longest,
        threads=int(request["workers"]),
        logits=logits,
    )


def _lesson(request: Json, job: Path, teacher: OpenCheckpoint, student: OpenCheckpoint, workers: Workers) -> Lesson:
    def progress(done: float) -> None:
        report_progress(job, _TEACHER_SHARE * done)

    if request.get("windows") is not None:
        return DecoderLesson(teacher, student, np.load(request["windows"]), workers, progress)
    return EncoderLesson(
        teacher,
        student,
        Encoded.load(request["texts"]),
        Pooling(request["pooling"]["mode"], bool(request["pooling"]["normalize"]), None, False),
        workers,
        int(request["workers"]),
        request["memory_cap"],
        progress,
    )


if __name__ == "__main__":
    sys.exit(serve(handle))
