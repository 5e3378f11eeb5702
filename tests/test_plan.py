"""The plan: sizes that come true, places that do not overlap, and impossible schemes refused before work starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compress import pipeline, rotation
from compress.errors import CompressError, UsageError
from compress.planning import INLINE_LIMIT, Plan, make_plan
from compress.profile import load_profile
from compress.source import open_checkpoint
from tiny_models import FAMILIES, INT8_CACHE

TABLE = "quantize.roles.embedding"
#: The profile has blocks of its own for the table; it takes 2-bit codes in larger ones only.
NARROW_TABLE = f"{TABLE}.block_size=64"
VARIANTS: dict[str, tuple[str, ...]] = {
    "float": ("float",),
    "arm-int4": ("arm-int4",),
    "asymmetric": ("arm-int4", "quantize.symmetric=false"),
    "block-16": ("arm-int4", "quantize.block_size=16"),
    "block-128": ("arm-int4", "quantize.block_size=128", NARROW_TABLE),
    "8-bit": ("arm-int4", "quantize.bits=8"),
    "2-bit-block-64": ("arm-int4", "quantize.bits=2", "quantize.block_size=64", NARROW_TABLE),
    "float16-scales": ("arm-int4", "quantize.scale_format=float16"),
    "float32-scales": ("arm-int4", "quantize.scale_format=float32"),
    "mixed": ("x86-int4-mixed",),
    "float16": ("cuda-fp16",),
    "float16-int4": ("cuda-int4", "graph.float_type=float16", "quantize.scale_format=float16"),
    "float-head": ("arm-int4", "quantize.roles.head.bits=32", "quantize.roles.embedding.bits=32"),
}

#: Not of models whose norms take off the mean.
ROTATED: dict[str, tuple[str, ...]] = {
    "rotated-float": ("float", "quantize.rotation=residual"),
    "rotated-int8": ("x86-int8-hybrid", "quantize.effort=fast"),
    "rotated-int4": ("arm-int4", "quantize.rotation=residual"),
}


def plan_of(directory: Path, profile: str = "arm-int4", *overrides: str, config_only: bool = False) -> Plan:
    recipe = load_profile(profile, overrides)
    with open_checkpoint(str(directory), config_only=config_only) as checkpoint:
        seen, structure = rotation.applied(checkpoint, pipeline.describe(checkpoint), recipe)
        return make_plan(structure, recipe, seen)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_predicted_bytes_come_true(
    name: str, variant: str, tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path]
) -> None:
    given = (VARIANTS | ROTATED)[variant]
    plan, artifact = plan_of(tiny_model(name), *given), tiny_artifact(name, *given)
    graph, data = ((artifact / file).stat().st_size for file in ("model.onnx", "model.onnx.data"))
    assert data == plan.data_bytes
    assert plan.predicted_bytes == pytest.approx(graph + data, rel=0.01)
    # These models are so small that their graph weighs: the prediction of it alone has to be near, too.
    assert plan.graph_bytes == pytest.approx(graph, rel=0.03)


@pytest.mark.parametrize("variant", ROTATED)
@pytest.mark.parametrize("name", ["llama", "llama-untied", "mistral", "phi3"])
def test_predicted_bytes_of_rotated_models_come_true(
    name: str, variant: str, tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path]
) -> None:
    test_predicted_bytes_come_true(name, variant, tiny_model, tiny_artifact)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_held_scores_add_to_a_graph(
    name: str, tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path]
) -> None:
    both = ("arm-int4",), ("arm-int4", "graph.attention=materialized")
    planned = [plan_of(tiny_model(name), *given).graph_bytes for given in both]
    written = [(tiny_artifact(name, *given) / "model.onnx").stat().st_size for given in both]
    assert (planned[1] - planned[0], name) == (written[1] - written[0], name)
    assert (planned[1] > planned[0] + 100) == (name != "phi3-longrope")


@pytest.mark.parametrize("more", [(), ("graph.attention=materialized",)], ids=["tiled", "held"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_cache_of_bytes_adds_to_a_graph_and_takes_from_memory(
    name: str, more: tuple[str, ...], tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path]
) -> None:
    both = ("float", *more), ("float", *INT8_CACHE, *more)
    plans = [plan_of(tiny_model(name), *given) for given in both]
    written = [tiny_artifact(name, *given) for given in both]
    sizes = [(path / "model.onnx").stat().st_size for path in written]
    # The length of the whole, which is written in front, may take a byte more.
    assert sizes[1] - sizes[0] - (plans[1].graph_bytes - plans[0].graph_bytes) in (0, 1)
    assert [plan.data_bytes for plan in plans] == [(path / "model.onnx.data").stat().st_size for path in written]
    assert plans[1].weight_count == plans[0].weight_count  # scales are no parameters
    decoder = plans[1].decoder
    numbers = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim
    assert [plan.cache_bytes for plan in plans] == [4 * numbers, numbers]
    assert plan_of(tiny_model(name), "cuda-fp16").cache_bytes == 2 * numbers


def test_encoders_and_static_graphs_have_no_cache_that_grows(tiny_model: Callable[[str], Path]) -> None:
    assert plan_of(tiny_model("bert:embedding"), "x86-int8", "graph.cache_type=int8").cache_bytes is None
    assert plan_of(tiny_model("llama"), "npu-qnn-int8").cache_bytes is None


def test_variants_differ(tiny_model: Callable[[str], Path]) -> None:
    """Negative control: a prediction that ignored the scheme would miss by more than the tolerance."""
    plain = plan_of(tiny_model("mistral"), *VARIANTS["arm-int4"]).predicted_bytes
    for name, variant in VARIANTS.items():
        size = plan_of(tiny_model("mistral"), *variant).predicted_bytes
        assert (size == pytest.approx(plain, rel=0.01)) == (name == "arm-int4"), name


@pytest.mark.parametrize("name", FAMILIES)
def test_config_alone_gives_the_same_plan(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copyfile(tiny_model(name) / "config.json", tmp_path / "config.json")
    from_config = plan_of(tmp_path, config_only=True)
    from_headers = plan_of(tiny_model(name))
    assert from_config.fates == from_headers.fates
    assert from_config.predicted_bytes == from_headers.predicted_bytes
    assert from_config.weight_count == from_headers.weight_count
    # The checkpoint is float32; without headers two bytes a parameter are assumed.
    assert from_headers.source_bytes == 2 * from_config.source_bytes
    assert from_config.source_bytes == 2 * from_config.weight_count


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_places_are_aligned_and_apart(name: str, variant: str, tiny_model: Callable[[str], Path]) -> None:
    plan = plan_of(tiny_model(name), *VARIANTS[variant])
    tensors = [stored for fate in plan.fates for stored in fate.stored]
    assert len({stored.name for stored in tensors}) == len(tensors)
    end = 0
    for stored in tensors:
        assert (stored.offset is None) == (stored.nbytes < INLINE_LIMIT), stored.name
        if stored.offset is not None:
            assert stored.offset >= end
            assert stored.offset % 64 == 0 and stored.offset - end < 64
            end = stored.offset + stored.nbytes
    assert end == plan.data_bytes
    assert any(stored.offset is None for stored in tensors), "norms are small"


def test_large_tensors_start_on_a_page(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    config = json.loads((tiny_model("mistral") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 32001, "hidden_size": 256}))
    plan = plan_of(tmp_path, config_only=True)
    large = [stored for fate in plan.fates for stored in fate.stored if stored.nbytes >= 1 << 20]
    assert len(large) == 2 and all(stored.offset is not None and stored.offset % 4096 == 0 for stored in large)


def test_roles_have_their_own_scheme(tiny_model: Callable[[str], Path]) -> None:
    plan = plan_of(
        tiny_model("mistral"), "arm-int4", "quantize.roles.down.bits=8", "quantize.roles.head.bits=32",
        "quantize.roles.embedding.bits=8", "quantize.roles.qkv.block_size=16", "quantize.roles.qkv.symmetric=false",
    )  # fmt: skip
    schemes = {fate.role: fate.scheme for fate in plan.fates if fate.role}
    as_numbers = {
        role: scheme and (scheme.bits, scheme.block_size, scheme.symmetric) for role, scheme in schemes.items()
    }
    assert as_numbers == {
        "embedding": (8, 16, False),
        "qkv": (4, 16, False),
        "attention_output": (4, 32, True),
        "gate_up": (4, 32, True),
        "down": (8, 32, True),
        "head": None,
    }


def test_tied_table_is_planned_once_with_the_embeddings_scheme(tiny_model: Callable[[str], Path]) -> None:
    plan = plan_of(tiny_model("llama"), "arm-int4", "quantize.roles.embedding.bits=8", "quantize.roles.head.bits=2")
    table = plan.by_name["model.embed_tokens"]
    assert table.tied and table.scheme is not None and table.scheme.bits == 8
    assert "lm_head" not in plan.by_name
    assert not plan_of(tiny_model("mistral")).by_name["model.embed_tokens"].tied


def test_bits_per_weight_count_scales(tiny_model: Callable[[str], Path]) -> None:
    def bits(plan: Plan, name: str) -> float:
        fate = plan.by_name[name]
        return 8 * fate.nbytes / (fate.rows * fate.columns)

    plain = plan_of(tiny_model("mistral"), "arm-int4", "quantize.scale_format=float32")
    linear, table = "model.layers.0.self_attn.o_proj", "model.embed_tokens"
    assert bits(plain, linear) == 5.0, "4 bits and a float32 scale for every 32 of them"
    assert bits(plain, table) == 6.25, "4 bits, a float32 scale and a zero point for every 16 of them"
    # Whole rows have a float32 on top: half a bit for each of these models' 64 columns.
    assert bits(plan_of(tiny_model("mistral")), linear) == 4.25 + 0.5
    assert bits(plan_of(tiny_model("mistral")), table) == 4.75 + 0.5
    assert plan_of(tiny_model("mistral"), "float").bits_per_weight == 32.0


@pytest.mark.parametrize(
    ("name", "override", "what", "hint"),
    [
        ("llama", "quantize.block_size=512", "block size 512", "256"),
        ("llama", "quantize.block_size=48", "block size 48", "64"),
        ("llama", "quantize.block_size=0", "block size 0", "16"),
        ("llama", "quantize.roles.down.block_size=0", "block size 0", "16"),
        ("llama", "quantize.roles.qkv.block_size=-32", "block size -32", "16"),
        ("mistral", "quantize.bits=2", "2-bit weights with block size 16", "quantize"),
        ("mistral", "quantize.roles.down.bits=2", None, None),
        ("mistral", "quantize.roles.up.bits=2", None, None),
        ("llama", "quantize.block_size=128", None, None),
        ("llama", f"{TABLE}.block_size=128", "tied table of 64 columns", f"{TABLE}.block_size=64"),
        ("gpt2", f"{TABLE}.block_size=256", "tied table of 64 columns", f"{TABLE}.block_size=64"),
    ],
)
def test_impossible_schemes_are_refused(
    name: str, override: str, what: str | None, hint: str | None, tiny_model: Callable[[str], Path]
) -> None:
    if what is None:  # possible: the table's control
        plan_of(tiny_model(name), "arm-int4", override)
        return
    with pytest.raises(UsageError, match=what) as caught:
        plan_of(tiny_model(name), "arm-int4", override)
    assert hint is not None and hint in (caught.value.hint or "")
    assert "arm-int4" in (caught.value.where or "")


def test_a_scheme_the_provider_runs_slowly_is_refused(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="2-bit weights with block size 16 run 100 times slower"):
        plan_of(tiny_model("mistral"), "arm-int4", "quantize.bits=2", "quantize.block_size=16")


def test_unknown_providers_are_refused(tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(CompressError, match="cpuu"):
        plan_of(tiny_model("mistral"), "arm-int4", "provider=cpuu")


def test_a_tied_table_that_no_block_divides_is_told_to_stay_float(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    config = json.loads((tiny_model("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 68, "head_dim": 16}))
    with pytest.raises(UsageError, match="tied table of 68 columns") as caught:
        plan_of(tmp_path, config_only=True)
    assert "quantize.roles.embedding.bits=32" in (caught.value.hint or "")
    plan_of(tmp_path, "arm-int4", "quantize.roles.embedding.bits=32", config_only=True)
