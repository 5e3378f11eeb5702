"""AutoRound on decoder blocks: better on windows that it did not see, the same bits every time, never a worse start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from compress.calibrate.blocks import Block, Workers
from compress.calibrate.rounding import Error, trained, weight_gradient
from compress.calibrate.tune import tune_scales
from compress.contracts import BlockLearner, Decoder, LearntBlock, QuantizedRows, Quantizer, ScaleFormat, Scheme
from compress.errors import CompressError
from compress.families import load_family
from compress.quantize import load_quantizer
from compress.quantize.autoround import AutoRound
from compress.quantize.scales import pack_scales
from compress.source import open_checkpoint
from compress.store import restored
from compress.validation.streaming import Call, StreamedModel

SCHEME = Scheme(4, 32, symmetric=False)
SEEN, UNSEEN, LENGTH = 84, 42, 24


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What the worker sets as well: sums have the same order every time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def windows() -> npt.NDArray[np.int64]:
    """Return windows of a vocabulary in which few tokens are frequent, each likely after the one before it."""
    random = np.random.default_rng(5)
    steps = random.zipf(1.6, (SEEN + UNSEEN, LENGTH)) % 300
    return np.asarray(3 + np.cumsum(steps, axis=1) % 300, np.int64)


class _Enough(Exception):
    pass


def on_block(directory: Path, work: Callable[[Callable[[slice], Block]], None], index: int = 1) -> None:
    """Call ``work`` with a function from windows to the block ``index`` that reads them."""
    checkpoint = open_checkpoint(str(directory))
    decoder = load_family(checkpoint.config).describe(checkpoint.config, checkpoint.tensors())
    assert isinstance(decoder, Decoder)
    model, workers = StreamedModel(checkpoint), Workers(1)

    def visit(place: int, layer: torch.nn.Module, call: Call, hidden: torch.Tensor) -> torch.Tensor:
        whole = Block(model, decoder, place, layer, call, hidden, workers)
        if place < index:
            return whole.outputs()
        work(lambda rows: Block(model, decoder, place, layer, call, hidden[rows], workers))
        raise _Enough

    try:
        with pytest.raises(_Enough):
            model.visit_blocks(windows(), visit)
    finally:
        workers.close()


@dataclass
class Learnt:
    """What a learner made of a block, and the errors on what it saw and on what it did not see."""

    results: Mapping[str, QuantizedRows]
    seen: float
    unseen: float


def learn(
    directory: Path,
    learner: AutoRound,
    scheme: Scheme = SCHEME,
    scale_format: ScaleFormat = "int8",
    change: Callable[[torch.Tensor], torch.Tensor] = lambda targets: targets,
) -> Learnt:
    found: list[Learnt] = []

    def work(block_of: Callable[[slice], Block]) -> None:
        seen, unseen = block_of(slice(0, SEEN)), block_of(slice(SEEN, None))
        targets = seen.outputs(), unseen.outputs()
        errors = [Error(block, wanted) for block, wanted in zip((seen, unseen), targets, strict=True)]
        assert errors[0].mean() == errors[1].mean() == 0
        fates = {linear.name: SimpleNamespace(scheme=scheme) for linear in seen.linears}
        results = learner.learn(seen, fates, change(targets[0]), scale_format)
        assert list(results) == list(fates)
        for linear in seen.linears:
            now = restored(results[linear.name], scheme, linear.linear.in_features)
            assert np.array_equal(linear.weight(), now)
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in seen.layer.parameters())
        found.append(Learnt(results, *(error.mean() for error in errors)))

    on_block(directory, work)
    return found[0]


def test_it_is_found_by_its_name_and_learns_blocks() -> None:
    found: Quantizer = load_quantizer("autoround")
    assert isinstance(found, AutoRound) and isinstance(found, BlockLearner)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_it_is_better_on_windows_it_did_not_see(family: str, tiny_model: Callable[[str], Path]) -> None:
    """Than round-to-nearest, from its start and from GPTQ's. Learning other outputs is the negative control."""
    directory, scheme = tiny_model(family), Scheme(2, 32, symmetric=False)
    nearest, gptq = (learn(directory, AutoRound(0, start=start), scheme) for start in ("rtn", "gptq"))
    for before in (nearest, gptq):
        learner = AutoRound(60, batch=1, start="rtn" if before is nearest else "gptq")
        learnt = learn(directory, learner, scheme)
        assert learner.losses[1] == (pytest.approx(before.seen), pytest.approx(learnt.seen))
        assert learnt.seen < 0.9 * before.seen
        assert learnt.unseen < 0.85 * nearest.unseen
    misled = learn(
        directory, AutoRound(60, batch=1, start="rtn"), scheme, change=lambda targets: targets.roll((1, 1), (0, 2))
    )
    assert misled.unseen > nearest.unseen


