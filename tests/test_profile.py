"""Profiles: every shipped one loads, every key is checked, and a message names the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from compress.contracts import Role, Scheme
from compress.errors import UsageError
from compress.profile import available_profiles, load_profile, parse_profile
from compress.providers import load as load_provider
from compress.quantize import load_quantizer
from compress.quantize.scheme import validate_scheme

MINIMAL = {"name": "p", "description": "d"}


@pytest.mark.parametrize("name", available_profiles())
def test_shipped_profiles_load_and_can_run(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name, "a profile is found by its file's name"
    assert profile.description.endswith(".")
    load_quantizer(profile.quantize.quantizer)
    provider = load_provider(profile.provider)
    for role in get_args(Role):
        scheme = profile.quantize.scheme(role)
        if scheme is not None:
            looked_up = scheme.block_size == 0 and role in ("embedding", "position")
            validate_scheme(scheme, whole_rows=looked_up)
            assert looked_up or provider.supports(scheme) is None
    budget = profile.budget
    assert {budget.max_kl, budget.min_cosine} != {None}, "a profile without a budget proves nothing"


def test_the_issues_profiles_are_there() -> None:
    assert {"arm-int4", "x86-int4", "float"} <= set(available_profiles())
    arm = load_profile("arm-int4").quantize
    assert (arm.scheme("qkv"), arm.accuracy_level) == (Scheme(4, 32, symmetric=True), 4)
    assert load_profile("float").quantize.scheme("head") is None


def test_profiles_can_be_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\ndescription = "d"\n[quantize.roles.head]\nbits = 8\n')
    profile = load_profile(str(path))
    assert profile.quantize.scheme("head") == Scheme(8, 32, symmetric=True)
    assert profile.quantize.scheme("down") == Scheme(4, 32, symmetric=True)


# ------------------------------------------------------------------------------------------------------------- schemes


def test_integer_products_have_a_scale_a_channel_whatever_the_blocks_say() -> None:
    quantize = {"bits": 8, "activations": "dynamic", "block_size": 128, "symmetric": False}
    schemes = parse_profile({**MINIMAL, "quantize": quantize}, where="test").quantize
    for role in ("qkv", "attention_output", "up", "down", "projection", "pooler", "classifier", "gate_up"):
        assert schemes.scheme(role) == Scheme(8, 0, symmetric=True, activations="dynamic")
    for role in ("head", "embedding"):
        assert schemes.scheme(role) == Scheme(8, 128, symmetric=False), "its inputs stay float32"
    assert schemes.scheme("position") is None, "unless its role says so"


def test_roles_choose_their_own_activations() -> None:
    roles = {"down": {"bits": 32}, "up": {"activations": "none", "block_size": 64}, "position": {"bits": 8}}
    roles |= {"head": {"activations": "static"}, "qkv": {"bits": 7}}
    quantize = {"bits": 8, "activations": "dynamic", "block_size": 128, "roles": roles}
    schemes = parse_profile({**MINIMAL, "quantize": quantize}, where="test").quantize
    assert schemes.scheme("down") is None
    assert schemes.scheme("up") == Scheme(8, 64, symmetric=True)
    assert schemes.scheme("head") == Scheme(8, 0, symmetric=True, activations="static")
    assert schemes.scheme("qkv") == Scheme(7, 0, symmetric=True, activations="dynamic")
    assert schemes.scheme("position") == Scheme(8, 128, symmetric=True)


# ----------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("quantize.block_size=64", 64),
        ("quantize.block_size = 64", 64),
        ("quantize.symmetric=false", False),
        ("quantize.algorithm=rtn", "rtn"),
        ('quantize.algorithm="rtn"', "rtn"),
        ("provider=cpu", "cpu"),
        ("description=a = b", "a = b"),
        ("budget.max_kl=0.25", 0.25),
        ("budget.max_kl=none", None),
        ("budget.max_bytes=none", None),
        ("validation.baselines=[]", ()),
        ("quantize.roles.down.bits=8", 8),
    ],
)
def test_set(override: str, value: Any) -> None:
    profile: Any = load_profile("arm-int4", [override])
    for part in override.partition("=")[0].strip().split("."):
        profile = profile[part] if isinstance(profile, dict) else getattr(profile, part)
    assert profile == value


def test_later_overrides_win_and_roles_add_up() -> None:
    profile = load_profile(
        "arm-int4",
        ["quantize.block_size=64", "quantize.block_size=128", "quantize.roles.down.bits=8",
         "quantize.roles.down.symmetric=false", "quantize.roles.head.bits=32"],
    )  # fmt: skip
    assert profile.quantize.scheme("qkv") == Scheme(4, 128, symmetric=True)
    assert profile.quantize.scheme("down") == Scheme(8, 128, symmetric=False)
    assert profile.quantize.scheme("head") is None


def test_a_zero_in_a_role_does_not_mean_the_default() -> None:
    scheme = load_profile("arm-int4", ["quantize.roles.down.block_size=0"]).quantize.scheme("down")
    assert scheme is not None and scheme.block_size == 0, "and the plan refuses it"


@pytest.mark.parametrize(
    ("override", "what", "hint"),
    [
        ("quantize.block_sise=64", "unknown key 'quantize.block_sise'", "block_size"),
        ("quantise.bits=4", "unknown key 'quantise'", "quantize"),
        ("quantize.zero_points=float", "unknown key 'quantize.zero_points'", "known: "),
        ("quantize.roles.down.bitz=8", "unknown key 'quantize.roles.down.bitz'", "bits"),
        ("quantize.roles.dawn.bits=8", "quantize.roles.dawn", "compress profiles"),
        ("graph.logits_to_kep=1", "unknown key 'graph.logits_to_kep'", "logits_to_keep"),
        ("quantize.bits=3", r"quantize\.bits: .*2, 4, 7, 8 or 32.*got 3", "compress profiles"),
        ("quantize.bits=four", r"quantize\.bits.*got 'four'", "compress profiles"),
        ("quantize.scale_format=float8", r"quantize\.scale_format.*got 'float8'", "compress profiles"),
        ("budget.max_kl=-1", r"budget\.max_kl", "compress profiles"),
        ("budget.max_kl=inf", r"budget\.max_kl", "compress profiles"),
        ("budget.max_kl=nan", r"budget\.max_kl", "compress profiles"),
        ("validation.tokens=8", r"validation\.tokens", "compress profiles"),
        ("validation.window=4096", r"validation\.window is longer", "compress profiles"),
        ("quantize.activations=sometimes", r"quantize\.activations: .*'dynamic'", "compress profiles"),
        ("quantize.roles.up.activations=8", r"quantize\.roles\.up\.activations", "compress profiles"),
        ("graph.pooling=sum", r"graph\.pooling: .*'mean', 'cls', 'max' or 'none'", "compress profiles"),
        ("graph.normalize=true", r"graph\.normalize: .*'auto', 'yes' or 'no'", "compress profiles"),
        ("graph.minimum_fusions.gelus=1", r"graph\.minimum_fusions\.gelus: .*'gelu'", "compress profiles"),
        ("graph.minimum_fusions=gelu", r"graph\.minimum_fusions", "compress profiles"),
        ("quantize.bits", "is not KEY=VALUE", "quantize.block_size=64"),
        ("=4", "is not KEY=VALUE", "quantize.block_size=64"),
        ("quantize..bits=4", "is not KEY=VALUE", "quantize.block_size=64"),
        ("name.first=4", "'name' is a value", None),
    ],
)
def test_bad_overrides_name_the_key_and_the_fix(override: str, what: str, hint: str | None) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        load_profile("arm-int4", [override])
    assert hint is None or hint in (caught.value.hint or "")
    assert len(str(caught.value).splitlines()) <= 3


# ---------------------------------------------------------------------------------------------------------- allocation


@pytest.mark.parametrize(
    ("text", "size"),
    [("88MB", 88e6), ("1.5GiB", 1.5 * 2**30), ("113.6 MB", 113.6e6), ("88000000", 88e6), ("8.8e7", 88e6)],
)
def test_a_budget_of_bytes_takes_units(text: str, size: float) -> None:
    assert load_profile("arm-int4", [f"budget.max_bytes={text}"]).budget.max_bytes == size


@pytest.mark.parametrize("text", ["88MM", "many", "-5MB", "0MB", "0", "true"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"budget\.max_bytes"):
        load_profile("arm-int4", [f"budget.max_bytes={text}"])


BALANCED = "quantize.effort=balanced"


def test_a_budget_that_is_taken_away_allocates_nothing() -> None:
    assert load_profile("x86-int4", [BALANCED, "budget.max_kl=none"]).quantize.allocation == "roles"
    assert load_profile("x86-int4", [BALANCED, "budget.max_kl=0.1"]).quantize.allocation == "budget"


@pytest.mark.parametrize(
    ("overrides", "allocation"),
    [
        ([BALANCED, "budget.max_bytes=88MB"], "budget"),
        (["budget.max_kl=0.1", BALANCED], "budget"),
        ([BALANCED, "budget={max_kl=0.1}"], "budget"),
        ([BALANCED], "roles"),  # the profile's own budget is a gate, not a wish
        ([BALANCED, "budget.min_top1_agreement=0.1"], "roles"),
        (["budget.max_bytes=88MB", "quantize.effort=fast"], "roles"),
        ([BALANCED, "budget.max_bytes=88MB", "quantize.allocation=roles"], "roles"),
    ],
)
def test_a_budget_that_is_asked_for_is_kept_by_choosing_bits(overrides: list[str], allocation: str) -> None:
    assert load_profile("arm-int4", overrides).quantize.allocation == allocation


def test_choosing_bits_needs_a_budget_and_an_effort(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'set quantize\.effort = "balanced"'):
        load_profile("arm-int4", ["quantize.allocation=budget", "budget.max_kl=0.1", "quantize.effort=fast"])
    with pytest.raises(UsageError, match=r"set budget\.max_bytes or budget\.max_kl"):
        parse_profile({**MINIMAL, "quantize": {"allocation": "budget", "effort": "balanced"}}, where="test")
    budget = {"max_bytes": "88MB"}
    quantize = {"allocation": "budget", "effort": "max"}
    assert parse_profile({**MINIMAL, "quantize": quantize, "budget": budget}, where="test").budget.max_bytes == 88e6


# --------------------------------------------------------------------------------------------------------- bad profiles


def test_unknown_profiles_suggest() -> None:
    with pytest.raises(UsageError, match="no profile is named 'arm-int'") as caught:
        load_profile("arm-int")
    hint = caught.value.hint or ""
    assert hint.startswith("did you mean") and "arm-int4" in hint
    with pytest.raises(UsageError, match="no profile"):
        load_profile("/nowhere/mine.toml")
    with pytest.raises(UsageError, match="no profile"):
        load_profile("../profiles/arm-int4")


@pytest.mark.parametrize("text", [b"name = ", b"\xff\xfe", b"a = " + b"[" * 20000, b'name = "a"\nname = "b"\n'])
def test_files_that_are_not_toml(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text)
    with pytest.raises(UsageError, match="not valid TOML") as caught:
        load_profile(str(path))
    assert caught.value.where == str(path)


def test_huge_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.toml"
    path.write_bytes(b"#" * 300_000)
    with pytest.raises(UsageError, match="larger than any profile"):
        load_profile(str(path))


def test_several_mistakes_are_counted() -> None:
    with pytest.raises(UsageError, match="1 more"):
        parse_profile({**MINIMAL, "quantize": {"bits": 3, "block_size": "x"}}, where="test")
    with pytest.raises(UsageError, match="description"):
        parse_profile({"name": "p"}, where="test")


def test_profiles_do_not_change() -> None:
    profile = parse_profile(MINIMAL, where="test")
    with pytest.raises(ValueError, match="frozen"):
        profile.name = "q"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("profile", "override", "message"),
    [
        ("npu-qnn-int8", "graph.attention=materialized", "leave out graph.attention"),
        ("cuda-fp16", "graph.attention=materialized", "is for float32"),
        ("x86-int4", "graph.attention=flash", "materialized"),
    ],
)
def test_scores_are_held_whole_where_there_is_a_kernel(profile: str, override: str, message: str) -> None:
    assert load_profile("x86-int4", ["graph.attention=materialized"]).graph.attention == "materialized"
    with pytest.raises(UsageError, match=message):
        load_profile(profile, [override])
