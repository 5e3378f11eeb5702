"""The bytes stored of an encoder, against the weights of PyTorch's modules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress import pipeline, weights
from compress.errors import SourceError
from compress.package.writer import DataFile
from compress.planning import Plan, make_plan
from compress.profile import load_profile
from compress.quantize import load_quantizer
from compress.source import OpenCheckpoint, open_checkpoint
from stored_weights import Arrays, Stored
from tiny_models import ENCODERS, PLAIN_INT8

VARIANTS = {"float": ("float",), "int8": (PLAIN_INT8,), "int4": ("x86-int4",)}
PARTS = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))


def pytorch_weights(directory: Path) -> Arrays:
    """Return the state of transformers' own class, by name."""
    import torch
    import transformers

    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(directory, dtype=torch.float32)
    return {name: value.numpy() for name, value in model.state_dict().items()}


def expected(state: Arrays, name: str) -> np.ndarray:
    """Return the weight or vector that is stored under a planned name, ``[out, in]``."""
    for key in (name, f"{name}.weight"):
        if key in state:
            return state[key]
    stem, _, kind = name.removesuffix(".bias").rpartition(".")
    end = "bias" if name.endswith(".bias") else "weight"
    assert kind == "qkv", name
    parts = next(parts for parts in PARTS if f"{stem}.{parts[0]}.{end}" in state)
    return np.concatenate([state[f"{stem}.{part}.{end}"] for part in parts])


def write(checkpoint: OpenCheckpoint, plan: Plan, path: Path, *, threads: int = 1) -> Stored:
    with DataFile(path, plan.data_bytes) as data:
        inline = weights.write_weights(plan, checkpoint, load_quantizer("rtn"), data, calibrate=None, threads=threads)
    return Stored(plan, path.read_bytes(), inline)


def plan_of(checkpoint: OpenCheckpoint, *variant: str) -> Plan:
    return make_plan(pipeline.describe(checkpoint), load_profile(variant[0], variant[1:]), checkpoint)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ENCODERS)
def test_stored_bytes(name: str, variant: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    state = pytorch_weights(tiny_model(name))
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        plan = plan_of(checkpoint, *VARIANTS[variant])
        stored = write(checkpoint, plan, tmp_path / "data")
    seen: set[str] = set()
    for fate in plan.fates:
        weight = expected(state, fate.name)
        seen.add(fate.kind if fate.scheme is None else fate.scheme.activations)
        if fate.scheme is None:
            kept = stored[fate.stored[0].name]
            np.testing.assert_array_equal(kept, weight.T if fate.kind == "matmul" else weight, err_msg=fate.name)
            continue
        if fate.scheme.activations == "none":
            block = np.arange(fate.columns) // (fate.scheme.block_size or fate.columns)
            codes = stored.codes(fate) - stored.zero_points(fate)[:, block]
            restored = codes * stored.scales(fate)[:, block]
        else:
            restored = (stored[f"{fate.name}.codes"] * stored[f"{fate.name}.scales"].astype(np.float64)).T
        power = np.sum(weight.astype(np.float64) ** 2)
        assert np.sum((restored - weight) ** 2) / power < {8: 1e-4, 4: 0.02}[fate.scheme.bits], fate.name
        # Negative control: the rows of a neighbour.
        assert np.sum((np.roll(restored, 1, axis=0) - weight) ** 2) / power > 0.5, fate.name
    assert (
        seen
        == {
            "float": {"table", "matmul", "vector"},
            "int8": {"none", "dynamic", "vector", *(() if name.startswith("distil") else ("table",))},
            "int4": {"none", "vector", "table"},
        }[variant]
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["bert:text-classification", "albert:fill-mask"])
def test_threads_and_chunks_do_not_change_the_bytes(
    name: str, variant: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An integer product's codes are columns: a chunk of rows writes a piece of every one of them."""
    with open_checkpoint(str(tiny_model(name))) as checkpoint:
        plan = plan_of(checkpoint, *VARIANTS[variant])
        first = write(checkpoint, plan, tmp_path / "first")
        whole = (tmp_path / "first").read_bytes()
        assert len(whole) == plan.data_bytes and any(whole)
        for threads, chunk in ((2, 1 << 21), (5, 3001), (1, 1000)):
            monkeypatch.setattr(weights, "CHUNK_WEIGHTS", chunk)
            path = tmp_path / f"{threads}-{chunk}"
            again = write(checkpoint, plan, path, threads=threads)
            assert path.read_bytes() == whole, (threads, chunk)
            for stored in (item for fate in plan.fates for item in fate.stored if item.offset is None):
                np.testing.assert_array_equal(again[stored.name], first[stored.name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_that_are_no_numbers_are_refused(
    variant: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    for tensor, index in (
        ("encoder.layer.1.attention.self.key.weight", (5, 7)),
        ("embeddings.position_embeddings.weight", (63, 0)),
        ("embeddings.token_type_embeddings.weight", (1, 2)),
        ("encoder.layer.2.output.LayerNorm.bias", (4,)),
    ):
        target = tmp_path / tensor
        shutil.copytree(tiny_model("bert:embedding"), target)
        tensors = load_file(target / "model.safetensors")
        tensors[tensor][index] = np.nan
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        with open_checkpoint(str(target)) as checkpoint:
            plan = plan_of(checkpoint, *VARIANTS[variant])
            with pytest.raises(SourceError, match="not a finite number: nan") as caught:
                write(checkpoint, plan, tmp_path / f"{tensor}.data")
        assert tensor in (caught.value.where or "")