@pytest.mark.parametrize("scheme", [Scheme(2, 16, symmetric=False), Scheme(4, 64, symmetric=True)], ids=str)
@pytest.mark.parametrize("scale_format", ["float32", "float16"])
def test_it_is_never_worse_than_its_start(
    scheme: Scheme, scale_format: ScaleFormat, tiny_model: Callable[[str], Path]
) -> None:
    """Not even with a rate that only does harm; what it returns is then the start."""
    start = learn(tiny_model("llama"), AutoRound(0), scheme, scale_format)
    wild = AutoRound(4, batch=1, rate=0.5, factor_rate=0.5)
    found = learn(tiny_model("llama"), wild, scheme, scale_format)
    assert found.seen == start.seen and wild.losses[1][0] == wild.losses[1][1]
    assert all(np.array_equal(found.results[name].codes, start.results[name].codes) for name in start.results)
    learnt = learn(tiny_model("llama"), AutoRound(30, batch=1), scheme, scale_format)
    assert learnt.seen < start.seen


def test_every_run_has_the_same_bits(tiny_model: Callable[[str], Path]) -> None:
    first, second, other = (learn(tiny_model("phi3"), AutoRound(10, batch=batch)) for batch in (2, 2, 1))
    for name, result in first.results.items():
        assert np.array_equal(result.codes, second.results[name].codes)
        assert np.array_equal(result.scales, second.results[name].scales)
    assert any(not np.array_equal(result.codes, other.results[name].codes) for name, result in first.results.items())


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_gradients_are_those_of_the_stacked_weights(family: str, tiny_model: Callable[[str], Path]) -> None:
    """Finite differences of the block's error: stacked, packed and transposed weights, in rows of their own."""

    def work(block_of: Callable[[slice], Block]) -> None:
        block = block_of(slice(0, 8))
        error = Error(block, block.outputs().roll(1, 0))
        with trained(block.linears):
            before = error.gradients(range(len(error.pieces)))
            found = {linear.name: weight_gradient(linear) for linear in block.linears}
        assert before == pytest.approx(error.mean() * block.hidden.numel(), rel=1e-5)
        for linear in block.linears:
            weight, gradient = linear.weight(), found[linear.name]
            direction = np.zeros_like(weight)
            place = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
            direction[place] = 0.01
            ends = []
            for sign in (1, -1):
                linear.set_weight(weight + sign * direction)
                ends.append(error.mean() * block.hidden.numel())
            linear.set_weight(weight)
            assert (ends[0] - ends[1]) / 0.02 == pytest.approx(float(gradient[place]), rel=0.02)

    on_block(tiny_model(family), work)


def test_integer_products_are_rounded_and_not_learnt(tiny_model: Callable[[str], Path]) -> None:
    integer = Scheme(8, 0, symmetric=True, activations="dynamic")
    start, learnt = (learn(tiny_model("llama"), AutoRound(steps), integer, "float32") for steps in (0, 4))
    assert all(np.array_equal(start.results[name].codes, learnt.results[name].codes) for name in start.results)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_an_error_that_is_not_finite_is_refused(wrong: float, tiny_model: Callable[[str], Path]) -> None:
    def spoil(targets: torch.Tensor) -> torch.Tensor:
        spoilt: Any = targets.clone()
        spoilt[3, 4, 5] = wrong
        return spoilt

    with pytest.raises(CompressError, match="not finite(.|\n)*block 1"):
        learn(tiny_model("llama"), AutoRound(2), change=spoil)


# ------------------------------------------------------------------------------------------------------ scales alone


class Tuner(AutoRound):
    """GPTQ, then tuned scales."""

    def __init__(self, steps: int, rate: float = 0.003) -> None:
        super().__init__(0)
        self.tuning = {"steps": steps, "rate": rate}

    def learn(
        self,
        block: LearntBlock,
        fates: Mapping[str, Any],
        targets: Any,  # noqa: ANN401
        scale_format: ScaleFormat,
    ) -> dict[str, QuantizedRows]:
        start = super().learn(block, fates, targets, scale_format)
        return tune_scales(block, fates, start, targets, scale_format, **self.tuning)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_tuned_scales_are_better_on_windows_they_did_not_see(family: str, tiny_model: Callable[[str], Path]) -> None:
    """Codes and zero points stay; other outputs to learn from are the negative control."""
    directory = tiny_model(family)
    start, tuned = learn(directory, AutoRound(0)), learn(directory, Tuner(40))
    for name, result in tuned.results.items():
        before = start.results[name]
        assert np.array_equal(result.codes, before.codes) and not np.array_equal(result.scales, before.scales)
        assert result.zero_points is not None and before.zero_points is not None
        assert np.array_equal(result.zero_points, before.zero_points)
        pack_scales(result.scales, "int8")
    assert tuned.seen < 0.95 * start.seen and tuned.unseen < 0.98 * start.unseen
    misled = learn(directory, Tuner(40), change=lambda targets: targets.roll((1, 1), (0, 2)))
    assert misled.unseen > start.unseen


def test_tuning_that_does_harm_is_dropped(tiny_model: Callable[[str], Path]) -> None:
    start, tuned = learn(tiny_model("llama"), AutoRound(0)), learn(tiny_model("llama"), Tuner(5, rate=0.5))
    assert tuned.seen == start.seen
    assert all(np.array_equal(tuned.results[name].scales, start.results[name].scales) for name in start.results)
