"""The parts of distillation that are mathematics: losses against float64, the course, batches, the optimizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.calibrate.blocks import Workers
from compress.prune import losses
from compress.prune.adam import BETAS, CLIP, EPSILON, Adam
from compress.prune.schedule import PATIENCE, Course, batch, plateaued, split


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_head_divergence_is_that_of_whole_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient, cut into pieces of three tokens or not at all."""
    hidden, taught = random(2, 7, 5).requires_grad_(), random(2, 7, 4, seed=1)
    head, teacher_head = random(11, 5, seed=2), random(11, 4, seed=3)
    q, p = (torch.log_softmax(a @ b.T, -1) for a, b in ((taught, teacher_head), (hidden, head)))
    expected = (q.exp() * (q - p)).sum(-1).mean(1)
    weights = torch.tensor([0.3, 2.0])
    (gradient,) = torch.autograd.grad((weights * expected).sum(), hidden)
    for size in (3 * 11 * 8, losses.LOGITS_BYTES):
        monkeypatch.setattr(losses, "LOGITS_BYTES", size)
        found = losses.head_divergence(hidden, head, taught, teacher_head)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        (own,) = torch.autograd.grad((weights * found).sum(), hidden)
        torch.testing.assert_close(own, gradient, rtol=1e-10, atol=1e-14)
        # Negative control: teacher and student the other way round.
        other = losses.head_divergence(taught.detach(), teacher_head, hidden.detach(), head)
        assert (other - expected).abs().max() > 0.01


def test_divergence_leaves_padding_out() -> None:
    logits, taught = random(3, 6).requires_grad_(), random(3, 6, seed=1)
    whole = losses.divergence(logits[:, :4], taught[:, :4])
    mask = torch.arange(6) >= 4
    padded = losses.divergence(*(x.masked_fill(mask, -torch.inf) for x in (logits, taught)))
    torch.testing.assert_close(padded, whole)
    (gradient,) = torch.autograd.grad(padded.sum(), logits)
    assert gradient.isfinite().all() and not gradient[:, 4:].any() and gradient[:, :4].abs().min() > 0
    q, p = torch.softmax(taught, -1), torch.softmax(logits, -1)
    expected = (q * (q / p).log()).sum(-1)
    torch.testing.assert_close(losses.divergence(logits, taught), expected)


def test_pooling_and_means_leave_padding_out() -> None:
    hidden, mask = random(2, 5, 3), torch.tensor([[True] * 5, [True, True, False, False, False]])
    for mode, expected in (
        ("mean", hidden[1, :2].mean(0)),
        ("max", hidden[1, :2].amax(0)),
        ("cls", hidden[1, 0]),
        ("none", hidden[1, :2].mean(0)),
    ):
        torch.testing.assert_close(losses.pooled(hidden, mask, mode)[1], expected)
    values = hidden[..., 0].masked_fill(~mask, torch.nan)
    torch.testing.assert_close(losses.mean_of_tokens(values, mask)[1], values[1, :2].mean())
    assert losses.mean_of_tokens(values, torch.zeros_like(mask)).tolist() == [0.0, 0.0]
    torch.testing.assert_close(losses.angle(hidden, 3 * hidden), torch.zeros(2, 5, dtype=torch.float64))
    assert losses.squared_error(hidden, hidden + 1, 3.0).allclose(torch.ones(2, 5, dtype=torch.float64))


def test_adam_is_torchs() -> None:
    workers, start = Workers(2), {"a": random(4, 3).float(), "b": random(5, seed=1).float()}
    own = Adam.of({name: item.clone() for name, item in start.items()}, {"b": torch.arange(5) == 2})
    theirs = {name: item.clone().requires_grad_() for name, item in start.items()}
    torchs = torch.optim.AdamW(theirs.values(), lr=0.1, betas=BETAS, eps=EPSILON, weight_decay=0.0)
    for step in range(1, 6):
        gradients = {
            name: (10 if step < 3 else 0.01) * random(*x.shape, seed=step).float() for name, x in start.items()
        }
        for name, item in theirs.items():
            item.grad = gradients[name].clone()
        theirs["b"].grad[2] = 0.0  # type: ignore[index]
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), CLIP)
        torchs.step()
        assert own.update(gradients, step, 0.1, workers) == pytest.approx(float(expected))
    workers.close()
    for name, item in theirs.items():
        torch.testing.assert_close(own.weights[name], item.detach(), rtol=1e-5, atol=1e-6)
    assert own.weights["b"][2] == start["b"][2]
    before = own.weights["a"].clone()
    workers = Workers(1)
    assert not np.isfinite(own.update({"a": torch.full((4, 3), torch.nan), "b": torch.ones(5)}, 6, 0.1, workers))
    workers.close()
    assert torch.equal(own.weights["a"], before), "nothing was changed"


def test_split_and_batches() -> None:
    parts = split(np.full(40, 100), 0)
    assert len(parts.held_out) == 6 and sorted([*parts.training, *parts.held_out]) == list(range(40))
    assert not np.array_equal(parts.held_out, split(np.full(40, 100), 1).held_out)
    assert len(split(np.full(40, 2000), 0).held_out) == 2 and len(split(np.full(3, 9000), 0).held_out) == 1
    drawn = np.concatenate([batch(parts.training, step, 8, 0) for step in range(1, 18)])
    assert sorted(drawn[:34]) == sorted(drawn[34:68]) == parts.training.tolist(), "each epoch has every sequence once"
    assert not np.array_equal(drawn[:34], drawn[34:68]) and not set(drawn) & set(parts.held_out)
    assert len(batch(parts.training[:3], 2, 8, 0)) == 8, "a batch may be longer than an epoch"


def test_the_course() -> None:
    course = Course(200, 1.0)
    assert (course.interval, course.descent, Course(10, 1.0).interval) == (10, 60, 5)
    falling = [(step, 100.0 - step) for step in range(0, 141, 10)]
    assert course.turn(falling) == 140 and course.end(falling) == 200
    rates = [course.rate_of(step, falling) for step in range(1, 201)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10) and set(rates[9:140]) == {1.0}
    assert rates[140:] == pytest.approx(np.arange(60, 0, -1) / 61)
    flat = [(step, 10.0 if step else 20.0) for step in range(0, 101, 10)]
    assert not plateaued(flat[: PATIENCE + 1]) and plateaued(flat[: PATIENCE + 2])
    assert course.turn(flat) == 50 and course.end(flat) == 110 and course.rate_of(50, flat) == 1.0
    assert course.rate_of(51, flat) == pytest.approx(60 / 61) and course.evaluates(110, flat)
    slow = [(step, 0.99 ** (step / 10)) for step in range(0, 101, 10)]
    assert not plateaued(slow) and plateaued([(step, 0.999 ** (step / 10)) for step, _ in slow])
    assert Course(1, 1.0).end([(0, 1.0)]) == 1 and Course(1, 1.0).rate_of(1, [(0, 1.0)]) > 0
