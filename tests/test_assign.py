"""From losses to a plan: bytes that the plan confirms whatever is chosen, schemes that a profile leaves open."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from compress import pipeline
from compress.assign import assign, candidate, fixed_bytes, open_tensors
from compress.contracts import Scheme
from compress.errors import BudgetError
from compress.planning import Plan, make_plan
from compress.profile import Profile, load_profile
from compress.providers import load as load_provider
from compress.quantize.options import decode_cost, schemes_for, tensor_bytes
from compress.show import plan_document, plan_text
from compress.source import open_checkpoint
from test_plan import plan_of
from tiny_models import FAMILIES

Replan = Callable[[Mapping[str, Scheme]], Plan]


@pytest.fixture
def small(tmp_path: Path, tiny_model: Callable[[str], Path]) -> Path:
    """A tied model of which only config.json is there: some tensors are over a megabyte, some under a kilobyte."""
    config = json.loads((tiny_model("llama") / "config.json").read_text())
    config |= {"vocab_size": 8191, "hidden_size": 256, "intermediate_size": 4096 + 32, "head_dim": 64}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def replanner(directory: Path, profile: Profile) -> Replan:
    def replan(schemes: Mapping[str, Scheme]) -> Plan:
        with open_checkpoint(str(directory), config_only=True) as checkpoint:
            return make_plan(pipeline.describe(checkpoint), profile, checkpoint, schemes=schemes)

    return replan


def losses(schemes: tuple[Scheme, ...], scale: float) -> dict[Scheme, float]:
    return {s: scale * 4.0 ** (2 - s.bits) * s.block_size**0.4 * (1.2 if s.symmetric else 1.0) for s in schemes}


# ---------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("scale_format", ["float32", "float16", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_tensors_bytes_are_the_plans(name: str, scale_format: str, tiny_model: Callable[[str], Path]) -> None:
    profile = load_profile("x86-int4", [f"quantize.scale_format={scale_format}"])
    directory = tiny_model(name)
    plan = plan_of(directory, "x86-int4", f"quantize.scale_format={scale_format}")
    options = open_tensors(plan, profile)
    assert options, "something is open"
    for turn in range(max(map(len, options.values()))):
        schemes = {tensor: known[turn % len(known)] for tensor, known in options.items()}
        with open_checkpoint(str(directory)) as checkpoint:
            made = make_plan(pipeline.describe(checkpoint), profile, checkpoint, schemes=schemes)
        for tensor, scheme in schemes.items():
            fate = made.by_name[tensor]
            assert fate.kind != "vector" and fate.scheme == scheme
            assert tensor_bytes(scheme, fate.rows, fate.columns, made.scale_format, fate.kind) == fate.nbytes


def test_padded_and_unpadded_rows_take_different_bytes() -> None:
    scheme = Scheme(4, 32, symmetric=False)
    # 33 columns: two blocks of 16 bytes, or 17 bytes; int8 scales with a float32 a row; two zero points in a byte.
    assert tensor_bytes(scheme, 10, 33, "int8", "matmul") == 10 * (32 + 2 + 4 + 1)
    assert tensor_bytes(scheme, 10, 33, "float16", "table") == 10 * (17 + 4 + 1)


@pytest.mark.parametrize("profile_name", ["x86-int4", "arm-int4", "x86-int4-mixed"])
def test_whatever_is_chosen_fits_into_what_was_allowed_for(profile_name: str, small: Path) -> None:
    profile = load_profile(profile_name)
    replan = replanner(small, profile)
    base = replan({})
    options = open_tensors(base, profile)
    fixed = fixed_bytes(base, list(options))
    random = np.random.default_rng(0)
    slack = []
    corners: list[dict[str, Scheme]] = [{name: known[index] for name, known in options.items()} for index in (0, -1)]
    drawn = [{name: known[random.integers(len(known))] for name, known in options.items()} for _ in range(20)]
    for schemes in (*corners, *drawn):
        plan = replan(schemes)
        own = sum(plan.by_name[name].nbytes for name in schemes)
        slack.append(fixed + own - plan.predicted_bytes)
    assert min(slack) >= 0
    # The worst case is a page for every large tensor; the graph's zero points are small beside that.
    pages = sum(4096 for fate in base.fates if fate.role and fate.rows * fate.columns >= 1 << 20)
    assert max(slack) <= pages + 0.2 * base.graph_bytes + 4 * 64 * len(base.fates)


def test_other_tensors_stay_as_they_are(small: Path) -> None:
    """Fixed bytes are the plan's own where nothing is open, but for padding and what the graph may be off by."""
    plan = plan_of(small, "float", config_only=True)
    assert open_tensors(plan, load_profile("float")) == {}
    assert plan.predicted_bytes <= fixed_bytes(plan) <= plan.predicted_bytes + 4096 * len(plan.fates)
    quantized = plan_of(small, config_only=True)
    assert fixed_bytes(quantized, []) > fixed_bytes(quantized) + 1_000_000


