"""What random tokens show of every linear's inputs, against hooks in transformers' own model on the same tokens."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl

from compress import pipeline, weights
from compress.calibrate.random_tokens import TOKENS, RandomTokens
from compress.errors import SourceError
from compress.families import load_family
from compress.package.writer import DataFile
from compress.planning import Plan, make_plan
from compress.profile import load_profile
from compress.quantize import load_quantizer
from compress.source import OpenCheckpoint, open_checkpoint
from compress.weights import Stopped
from tiny_models import FAMILIES, VOCABULARY, save_tiny_model

SEED, TOLERANCE = 3, 1e-4
Moments = dict[str, np.ndarray]
#: The pass leaves rotary scalings out by design: LongRoPE has a test of its own.
EXACT = tuple(name for name in FAMILIES if name != "phi3-longrope")


@contextmanager
def calibration(
    directory: Path, seed: int = SEED, stopped: threading.Event | None = None
) -> Iterator[tuple[RandomTokens, Plan, OpenCheckpoint]]:
    with open_checkpoint(str(directory)) as checkpoint:
        plan = make_plan(pipeline.describe(checkpoint), load_profile("arm-int4"), checkpoint)
        family = load_family(checkpoint.config)
        yield RandomTokens(plan, checkpoint, family, seed, stopped or threading.Event()), plan, checkpoint


def moments_of(directory: Path, seed: int = SEED) -> Moments:
    """Return the importance of every linear's input channels, the head's by its own name."""
    with calibration(directory, seed) as (tokens, plan, _):
        tokens.run()
        found = {fate.name: tokens.importance(fate) for fate in plan.fates if fate.kind == "matmul" or fate.tied}
    assert all(array is not None and array.dtype == np.float32 for array in found.values())
    return {"lm_head" if name.endswith(("embed_tokens", "wte")) else name: array for name, array in found.items()}  # type: ignore[misc]


def hooked(directory: Path, seed: int = SEED) -> Moments:
    """Return the mean squared inputs that every linear of transformers' model meets, by our names."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    seen: Moments = {}

    def watch(name: str, module: Any) -> None:
        def note(module: Any, inputs: tuple[Any, ...]) -> None:
            seen[name] = np.square(inputs[0][0].detach().numpy().astype(np.float64)).mean(axis=0)

        module.register_forward_pre_hook(note)

    if model.config.model_type == "gpt2":
        for index, block in enumerate(model.transformer.h):
            start = f"transformer.h.{index}"
            watch(f"{start}.attn.qkv_proj", block.attn.c_attn)
            watch(f"{start}.attn.o_proj", block.attn.c_proj)
            watch(f"{start}.mlp.up_proj", block.mlp.c_fc)
            watch(f"{start}.mlp.down_proj", block.mlp.c_proj)
    else:
        for index, block in enumerate(model.model.layers):
            start = f"model.layers.{index}"
            watch(f"{start}.self_attn.qkv_proj", getattr(block.self_attn, "qkv_proj", None) or block.self_attn.q_proj)
            watch(f"{start}.self_attn.o_proj", block.self_attn.o_proj)
            watch(f"{start}.mlp.gate_up_proj", getattr(block.mlp, "gate_up_proj", None) or block.mlp.gate_proj)
            watch(f"{start}.mlp.down_proj", block.mlp.down_proj)
    watch("lm_head", model.lm_head)
    tokens = np.random.default_rng(seed).integers(0, VOCABULARY, TOKENS, dtype=np.int64)
    with torch.no_grad():
        model(input_ids=torch.tensor(tokens[None]))
    return seen


def apart(found: np.ndarray, moments: np.ndarray) -> float:
    """Return the largest relative difference of a channel, up to the power of two that importance is scaled by."""
    scaled = found.astype(np.float64) * 2.0 ** np.round(np.log2(moments.max() / found.max()))
    return float((np.abs(scaled - moments) / (moments + 1e-6 * moments.max())).max())


