"""What distillation takes in memory, from sizes alone.

At its peak are there: the student; of what learns a sum of gradients, two moments, the best weights, and for each
thread a set of gradients and what a piece's forward keeps for its way back; and the teacher's outputs on all texts.
"""

from __future__ import annotations

from compress.contracts import Structure
from compress.errors import ResourceError
from compress.validation.memory import check_memory

#: Python with torch and transformers, in bytes.
_LIBRARIES = 400_000_000
_FLOAT = 4
#: What the allocator keeps beside what is in use: pieces are of many shapes.
_SLACK = 1.1
#: What a linear's inputs and outputs stand for: norms, residuals, activation functions and rotations beside them.
_KEPT = 1.5
#: Numbers that a pair of tokens leaves in a head.
_SCORES = 3
#: Weights, moments (two), best, gradients' sum.
_SETS = 5
#: Pieces of logits at once: the student's, the teacher's, what they become.
_LOGITS = 4


def predict_bytes(
    structure: Structure, weights: int, *, targets: int, tokens: int, length: int, threads: int, logits: int = 0
) -> int:
    """Predict the peak.

    Args:
        structure: The student's.
        weights: All of its weights.
        targets: Numbers that the teacher leaves: outputs of all texts, a decoder's head.
        tokens: Of the longest piece of a step.
        length: Of the longest sequence in tokens.
        threads: Threads.
        logits: Numbers of a piece's logits, at most what is held of them at once.
    """
    blocks = [linear for linear in structure.linears if linear.layer is not None]
    learning = sum(linear.in_features * linear.out_features for linear in blocks)
    # ALBERT's one layer of weights is run several times.
    runs = structure.layers / max(1, len({linear.layer for linear in blocks}))
    kept = _KEPT * runs * sum(linear.in_features + linear.out_features for linear in blocks)
    kept = tokens * (kept + _SCORES * structure.layers * structure.heads * length)
    pieces = threads * (learning + int(kept) + _LOGITS * logits)
    numbers = weights + (_SETS - 1) * learning + pieces + targets
    return _LIBRARIES + int(_SLACK * _FLOAT * numbers)


def require_memory(needed: int, cap: int | None) -> None:
    """Refuse a distillation that is predicted not to fit.

    Raises:
        ResourceError: It takes more than ``cap``, or than there is.
    """
    try:
        check_memory(needed, cap)
    except ResourceError as error:
        raise ResourceError(
            f"distillation does not fit: {error.what}", hint="fewer threads, or leave prune.recover at its default"
        ) from None
