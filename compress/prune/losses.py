"""How far a student's outputs are from its teacher's: one number a sequence, with gradients.

Mathematics on tensors only. Shapes: ``B`` sequences, ``T`` tokens, ``H`` hidden channels, ``V`` words, ``C`` columns.
"""

from __future__ import annotations

from typing import Any

import torch

#: Bytes of one piece of logits ``[tokens, V]``; three of them are in memory at once.
LOGITS_BYTES = 32 << 20


class _HeadDivergence(torch.autograd.Function):
    """Mean KL divergence a sequence through two output heads, without ever holding all logits.

    ``d KL / d logits = softmax(student) - softmax(teacher)``: value and gradient are made in one pass over pieces of
    the tokens, so nothing is kept for the way back but the gradient ``[B, T, H]``.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        """Return ``[B]``; see :func:`head_divergence`."""
        head, taught, teacher_head = given
        sequences, length, width = hidden.shape
        states, teacher = hidden.reshape(-1, width), taught.reshape(-1, taught.shape[-1])
        gradient = torch.empty_like(states)
        values = torch.empty(len(states), dtype=hidden.dtype)
        step = max(1, LOGITS_BYTES // (hidden.element_size() * len(head)))
        for start in range(0, len(states), step):
            rows = slice(start, start + step)
            log_p = torch.log_softmax(states[rows] @ head.T, dim=-1)
            log_q = torch.log_softmax(teacher[rows] @ teacher_head.T, dim=-1)
            q = log_q.exp()
            values[rows] = torch.linalg.vecdot(q, log_q.sub_(log_p))
            gradient[rows] = log_p.exp_().sub_(q) @ head
        ctx.save_for_backward(gradient.reshape(hidden.shape))
        return values.reshape(sequences, length).mean(dim=1)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of the student's hidden states, and none of the other inputs."""
        (gradient,) = ctx.saved_tensors
        return gradient * (outer[0][:, None, None] / gradient.shape[1]), None, None, None


def head_divergence(
    hidden: torch.Tensor, head: torch.Tensor, taught: torch.Tensor, teacher_head: torch.Tensor
) -> torch.Tensor:
    """Return the mean KL(teacher || student) of next-token distributions at temperature 1, nats a token, ``[B]``.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531 (2015), with every word of
    the vocabulary and no hard labels. Differentiable in ``hidden`` alone: heads stay as they are.

    Args:
        hidden: The student's last hidden states ``[B, T, H]``.
        head: The student's output head ``[V, H]``.
        taught: The teacher's last hidden states ``[B, T, H']``.
        teacher_head: The teacher's output head ``[V, H']``.
    """
    found: torch.Tensor = _HeadDivergence.apply(hidden, head, taught, teacher_head)  # type: ignore[no-untyped-call]
    return found


def divergence(logits: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) of rows of logits ``[..., C]``, nats, ``[...]``.

    Entries that are minus infinity on both sides (padding) count nothing.
    """
    log_p, log_q = torch.log_softmax(logits, dim=-1), torch.log_softmax(taught, dim=-1)
    difference = torch.where(log_q.isfinite(), log_q - log_p, 0.0)
    return (log_q.exp() * difference).sum(dim=-1)


def squared_error(values: torch.Tensor, taught: torch.Tensor, power: float) -> torch.Tensor:
    """Return the squared error of rows ``[..., C]`` as a share of ``power``, a row's mean square norm, ``[...]``."""
    return (values - taught).square().sum(dim=-1) / power


def angle(vectors: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """Return one minus the cosine of rows ``[..., C]``, ``[...]``."""
    return 1.0 - torch.cosine_similarity(vectors, taught, dim=-1)


def mean_of_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of ``[B, T]`` over the tokens that ``mask`` ``[B, T]`` keeps, ``[B]``; 0 where it keeps none."""
    weights = mask.to(values.dtype)
    return torch.where(mask, values, 0.0).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


def pooled(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return sentence vectors ``[B, H]`` of hidden states ``[B, T, H]``: ``cls``, ``max``, or the mean of the tokens.

    ``mask`` is bool ``[B, T]``, false on padding.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "max":
        return hidden.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
    weights = mask.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
