"""The bytes that are stored, against weights taken from PyTorch's modules and quantized and packed the slow way."""

from __future__ import annotations

import shutil
import threading
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import pipeline, weights
from compress.calibrate.random_tokens import RandomTokens
from compress.contracts import Scheme
from compress.errors import SourceError
from compress.families import load_family
from compress.package.writer import DataFile
from compress.planning import Fate, Plan, make_plan
from compress.profile import load_profile
from compress.progress import Stages
from compress.quantize import load_quantizer
from compress.source import OpenCheckpoint, open_checkpoint
from stored_weights import Arrays, Stored
from tiny_models import FAMILIES

TABLE = "quantize.roles.embedding"
VARIANTS = {
    "float": ("float",),
    "int4": ("arm-int4",),
    "symmetric": ("arm-int4", "quantize.scale_format=float32", f"{TABLE}.symmetric=true", f"{TABLE}.block_size=32"),
    "asymmetric": ("x86-int4", "quantize.scale_format=float32", "quantize.block_size=16"),
    "padded": ("arm-int4", "quantize.block_size=128", f"{TABLE}.block_size=64", "quantize.scale_format=float32"),
    "int8": ("arm-int4", "quantize.bits=8", "quantize.scale_format=float16"),
    "int2": ("arm-int4", "quantize.bits=2", f"{TABLE}.block_size=64"),
}
Calibrate = Callable[[threading.Event], weights.Calibration]


# ----------------------------------------------------------------------------------------------- independent oracles


