"""Losses from one pass back, beside what the model really loses, torch's own gradients, and draws that are known."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from visited_blocks import calibration, module_of, plain_model, some_windows

from compress.calibrate import fisher
from compress.calibrate.blocks import Workers
from compress.calibrate.decoder_worker import Calibration
from compress.contracts import Scheme
from compress.quantize.round_to_nearest import RoundToNearest
from compress.reading import read_rows
from compress.store import restored
from compress.validation.paired import spearman
from dequantized import put

Tiny = Callable[[str], Path]
SCHEMES = tuple(Scheme(bits, 32, symmetric=True) for bits in (2, 4, 8))
INT4 = 1
TOKENS = 2048


def silent(fraction: float) -> None:
    assert 0 <= fraction <= 1


def measured(given: Calibration, wanted: Mapping[str, tuple[Scheme, ...]], seed: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as work:
        found = fisher.measure(given, wanted, seed=seed, tokens=TOKENS, work=Path(work), progress=silent)
        assert not list(Path(work).iterdir())
    return dict(found.losses)


@pytest.fixture
def given(tiny_model: Tiny, tmp_path: Path) -> Iterator[Callable[..., Calibration]]:
    made: list[Calibration] = []

    def get(name: str, count: int = 32, workers: int = 1) -> Calibration:
        made.append(calibration(tiny_model(name), some_windows(count), tmp_path, workers=workers))
        return made[-1]

    yield get
    for item in made:
        item.workers.close()


def options(found: Calibration, schemes: tuple[Scheme, ...] = SCHEMES) -> dict[str, tuple[Scheme, ...]]:
    return {fate.name: schemes for fate in found.plan.fates if fate.scheme is not None}


def real_losses(found: Calibration, model: Any, scheme: Scheme) -> dict[str, float]:
    """Return the KL divergence, nats a token, of the model with one weight rounded, by weight; exact expectations."""
    ids = torch.from_numpy(found.windows)

    def said(changed: Any) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(changed(input_ids=ids).logits.double(), -1)

    before, losses = said(model), {}
    for name in options(found):
        fate, changed = found.plan.by_name[name], copy.deepcopy(model)
        rows = read_rows(found.checkpoint, fate, 0, fate.rows)
        result = RoundToNearest().quantize(rows, scheme, scale_format=found.plan.scale_format)
        put(changed, {name: restored(result, scheme, fate.columns)})
        losses[name] = float((before.exp() * (before - said(changed))).sum(-1).mean())
    return losses


def agreement(predicted: fisher.Losses, real: dict[str, float]) -> tuple[float, float]:
    """Return the rank correlation over tensors, and the ratio of the sums."""
    guessed = np.array([predicted[name][INT4] for name in real])
    measured = np.array(list(real.values()))
    return float(spearman(guessed, measured)), float(guessed.sum() / measured.sum())


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_losses_are_what_the_model_loses(
    name: str, given: Callable[..., Calibration], tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = given(name)
    predicted = measured(found, options(found), 0)
    real = real_losses(found, plain_model(tiny_model(name)), SCHEMES[INT4])
    rank, ratio = agreement(predicted, real)
    assert rank > 0.9 and 0.7 < ratio < 1.3
    for losses in predicted.values():
        assert losses[0] > 5 * losses[1] > 25 * losses[2] > 0

    def shuffled(self: Any) -> Iterator[Any]:
        """Give every linear another's gradients: noise of the size that they all have together."""
        random = np.random.default_rng(1)
        for linear in self.linears:
            gradients = random.normal(size=self._gradients[linear.name].shape).astype(np.float32)
            yield linear, self._inputs.pop(linear.name), gradients

    monkeypatch.setattr(fisher._Recorder, "found", shuffled)
    rank, ratio = agreement(measured(found, options(found), 0), real)
    assert rank < 0.7 and not 0.7 < ratio < 1.3


@pytest.mark.parametrize("name", ["llama-untied", "phi3", "gpt2"])
def test_gradients_are_those_of_the_whole_model(
    name: str, given: Callable[..., Calibration], tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, model = given(name, 12), plain_model(tiny_model(name))
    drawn: list[np.ndarray] = []
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    draw, give = fisher._draw, fisher._Recorder.found

    def noted_draw(*arguments: Any) -> Any:
        result = draw(*arguments)
        drawn.append(result[1])
        return result

    def noted_found(self: Any) -> Iterator[Any]:
        for linear, inputs, gradients in give(self):
            seen[linear.name] = inputs.copy(), gradients.copy()
            yield linear, inputs, gradients

    monkeypatch.setattr(fisher, "_draw", noted_draw)
    monkeypatch.setattr(fisher._Recorder, "found", noted_found)
    measured(found, options(found, SCHEMES[INT4:2]), 0)

    kept: dict[str, list[torch.Tensor]] = {}
    for linear in found.decoder.linears:
        if linear.layer is not None:
            modules = {id(module): module for module in (module_of(model, piece.tensor) for piece in linear.weight)}
            outputs = kept.setdefault(linear.name, [])
            for module in modules.values():
                module.register_forward_hook(lambda _, given, out, outputs=outputs: outputs.append(out))
    logits = model(input_ids=torch.from_numpy(found.windows)).logits
    for outputs in kept.values():
        for output in outputs:
            output.retain_grad()
    (tokens,) = drawn
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(tokens), reduction="sum")
    loss.backward()
    assert seen.keys() == kept.keys() and len(seen) == 12
    for linear_name, outputs in kept.items():
        expected = torch.cat([output.grad.flatten(0, -2) for output in outputs], dim=1).numpy()  # type: ignore[union-attr]
        size = np.abs(expected).max()
        assert np.abs(seen[linear_name][1] - expected).max() < 1e-4 * size
        assert np.abs(np.roll(seen[linear_name][1], 1, axis=0) - expected).max() > 0.1 * size  # the control


def test_tokens_are_drawn_from_the_models_prediction() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(0, 1.5, 10).astype(np.float32)
    workers, count = Workers(2), 40_000
    normalizer, tokens = fisher._draw(
        lambda start: np.tile(logits[start : start + 3], (count, 1)), range(0, 10, 3), 5, workers
    )
    workers.close()
    exact = np.log(np.exp(logits.astype(np.float64)).sum())
    assert np.allclose(normalizer, exact, atol=1e-5)
    shares = np.exp(logits - exact)
    found = np.bincount(tokens, minlength=10) / count
    error = np.sqrt(shares * (1 - shares) / count)
    assert (np.abs(found - shares) < 4 * error).all()
    assert not (np.abs(found - shares[::-1]) < 4 * error).all()  # the control


def test_threads_change_nothing_and_seeds_do(given: Callable[..., Calibration]) -> None:
    found = [given("mistral", 20, workers) for workers in (1, 3)]
    wanted = options(found[0], SCHEMES[INT4:2])
    first = measured(found[0], wanted, 0)
    assert measured(found[1], wanted, 0) == first
    other = measured(found[0], wanted, 1)
    assert other != first and sum(map(sum, other.values())) == pytest.approx(sum(map(sum, first.values())), rel=0.2)


def test_only_what_was_asked_for_is_measured(given: Callable[..., Calibration]) -> None:
    found = given("gpt2", 4)
    name = "transformer.h.1.mlp.up_proj"
    (losses,) = measured(found, {name: SCHEMES[:2]}, 0).values()
    assert len(losses) == 2 and losses[0] > losses[1] > 0