@pytest.fixture(scope="module")
def wide_model(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return tiny models whose sliding window, like a real model's, is wider than the tokens of the pass."""

    @cache
    def get(name: str) -> Path:
        if name in ("mistral", "phi3"):
            return save_tiny_model(name, tmp_path_factory.mktemp(f"wide-{name}"), sliding_window=4 * TOKENS)
        return tiny_model(name)

    return get


# ------------------------------------------------------------------------------------------------------- the moments


@pytest.mark.parametrize("name", EXACT)
def test_moments_are_those_of_transformers_own_run(name: str, wide_model: Callable[[str], Path]) -> None:
    found, expected = moments_of(wide_model(name)), hooked(wide_model(name))
    assert found.keys() == expected.keys() and len(found) == 4 * 3 + 1
    differences = {key: apart(found[key], expected[key]) for key in found}
    assert max(differences.values()) <= TOLERANCE, differences
    # Negative controls: other tokens, and another layer's inputs.
    other = hooked(wide_model(name), SEED + 1)
    assert min(apart(found[key], other[key]) for key in found) > 100 * TOLERANCE
    for key in found:
        neighbour = key.replace(".1.", ".2.")
        assert neighbour == key or apart(found[neighbour], expected[key]) > 100 * TOLERANCE, key


def test_left_out_rotary_scaling_changes_less_than_the_choice_of_tokens(tmp_path: Path) -> None:
    """LongRoPE turns slower and scales scores by a constant; its switch is beyond the tokens, as in real models."""
    switch = 2 * TOKENS
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.5 * i for i in range(8)],
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": switch,
        "factor": 256 / switch,
    }
    changes = {"rope_parameters": scaling, "original_max_position_embeddings": switch, "sliding_window": 256}
    model = save_tiny_model("phi3-longrope", tmp_path, **changes)
    found, expected, other = moments_of(model), hooked(model), hooked(model, SEED + 1)

    def away(first: np.ndarray, second: np.ndarray) -> float:
        return float(np.abs(first / first.mean() - second / second.mean()).mean())

    first = "model.layers.0.self_attn.qkv_proj"
    assert apart(found[first], expected[first]) <= TOLERANCE, "nothing has turned yet"
    for key in found:
        assert away(found[key], expected[key]) < 0.25, key
        assert away(found[key], expected[key]) < 0.5 * away(other[key], expected[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_the_largest_channel_lies_between_a_half_and_one(name: str, tiny_model: Callable[[str], Path]) -> None:
    for key, importance in moments_of(tiny_model(name)).items():
        assert 0.5 <= importance.max() < 1, key
        assert importance.min() >= 0 and importance.max() > 1.5 * importance.min(), key


def test_a_table_that_no_head_shares_has_no_importance(tiny_model: Callable[[str], Path]) -> None:
    with calibration(tiny_model("llama-untied")) as (tokens, plan, _):
        tokens.run()
        assert tokens.importance(plan.by_name["model.embed_tokens"]) is None
        assert tokens.importance(plan.by_name["lm_head"]) is not None
    with calibration(tiny_model("llama")) as (tokens, plan, _):
        tokens.run()
        assert tokens.importance(plan.by_name["model.embed_tokens"]) is not None


def test_a_context_shorter_than_the_tokens_is_not_exceeded(tmp_path: Path) -> None:
    model = save_tiny_model("gpt2", tmp_path, n_positions=TOKENS // 2)
    assert len(moments_of(model)) == 4 * 3 + 1


# ------------------------------------------------------------------------------------------------------- determinism


def same(first: Moments, second: Moments) -> bool:
    return all(first[key].tobytes() == second[key].tobytes() for key in first)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_seed_decides_to_the_bit(name: str, tiny_model: Callable[[str], Path]) -> None:
    first = moments_of(tiny_model(name))
    assert same(first, moments_of(tiny_model(name)))
    other = moments_of(tiny_model(name), SEED + 1)
    assert all(first[key].tobytes() != other[key].tobytes() for key in first)


def test_the_machines_cores_do_not_matter(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products may be the same bits on many threads, too: that only one is used is checked as well."""

    def blas_threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}

    used: list[int] = []
    original = RandomTokens.linear

    def watched(self: RandomTokens, name: str, inputs: np.ndarray) -> np.ndarray:
        used.extend(blas_threads())
        return original(self, name, inputs)

    monkeypatch.setattr(RandomTokens, "linear", watched)
    found = []
    for threads in (1, 4):
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            before = blas_threads()
            found.append(moments_of(tiny_model("llama")))
            assert blas_threads() == before, "the caller's threads are given back"
    assert max(before) > 1, "the control: there were threads to use"
    assert set(used) == {1}
    assert same(*found)


# ------------------------------------------------------------------------------------------------------------ damage


def changed(directory: Path, target: Path, tensor: str, edit: Callable[[np.ndarray], None]) -> Path:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors[tensor])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def put(index: Any, value: float) -> Callable[[np.ndarray], None]:
    def edit(array: np.ndarray) -> None:
        array[index] = value

    return edit


def write(directory: Path, place: Path) -> None:
    with (
        calibration(directory) as (tokens, plan, checkpoint),
        DataFile(place, plan.data_bytes) as data,
    ):

        def calibrate(stopped: threading.Event) -> RandomTokens:
            return RandomTokens(plan, checkpoint, load_family(checkpoint.config), SEED, stopped)

        weights.write_weights(plan, checkpoint, load_quantizer("rtn"), data, calibrate=calibrate, threads=2)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "tensor", "index", "where"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", (7, 3), "row 7"),
        ("llama", "model.layers.2.input_layernorm.weight", 5, "row 5"),
        ("llama", "model.norm.weight", 0, "row 0"),
        ("llama-untied", "model.layers.0.self_attn.k_proj.bias", 2, "row 2"),
        ("gpt2", "transformer.h.2.attn.c_attn.weight", (1, 130), "column 130"),
        ("gpt2", "transformer.wpe.weight", (20, 1), "row 20"),
    ],
)
def test_a_weight_that_is_no_number_is_named(
    name: str, tensor: str, index: Any, where: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = changed(tiny_model(name), tmp_path / "model", tensor, put(index, np.nan))
    with calibration(model) as (tokens, _, _), pytest.raises(SourceError, match="not a finite number: nan") as caught:
        tokens.run()
    assert caught.value.where == f"{tensor}, {where}"
    # Threads that wait for the pass end with it.
    with pytest.raises(SourceError, match="not a finite number: nan"):
        write(model, tmp_path / "data")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "tensor", "edit", "linear"),
    [
        ("llama", "model.layers.1.mlp.down_proj.weight", put(slice(None), 3e38), "model.layers.2.self_attn.qkv_proj"),
        ("llama", "model.layers.0.input_layernorm.weight", put(3, 1e25), "model.layers.0.self_attn.o_proj"),
        ("llama-untied", "model.norm.weight", put(slice(None), 3e38), "lm_head"),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", put((0, 0), 3e38), "transformer.h.1.mlp.down_proj"),
    ],
)
def test_activations_that_overflow_name_the_linear(
    name: str, tensor: str, edit: Callable[[np.ndarray], None], linear: str, tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    model = changed(tiny_model(name), tmp_path / "model", tensor, edit)
    with calibration(model) as (tokens, _, _), pytest.raises(SourceError, match="overflow float32") as caught:
        tokens.run()
    assert caught.value.where == linear
    assert "quantize.importance=none" in (caught.value.hint or "")
    with pytest.raises(SourceError, match="overflow float32"):
        write(model, tmp_path / "data")


def test_the_way_out_that_the_hint_names_exists(
    tiny_model: Callable[[str], Path], tmp_path: Path, fast_skeletons: None
) -> None:
    from compress.progress import Stages

    tensor = "model.layers.1.mlp.down_proj.weight"
    model = changed(tiny_model("llama"), tmp_path / "model", tensor, put((0, 0), 3e38))
    options = pipeline.ExportOptions(validate=False, threads=1)
    profile = load_profile("arm-int4", ("quantize.importance=none",))
    result = pipeline.export(pipeline.ModelReference(str(model)), profile, tmp_path / "out", options, Stages())
    assert (result.output / "model.onnx").is_file()


# ---------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.timeout(60)
def test_who_waits_and_who_runs_stop_when_told(tiny_model: Callable[[str], Path]) -> None:
    stopped = threading.Event()
    with calibration(tiny_model("llama"), stopped=stopped) as (tokens, plan, _):
        timer = threading.Timer(0.3, stopped.set)
        timer.start()
        with pytest.raises(Stopped):
            tokens.importance(plan.by_name["model.layers.0.mlp.down_proj"])
        timer.join()
        with pytest.raises(Stopped):
            tokens.run()


@pytest.mark.timeout(60)
def test_importance_waits_for_its_linear(tiny_model: Callable[[str], Path]) -> None:
    expected = moments_of(tiny_model("llama"))
    with calibration(tiny_model("llama")) as (tokens, plan, _):
        timer = threading.Timer(0.3, tokens.run)
        timer.start()
        found = tokens.importance(plan.by_name["model.embed_tokens"])
        timer.join()
    assert found is not None and found.tobytes() == expected["lm_head"].tobytes()