def pytorch_weights(directory: Path) -> Arrays:
    """Return every weight by its name in the artifact, linears as ``[out, in]``."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found: dict[str, Any] = {}
    if model.config.model_type == "gpt2":
        body = model.transformer
        found |= {"transformer.wte": body.wte.weight, "transformer.wpe": body.wpe.weight}
        for index, block in enumerate(body.h):
            start = f"transformer.h.{index}"
            parts = {
                "attn.qkv_proj": block.attn.c_attn, "attn.o_proj": block.attn.c_proj,
                "mlp.up_proj": block.mlp.c_fc, "mlp.down_proj": block.mlp.c_proj,
            }  # fmt: skip
            for name, module in parts.items():
                found |= {f"{start}.{name}": module.weight.T, f"{start}.{name}.bias": module.bias}
            for norm in ("ln_1", "ln_2"):
                module = getattr(block, norm)
                found |= {f"{start}.{norm}.weight": module.weight, f"{start}.{norm}.bias": module.bias}
        found |= {"transformer.ln_f.weight": body.ln_f.weight, "transformer.ln_f.bias": body.ln_f.bias}
    else:
        found["model.embed_tokens"] = model.model.embed_tokens.weight
        for index, block in enumerate(model.model.layers):
            start, attention, mlp = f"model.layers.{index}", block.self_attn, block.mlp
            packed = hasattr(attention, "qkv_proj")
            qkv = [attention.qkv_proj] if packed else [attention.q_proj, attention.k_proj, attention.v_proj]
            gate_up = [mlp.gate_up_proj] if packed else [mlp.gate_proj, mlp.up_proj]
            stacks = {
                "self_attn.qkv_proj": qkv, "self_attn.o_proj": [attention.o_proj],
                "mlp.gate_up_proj": gate_up, "mlp.down_proj": [mlp.down_proj],
            }  # fmt: skip
            for name, modules in stacks.items():
                found[f"{start}.{name}"] = torch.cat([module.weight for module in modules])
                if modules[0].bias is not None:
                    found[f"{start}.{name}.bias"] = torch.cat([module.bias for module in modules])
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{start}.{norm}.weight"] = getattr(block, norm).weight
        found["model.norm.weight"] = model.model.norm.weight
        if not model.config.tie_word_embeddings:
            found["lm_head"] = model.lm_head.weight
    return {name: np.ascontiguousarray(value.detach().numpy()) for name, value in found.items()}


# ---------------------------------------------------------------------------------------------------------- fixtures


class Known:
    """Importance that differs from weight to weight and leaves a table alone that no head shares."""

    def __init__(self, stopped: threading.Event) -> None:
        self.ran = False

    def run(self) -> None:
        self.ran = True

    def importance(self, fate: Fate) -> np.ndarray | None:
        if fate.kind == "table" and not fate.tied:
            return None
        random = np.random.default_rng(zlib.crc32(fate.name.encode()))
        return random.uniform(0.2, 1, fate.columns).astype(np.float32)


def write(
    checkpoint: OpenCheckpoint,
    plan: Plan,
    path: Path,
    *,
    calibrate: Calibrate | None = None,
    threads: int = 1,
    progress: weights.Progress | None = None,
) -> Stored:
    with DataFile(path, plan.data_bytes) as data:
        inline = weights.write_weights(
            plan, checkpoint, load_quantizer("rtn"), data, calibrate=calibrate, threads=threads, progress=progress
        )
    return Stored(plan, path.read_bytes(), inline)


def random_tokens(plan: Plan, checkpoint: OpenCheckpoint) -> Calibrate:
    return partial(RandomTokens, plan, checkpoint, load_family(checkpoint.config), 0)


def plan_of(checkpoint: OpenCheckpoint, profile: str, *overrides: str) -> Plan:
    return make_plan(pipeline.describe(checkpoint), load_profile(profile, overrides), checkpoint)


@pytest.fixture(scope="module")
def oracle(tiny_model: Callable[[str], Path]) -> Callable[[str], Arrays]:
    return cache(lambda name: pytorch_weights(tiny_model(name)))


# ------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_stored_bytes(
    name: str, variant: str, tiny_model: Callable[[str], Path], tmp_path: Path, oracle: Callable[[str], Arrays]
) -> None:
    source = oracle(name)
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        plan = plan_of(checkpoint, *VARIANTS[variant])
        stored = write(checkpoint, plan, tmp_path / "data", calibrate=Known)
    assert {fate.name for fate in plan.fates if fate.reads} == set(source)
    for fate in plan.fates:
        if not fate.reads:
            continue
        weight = source[fate.name]
        if fate.scheme is None:
            kept = stored[fate.stored[0].name]
            np.testing.assert_array_equal(kept, weight.T if fate.kind == "matmul" else weight, err_msg=fate.name)
            continue
        check_codes(stored, fate, fate.scheme, weight, Known(threading.Event()).importance(fate))


def check_codes(stored: Stored, fate: Fate, scheme: Scheme, weight: np.ndarray, importance: np.ndarray | None) -> None:
    codes, scales, zero_points = stored.codes(fate), stored.scales(fate), stored.zero_points(fate)
    result = load_quantizer("rtn").quantize(weight, scheme, importance, scale_format=stored.plan.scale_format)
    np.testing.assert_array_equal(codes, result.codes[:, : fate.columns], err_msg=fate.name)
    np.testing.assert_array_equal(scales.astype(np.float32), result.scales, err_msg=fate.name)
    if result.zero_points is not None:
        np.testing.assert_array_equal(zero_points, result.zero_points, err_msg=fate.name)
    # And without trusting the quantizer: a code is the nearest there is, unless it is the last one of its side.
    block = np.arange(fate.columns) // scheme.block_size
    step, middle = scales[:, block], zero_points[:, block]
    error = weight.astype(np.float64) / np.where(step == 0, 1, step) - (codes - middle)
    most = (1 << scheme.bits) - 1
    assert np.abs(error[(codes > 0) & (codes < most)]).max(initial=0) <= 0.5 + 1e-4, fate.name
    assert error[codes == most].min(initial=0) >= -0.5 - 1e-4, fate.name
    assert error[codes == 0].max(initial=0) <= 0.5 + 1e-4, fate.name
    restored = (codes - middle) * step
    lost = np.sum((restored - weight) ** 2) / np.sum(weight.astype(np.float64) ** 2)
    assert lost < {8: 1e-4, 4: 0.02, 2: 0.25}[scheme.bits], fate.name


def test_the_oracle_notices_a_swapped_projection_and_another_importance(
    tiny_model: Callable[[str], Path], tmp_path: Path, oracle: Callable[[str], Arrays]
) -> None:
    source = oracle("llama")
    with open_checkpoint(str(tiny_model("llama"))) as checkpoint:
        plan = plan_of(checkpoint, "arm-int4")
        stored = write(checkpoint, plan, tmp_path / "data", calibrate=Known)
    fate = plan.by_name["model.layers.0.mlp.gate_up_proj"]
    assert fate.scheme is not None
    known = Known(threading.Event())
    importance = known.importance(fate)
    assert importance is not None
    check_codes(stored, fate, fate.scheme, source[fate.name], importance)
    swapped = np.roll(source[fate.name], fate.rows // 2, axis=0)
    neighbour = known.importance(plan.by_name["model.layers.1.mlp.gate_up_proj"])
    for weight, other in ((swapped, importance), (source[fate.name], None), (source[fate.name], neighbour)):
        with pytest.raises(AssertionError):
            check_codes(stored, fate, fate.scheme, weight, other)


@pytest.mark.parametrize("name", ["llama", "llama-untied", "gpt2"])
def test_importance_from_random_tokens_reaches_every_weight(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path, oracle: Callable[[str], Arrays]
) -> None:
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        plan = plan_of(checkpoint, "arm-int4")
        stored = write(checkpoint, plan, tmp_path / "data", calibrate=random_tokens(plan, checkpoint), threads=3)
        alone = RandomTokens(plan, checkpoint, load_family(checkpoint.config), 0, threading.Event())
        alone.run()
    for fate in plan.fates:
        if fate.scheme is not None:
            check_codes(stored, fate, fate.scheme, oracle(name)[fate.name], alone.importance(fate))


def test_int8_row_scales_are_stored(tiny_model: Callable[[str], Path]) -> None:
    with open_checkpoint(str(tiny_model("llama"))) as checkpoint:
        plan = plan_of(checkpoint, *VARIANTS["int2"])
    kinds = {item.name.rpartition(".")[2]: item.dtype for fate in plan.fates if fate.scheme for item in fate.stored}
    assert kinds == {"codes": "uint8", "scales": "int8", "row_scales": "float32", "zero_points": "uint8"}


@pytest.mark.parametrize("variant", ["float", "asymmetric", "int2"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_threads_and_chunks_do_not_change_the_bytes(
    name: str, variant: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        plan = plan_of(checkpoint, *VARIANTS[variant])
        calibrate = random_tokens(plan, checkpoint)
        write(checkpoint, plan, tmp_path / "first", calibrate=calibrate)
        expected = (tmp_path / "first").read_bytes()
        assert len(expected) == plan.data_bytes and any(expected)
        for threads, chunk in ((2, 1 << 21), (5, 1 << 21), (1, 1000), (5, 3001), (1, 1 << 30)):
            monkeypatch.setattr(weights, "CHUNK_WEIGHTS", chunk)
            path = tmp_path / f"{threads}-{chunk}"
            write(checkpoint, plan, path, calibrate=calibrate, threads=threads)
            assert path.read_bytes() == expected, (threads, chunk)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_progress_ends_at_the_total(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CHUNK_WEIGHTS", 4096)
    seen: list[tuple[int, int]] = []
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        plan = plan_of(checkpoint, "arm-int4")
        write(
            checkpoint,
            plan,
            tmp_path / "data",
            calibrate=random_tokens(plan, checkpoint),
            progress=lambda done, total: seen.append((done, total)),
        )
    done = [amount for amount, _ in seen]
    assert done == sorted(done) and len(set(done)) > 20
    assert {total for _, total in seen} == {plan.weight_count}
    assert done[-1] == plan.weight_count


# -------------------------------------------------------------------------------------------------------- not a number


def damaged(directory: Path, target: Path, tensor: str, index: tuple[int, ...], value: float) -> Path:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    tensors[tensor][index] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("profile", ["float", "arm-int4"])
@pytest.mark.parametrize(
    ("name", "tensor", "index", "where"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", (7, 3), "row 7"),
        ("llama", "model.embed_tokens.weight", (383, 63), "row 383"),
        ("llama", "model.layers.2.input_layernorm.weight", (5,), "row 5"),
        ("llama-untied", "model.layers.0.self_attn.k_proj.bias", (2,), "row 2"),
        ("phi3", "model.layers.0.self_attn.qkv_proj.weight", (127, 0), "row 127"),
        ("gpt2", "transformer.h.2.attn.c_attn.weight", (1, 130), "column 130"),
        ("gpt2", "transformer.wpe.weight", (200, 1), "row 200"),
    ],
)
@pytest.mark.usefixtures("fast_skeletons")
def test_a_weight_that_is_no_number_is_named(
    name: str, tensor: str, index: tuple[int, ...], where: str, profile: str, tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    for value, text in ((np.nan, "nan"), (-np.inf, "-inf")):
        model = damaged(tiny_model(name), tmp_path / f"model{text}", tensor, index, value)
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(SourceError, match=f"not a finite number: {text}") as caught:
            pipeline.export(
                pipeline.ModelReference(str(model)),
                load_profile(profile),
                tmp_path / "out" / "artifact",
                pipeline.ExportOptions(validate=False, threads=2),
                Stages(),
            )
        assert caught.value.where == f"{tensor}, {where}"
        assert caught.value.hint
        assert list((tmp_path / "out").iterdir()) == []


def test_the_first_error_stops_the_rest(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = damaged(tiny_model("llama"), tmp_path / "model", "model.layers.0.mlp.down_proj.weight", (0, 0), np.inf)
    monkeypatch.setattr(weights, "CHUNK_WEIGHTS", 256)
    with open_checkpoint(str(model)) as checkpoint:
        plan = plan_of(checkpoint, "arm-int4")
        tasks = len(list(weights._tasks(plan, None)))
        read: list[str] = []
        original = checkpoint.read
        monkeypatch.setattr(checkpoint, "read", lambda name, *rows: (read.append(name), original(name, *rows))[1])
        with pytest.raises(SourceError), DataFile(tmp_path / "data", plan.data_bytes) as data:
            weights.write_weights(plan, checkpoint, load_quantizer("rtn"), data, calibrate=None, threads=2)
    # The embedding and one block lie before it, two blocks behind.
    assert "model.layers.0.self_attn.q_proj.weight" in read
    assert not any(name.startswith("model.layers.2") for name in read)
    assert len(read) < tasks / 2


def test_huge_and_tiny_finite_weights_pass(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    tensor = "model.layers.0.mlp.down_proj.weight"
    for value in (3e38, 1e-45, 0.0):
        model = damaged(tiny_model("llama"), tmp_path / f"model{value}", tensor, (0, 0), value)
        with open_checkpoint(str(model)) as checkpoint:
            plan = plan_of(checkpoint, "arm-int4")
            stored = write(checkpoint, plan, tmp_path / f"data{value}")
        fate = plan.by_name[tensor.removesuffix(".weight")]
        assert np.isfinite(stored.scales(fate)).all()
        restored = (stored.codes(fate)[0, 0] - 8) * stored.scales(fate)[0, 0]
        assert restored == pytest.approx(value, rel=0.2, abs=0.2)


class OneChannel(Known):
    """Importance of one channel only, as far from the others' as float32 goes."""

    def importance(self, fate: Fate) -> np.ndarray:
        values = np.full(fate.columns, 1e-45, np.float32)
        values[3] = 1
        return values


def test_an_outlier_channel_does_not_upset_the_search(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with open_checkpoint(str(tiny_model("llama"))) as checkpoint:
        plan = plan_of(checkpoint, "arm-int4", "quantize.scale_format=float32")
        stored = write(checkpoint, plan, tmp_path / "data", calibrate=OneChannel)
        weight = checkpoint.read("model.layers.0.self_attn.q_proj.weight")
    fate = plan.by_name["model.layers.0.self_attn.qkv_proj"]
    restored = (stored.codes(fate) - 8) * np.repeat(stored.scales(fate), 32, axis=1)
    assert np.isfinite(restored).all()
    # The one channel that matters is met almost exactly, wherever it is not nearly 0.
    assert np.median(np.abs(restored[:64, 3] - weight[:, 3])) < 1e-4 * np.abs(weight[:, 3]).max()