# --------------------------------------------------------------------------------------------------------------- assign


def test_the_plan_keeps_the_budget_and_uses_it(small: Path) -> None:
    profile = load_profile("x86-int4")
    replan = replanner(small, profile)
    base = replan({})
    candidates = [
        candidate(base, name, losses(known, 0.001 * (1 + index)))
        for index, (name, known) in enumerate(open_tensors(base, profile).items())
    ]
    smallest = fixed_bytes(base) + sum(min(option.nbytes for option in c.options) for c in candidates)
    best: list[float] = []
    for budget in (smallest, int(1.3 * smallest), int(1.7 * smallest)):
        allocation, plan = assign(candidates, replan, max_bytes=budget, max_loss=None)
        assert allocation.nbytes == plan.predicted_bytes <= budget
        assert {name: plan.by_name[name].scheme for name in allocation.schemes} == allocation.schemes
        best.append(allocation.loss)
    assert best[0] > best[1] > best[2]
    allocation, plan = assign(candidates, replan, max_bytes=None, max_loss=best[1])
    assert allocation.loss <= best[1] * (1 + 1e-9) and plan.predicted_bytes == allocation.nbytes
    with pytest.raises(BudgetError, match="the smallest takes"):
        assign(candidates, replan, max_bytes=smallest // 2, max_loss=None)


def test_padding_that_was_not_needed_is_used(small: Path) -> None:
    """A second round has more room than the worst case left: there are budgets where that shows."""
    profile = load_profile("x86-int4")
    replan = replanner(small, profile)
    base = replan({})
    candidates = [candidate(base, name, losses(known, 0.001)) for name, known in open_tensors(base, profile).items()]
    from compress.quantize.allocate import allocate

    fixed = fixed_bytes(base, [c.name for c in candidates])
    better = 0
    for budget in range(4_000_000, 6_000_000, 250_000):
        first = allocate(candidates, fixed_bytes=fixed, max_bytes=budget, max_loss=None)
        refined, plan = assign(candidates, replan, max_bytes=budget, max_loss=None)
        assert plan.predicted_bytes <= budget and refined.loss <= first.loss
        better += refined.loss < first.loss
    assert better


def test_a_plan_shows_its_assignment(small: Path) -> None:
    from compress.report.allocation import summarize

    profile = load_profile("x86-int4")
    replan = replanner(small, profile)
    base = replan({})
    candidates = [candidate(base, name, losses(known, 0.001)) for name, known in open_tensors(base, profile).items()]
    made, plan = assign(candidates, replan, max_bytes=5_000_000, max_loss=None)
    shown = summarize(made, max_bytes=5_000_000, max_kl=None)
    with open_checkpoint(str(small), config_only=True) as checkpoint:
        document = plan_document(plan, profile, checkpoint, 2, shown)
        assert plan_document(plan, profile, checkpoint, 2)["allocation"] is None
    json.dumps(document, allow_nan=False)
    assert document["allocation"]["predicted_kl"] == made.loss
    stored = {tensor["name"]: tensor["storage"] for tensor in document["tensors"]}
    assert all(stored[tensor["name"]] == tensor["storage"] for tensor in document["allocation"]["tensors"])
    text = plan_text(document)
    assert "bits chosen for   5.00 MB" in text and f"predicted KL      {made.loss:.4g} nats" in text
    assert sum(line.endswith("chosen") for line in text.splitlines()) == 1
    assert max(map(len, text.splitlines())) <= 100


# -------------------------------------------------------------------------------------------------------------- schemes


def test_every_scheme_on_offer_runs_fast_and_has_a_time() -> None:
    for name, role, columns in itertools.product(
        ("x86-int4", "arm-int4", "x86-int4-mixed"), ("qkv", "down", "head", "embedding"), (576, 1536, 48)
    ):
        profile = load_profile(name)
        known = schemes_for(profile, role, columns)  # type: ignore[arg-type]
        assert len(set(known)) == len(known) > 0
        for scheme in known:
            assert load_provider(profile.provider).supports(scheme) is None
            assert decode_cost(scheme, 10, columns) > 0
            assert scheme.bits > 2 or scheme.block_size >= 32, "2 bits in blocks of 16 have no kernel"
            if role == "embedding":
                assert columns % scheme.block_size == 0


def test_a_symmetric_profile_keeps_to_the_kernels_it_is_for() -> None:
    arm = load_profile("arm-int4")
    linear = schemes_for(arm, "down", 576)
    assert {scheme.symmetric for scheme in linear} == {True}
    assert {scheme.block_size for scheme in linear} == {32, 64}, "16 is no multiple of 32, 128 does not divide 576"
    assert {scheme.block_size for scheme in schemes_for(arm, "down", 1536)} == {32, 64, 128}
    assert {scheme.block_size for scheme in schemes_for(arm, "down", 48)} == {16, 32, 64, 128}, "no fast kernel anyway"
    assert {scheme.symmetric for scheme in schemes_for(arm, "embedding", 576)} == {True, False}
    assert len(schemes_for(load_profile("x86-int4"), "down", 576)) == 22, "3 bits, 4 blocks, 2 kinds, but 2 bits b16"


def test_what_a_profile_keeps_is_not_open() -> None:
    assert schemes_for(load_profile("float"), "down", 576) == ()
    assert schemes_for(load_profile("arm-int4", ["quantize.roles.down.bits=32"]), "down", 576) == ()
    assert schemes_for(load_profile("arm-int4"), "position", 576) == ()
    integers = load_profile("x86-int8")
    assert schemes_for(integers, "qkv", 576) == (), "its products are of integers"
    assert schemes_for(integers, "down", 576) != (), "this one's are not, where a model writes text"


def test_decode_time_counts_bits_blocks_and_uses() -> None:
    four, eight = Scheme(4, 32, symmetric=True), Scheme(8, 32, symmetric=True)
    assert decode_cost(four, 100, 64) == 3200.0, "bytes of 4-bit codes"
    assert 1.2 <= decode_cost(eight, 100, 64) / 3200 <= 2.0
    assert decode_cost(Scheme(4, 16, symmetric=True), 100, 64) > decode_cost(four, 100, 64)
    assert decode_cost(eight, 100, 64, looked_up=True) == 0.0


def test_an_untied_table_costs_no_time_and_a_tied_one_does(tiny_model: Callable[[str], Path]) -> None:
    scheme = Scheme(8, 32, symmetric=True)
    for name, tied in (("llama", True), ("mistral", False)):
        plan = plan_of(tiny_model(name))
        assert plan.by_name["model.embed_tokens"].tied == tied
        assert bool(candidate(plan, "model.embed_tokens", {scheme: 0.1}).options[0].cost) == tied
