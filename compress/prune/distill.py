"""Recovery by distillation: a pruned model learns, on a text, to answer as its original does.

A few hundred steps on the processor. Only what the text shows is learnt, so a few tens of thousands of tokens of the
user's own domain do more than the embedded text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from compress import temporary
from compress.errors import UsageError
from compress.pooling import DEFAULT
from compress.source.sentence_transformers import Pooling
from compress.validation.encoded import Encoded
from compress.validation.protocol import run_worker

TIMEOUT_SECONDS = 48 * 3600.0
#: Fewer texts or windows than this cannot be learnt from and be held out.
MINIMUM_SEQUENCES = 16
#: Tokens of a decoder's step, and texts of an encoder's.
STEP_TOKENS, STEP_TEXTS = 2048, 32
#: Learning rates, measured on SmolLM2-135M and all-MiniLM-L6-v2.
DECODER_RATE, ENCODER_RATE = 2e-4, 1e-3

Stopped = Literal["plateau", "steps"]
Texts = npt.NDArray[np.int64] | Encoded


@dataclass(frozen=True)
class Distilled:
    """What became of a student.

    Attributes:
        steps: How many it took.
        stopped: ``plateau`` where it no longer helped, ``steps`` where they were used up.
        before: Held-out loss of the student as it was: nats a token (decoders), see :mod:`compress.prune.lessons`.
        after: Held-out loss of the best weights; ``before`` where none were better.
        history: Held-out losses: (steps done, loss).
        seconds: How long it took, the part before an interruption left out.
        peak_rss_bytes: Of the worker.
        predicted_bytes: What was predicted for it.
    """

    steps: int
    stopped: Stopped
    before: float
    after: float
    history: tuple[tuple[int, float], ...]
    seconds: float
    peak_rss_bytes: int
    predicted_bytes: int

    @property
    def improved(self) -> bool:
        """Whether weights were written: the student was no good teacher's pupil otherwise, and stays what it was."""
        return self.after < self.before


def distill(
    teacher: Mapping[str, Any],
    student: Path,
    texts: Texts,
    *,
    output: Path,
    steps: int,
    seed: int,
    pooling: Pooling | None = None,
    frozen_zeros: tuple[str, ...] = (),
    rate: float | None = None,
    batch: int | None = None,
    memory_cap: int | None = None,
    threads: int = 1,
    state: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> Distilled:
    """Train a student.

    Args:
        teacher: The original as a worker opens it (``CheckpointSpec.as_request()``).
        student: A model directory of the same architecture, with fewer layers, neurons or heads.
        texts: A decoder's windows int64 ``[windows, length]``, or an encoder's texts.
        output: The safetensors file for all of the student's tensors, float32; it may be the student's own. Nothing is
            written where nothing was gained.
        steps: The most steps; it ends sooner where it no longer helps.
        seed: Of the sequences that are held out, and of the order of the others.
        pooling: How an embedding's states become one vector (:func:`compress.pooling.resolve`).
        frozen_zeros: Tensors whose zeros stay zeros.
        rate: Learning rate; by default what was measured to work.
        batch: Sequences a step; by default :data:`STEP_TOKENS` tokens of windows, or :data:`STEP_TEXTS` texts.
        memory_cap: The most bytes that it may take.
        threads: Threads; the bytes do not depend on them, the memory does (a set of gradients each).
        state: Where to keep how far it is, at every evaluation: the same call goes on from there. It is removed in the
            end.
        progress: Called with the fraction that is done.

    Raises:
        UsageError: Too little text, models that cannot be compared, or a state of another job.
        ResourceError: It is predicted not to fit in memory.
        CompressError: A loss or gradient is not finite; the original or the student cannot be run.
    """
    encoded, pooled = isinstance(texts, Encoded), DEFAULT if pooling is None else pooling
    if len(texts) < MINIMUM_SEQUENCES:
        raise UsageError(
            f"the text gives {len(texts)} {'texts' if encoded else 'windows'}, distillation needs at least"
            f" {MINIMUM_SEQUENCES}",
            hint="a longer --calibration-text, or leave prune.recover at its default",
        )
    if steps < 1:
        raise UsageError(f"{steps} steps of distillation are none", where="prune.steps", hint="200 and more")
    length = 1 if isinstance(texts, Encoded) else texts.shape[1]
    request = {
        "checkpoint": dict(teacher),
        "student": str(student),
        "frozen_zeros": list(frozen_zeros),
        "pooling": {"mode": pooled.mode, "normalize": pooled.normalize},
        "steps": steps,
        "rate": rate or (ENCODER_RATE if encoded else DECODER_RATE),
        "batch": batch or (STEP_TEXTS if encoded else max(1, STEP_TOKENS // length)),
        "seed": seed,
        "workers": threads,
        "threads": 1,
        "memory_cap": memory_cap,
        "output": str(output),
        "state": None if state is None else str(state),
    }
    with temporary.directory("compress-distill-") as place:
        if isinstance(texts, Encoded):
            path = Path(place) / "texts.npz"
            texts.save(path)
            request |= {"texts": str(path), "windows": None}
        else:
            path = Path(place) / "windows.npy"
            np.save(path, texts)
            request |= {"windows": str(path), "texts": None}
        response = run_worker("prune.distill_worker", request, timeout=TIMEOUT_SECONDS, progress=progress)
    found = response["results"][0]
    return Distilled(
        found["steps"],
        found["stopped"],
        found["before"],
        found["after"],
        tuple((int(step), float(loss)) for step, loss in found["history"]),
        found["seconds"],
        response["peak_rss_bytes"],
        found["predicted_bytes"],
    )
