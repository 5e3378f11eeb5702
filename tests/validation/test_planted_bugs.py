"""The gate against planted bugs: each makes a good int4 artifact fail, and without one it passes.

The model is tiny but has learnt text for a few seconds: a random model's flat logits hide almost anything. Bugs in the
cache leave prefill alone, so drift on whole windows cannot see them; decoding step by step does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import planted_bugs
import pytest
from planted_bugs import change

from compress.errors import CompressError
from compress.validation import run, text
from compress.validation.artifact import open_artifact
from compress.validation.gate import MAX_DECODE_SELF_KL
from compress.validation.on_provider import Terms
from compress.validation.speed import SpeedPlan

STEPS, BATCH, LENGTH = 200, 16, 64
PLAN = SpeedPlan(prompt_tokens=8, new_tokens=4, repeats=1, threads=1, timeout=120)
# Int4 costs this model 0.017 nats, the mildest bug below 0.056; rounding in training moves both a little.
BUDGETS = {"max_kl": 0.035, "min_top1_agreement": 0.84}
DATA = "model.onnx.data"


@dataclass(frozen=True)
class Fixture:
    """A good artifact, and the source model's logits on a text."""

    artifact: Path
    source: Path
    reference: run.Reference


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[[str], Path]) -> Fixture:
    """Train, export to int4 with zero points, and run the source model once."""
    root = tmp_path_factory.mktemp("planted")
    source, artifact, work = root / "source", root / "artifact", root / "work"
    for directory in (source, artifact, work):
        directory.mkdir()
    train(source, tiny_model("llama"))
    build_int4(source, artifact)
    reference = run.make_reference(
        open_artifact(artifact),
        run.CheckpointSpec(str(source)),
        None,
        12 * LENGTH,
        LENGTH,
        PLAN,
        work,
        [],
        lambda stage, fraction: None,
    )
    return Fixture(artifact, source, reference)


def train(directory: Path, tokenizer: Path) -> None:
    """Teach a tiny Llama the calibration half for a few seconds; deterministic."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / file, directory)
    _, tokens = text.tokenize(text.embedded("calibration").content, directory)
    ids = torch.tensor(tokens)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 8e-3 * min(1, step / 50, (STEPS - step) / (STEPS / 2))
        starts = torch.randint(0, len(ids) - LENGTH, (BATCH,))
        batch = torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert loss.item() < 3.2  # it began at 5.95
    model.save_pretrained(directory)


def build_int4(source: Path, artifact: Path) -> None:
    """Export to int4, blocks of 32 with zero points, without validation."""
    from compress.pipeline import build, describe
    from compress.planning import make_plan
    from compress.profile import Profile, Quantize
    from compress.progress import Stages
    from compress.source import open_checkpoint

    profile = Profile(name="t", description="t", quantize=Quantize(bits=4, block_size=32, symmetric=False))
    with open_checkpoint(str(source)) as checkpoint:
        build(checkpoint, make_plan(describe(checkpoint), profile, checkpoint), profile, artifact, 1, Stages())


def judged(directory: Path, good: Fixture, work: Path) -> tuple[Any, run.Measured]:
    """Measure an artifact against the reference and judge it."""
    measured = run.Measured()
    work.mkdir()
    artifact = open_artifact(directory)
    run.measure_graph(artifact, "cpu", good.reference, measured, PLAN, work, [], lambda stage, fraction: None)
    return run.verdicts(BUDGETS, {"cpu": measured}, artifact.bytes, Terms())[0], measured


def mutated(good: Fixture, directory: Path, mutate: Callable[[ir.Model], None]) -> Path:
    """Return a copy of the good artifact with one change to its graph or weights."""
    shutil.copytree(good.artifact, directory, ignore=shutil.ignore_patterns("model.onnx*"))
    model = ir.load(good.artifact / "model.onnx")
    mutate(model)
    ir.save(model, directory / "model.onnx", external_data=DATA)
    return directory


WEIGHT_BUGS = (
    planted_bugs.nibble_order,
    planted_bugs.zero_point,
    planted_bugs.scale_block,
    planted_bugs.scale_size,
    planted_bugs.rope_sign,
    planted_bugs.rope_interleaved,
)


def nothing(model: ir.Model) -> None:
    """Change nothing: the round trip through the graph library is not what fails."""


def test_the_good_artifact_passes(good: Fixture, tmp_path: Path) -> None:
    for name, directory in (("as-exported", good.artifact), ("saved-again", mutated(good, tmp_path / "a", nothing))):
        verdict, measured = judged(directory, good, tmp_path / name)
        assert verdict.status == "pass", verdict.reasons
        assert measured.placement is not None and measured.placement.fallback_nodes == ()


def test_the_budget_is_near_what_int4_costs(good: Fixture, tmp_path: Path) -> None:
    _, measured = judged(good.artifact, good, tmp_path / "work")
    assert measured.drift is not None and measured.drift.decode is not None
    assert BUDGETS["max_kl"] / 3 < measured.drift.kl_divergence.mean < BUDGETS["max_kl"]
    assert measured.drift.decode.self_kl_mean < MAX_DECODE_SELF_KL / 10


@pytest.mark.parametrize("bug", WEIGHT_BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_in_weights_or_rotation_fails_on_drift(
    bug: Callable[[ir.Model], None], good: Fixture, tmp_path: Path
) -> None:
    verdict, measured = judged(mutated(good, tmp_path / "bug", bug), good, tmp_path / "work")
    assert verdict.status == "fail"
    assert any(reason.startswith("kl is ") for reason in verdict.reasons), verdict.reasons
    assert measured.failures == []  # it ran: it was judged, not broken


@pytest.mark.parametrize("bug", planted_bugs.CACHE, ids=lambda bug: bug.__name__)
def test_a_bug_in_the_cache_fails_on_decoding_alone(
    bug: Callable[[ir.Model], None], good: Fixture, tmp_path: Path
) -> None:
    verdict, measured = judged(mutated(good, tmp_path / "bug", bug), good, tmp_path / "work")
    assert verdict.status == "fail" and measured.failures == []
    assert len(verdict.reasons) == 1 and "decoding through the cache" in verdict.reasons[0]
    assert measured.drift is not None and measured.drift.kl_divergence.mean < BUDGETS["max_kl"]


def test_logits_that_are_not_finite_are_a_reason(good: Fixture, tmp_path: Path) -> None:
    def broken(model: ir.Model) -> None:
        change(model, "model.norm.weight", lambda weight: weight * np.float32(np.nan))

    verdict, measured = judged(mutated(good, tmp_path / "bug", broken), good, tmp_path / "work")
    assert verdict.status == "fail" and measured.drift is None
    assert "logits that are not finite (window 0)" in verdict.reasons[0]
    assert any("kl was not measured (the run failed)" in reason for reason in verdict.reasons)


def test_a_damaged_artifact_is_not_run(good: Fixture, tmp_path: Path) -> None:
    directory = shutil.copytree(good.artifact, tmp_path / "bug")
    os.truncate(directory / DATA, 1000)
    with pytest.raises(CompressError, match="are beyond the end of 'model.onnx.data', which has 1000"):
        judged(directory, good, tmp_path / "work")
