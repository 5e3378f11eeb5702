"""Amounts: shares and numbers, the nearest that works, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.contracts import PrunableFamily
from compress.errors import CompressError, UsageError
from compress.families import load_family
from compress.profile import load_profile
from compress.prune.amounts import Amounts, Asked, full, resolve, text_tokens, width_step
from compress.prune.cuts import Kept, block_cuts, block_prefix, renumbered
from compress.source import open_checkpoint


@pytest.fixture
def described(tiny_model: Callable[[str], Path]) -> Callable[[str], Any]:
    def get(name: str) -> Any:
        with open_checkpoint(str(tiny_model(name))) as checkpoint:
            family = load_family(checkpoint.config)
            assert isinstance(family, PrunableFamily)
            return family.describe(checkpoint.config, checkpoint.tensors()), family.sizes, checkpoint.tensors()

    return get


def test_an_encoder_is_pruned_on_more_text_unless_told_otherwise(described: Callable[[str], Any]) -> None:
    profiles = load_profile("x86-int8"), load_profile("x86-int8", ["prune.tokens=500"])
    for name, expected in (("llama", profiles[0].calibration.tokens), ("bert:embedding", 32_768)):
        structure = described(name)[0]
        assert [text_tokens(structure, profile) for profile in profiles] == [expected, 500]
    assert profiles[0].calibration.tokens < 32_768


def test_shares_and_numbers_are_rounded_to_what_works(described: Callable[[str], Any]) -> None:
    structure, sizes, _ = described("llama")  # 160 neurons, 4 heads in 2 groups, 3 blocks
    assert width_step(160) == 32 and width_step(1536) == 64 and width_step(33) == 1
    assert full(structure) == Amounts(160, 4, 2, 3)
    assert resolve(structure, sizes, Asked(ffn=0.25)) == Amounts(128, 4, 2, 3)
    assert resolve(structure, sizes, Asked(ffn=50)) == Amounts(96, 4, 2, 3)
    assert resolve(structure, sizes, Asked(ffn=0.99)) == Amounts(32, 4, 2, 3)
    assert resolve(structure, sizes, Asked(kv_groups=0.5)) == Amounts(160, 2, 1, 3)
    assert resolve(structure, sizes, Asked(heads=0.5, layers=1)) == Amounts(160, 2, 2, 2)


def test_heads_stay_a_number_that_transformers_takes(described: Callable[[str], Any]) -> None:
    """LlamaConfig refuses three heads of a hidden size of 64."""
    structure, sizes, _ = described("llama")
    assert sizes.heads_divide
    assert 64 % resolve(structure, sizes, Asked(heads=0.3)).heads == 0
    encoder, sizes, _ = described("bert:embedding")
    assert not sizes.heads_divide and resolve(encoder, sizes, Asked(heads=1)).heads == 3


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("llama", Asked(layers=4), "4 blocks are to be removed, the model has 3"),
        ("llama", Asked(layers=3), "leaves nothing"),
        ("llama", Asked(kv_groups=3), "the model has 2"),
        ("llama", Asked(ffn=161), "the model has 160"),
        ("llama", Asked(ffn=1.5), "neither a share below 1 nor a number"),
        ("llama", Asked(heads=9), "the model has 4"),
        ("llama", Asked(heads=0.9), "leaves no query head in a group of 2"),
        ("bert:embedding", Asked(heads=5), "5 heads are to be removed, the model has 4"),
        ("bert:embedding", Asked(kv_groups=1), "no key-value groups"),
        ("gpt2", Asked(kv_groups=1), "no key-value groups"),
        ("phi3-longrope", Asked(heads=1), "LongRoPE"),
    ],
)
def test_what_cannot_be_is_refused(described: Callable[[str], Any], name: str, asked: Asked, message: str) -> None:
    structure, sizes, _ = described(name)
    with pytest.raises(UsageError, match=message) as error:
        resolve(structure, sizes, asked)
    assert isinstance(error.value, CompressError) and error.value.where


def test_cuts_name_rows_and_columns(described: Callable[[str], Any]) -> None:
    structure, _, tensors = described("phi3")  # query, key and value in one tensor, gate and up in another
    kept = Kept(np.array([0, 159]), np.array([2, 3]), np.array([1]))
    cuts = block_cuts(structure, 1, kept, leave_zeros=False)
    prefix = block_prefix(structure, 1)
    assert prefix == "model.layers.1."
    gate_up = cuts[f"{prefix}mlp.gate_up_proj.weight"]
    assert gate_up.rows is not None and gate_up.rows.tolist() == [0, 159, 160, 319]
    down = cuts[f"{prefix}mlp.down_proj.weight"]
    assert down.columns is not None and down.columns.tolist() == [0, 159]
    qkv = cuts[f"{prefix}self_attn.qkv_proj.weight"]
    assert qkv.rows is not None and qkv.rows.tolist() == [*range(32, 64), *range(80, 96), *range(112, 128)]
    array = np.arange(np.prod(tensors[f"{prefix}mlp.down_proj.weight"].shape)).reshape(64, 160).astype(np.float32)
    assert np.array_equal(down.apply(array), array[:, [0, 159]]) and down.shape((64, 160)) == (64, 2)


def test_heads_that_a_config_cannot_leave_out_become_zeros(described: Callable[[str], Any]) -> None:
    structure, _, tensors = described("gpt2")  # one tensor [in, 3 * 64] for query, key and value
    cuts = block_cuts(structure, 0, Kept(heads=np.array([1, 3])), leave_zeros=True)
    name = next(key for key in cuts if key.endswith("c_attn.weight"))
    array = np.random.default_rng(0).normal(size=tensors[name].shape).astype(np.float32)
    found = cuts[name].apply(array)
    assert found.shape == array.shape == cuts[name].shape(array.shape)
    for part in range(3):
        start = 64 * part
        assert np.array_equal(found[:, start : start + 16], array[:, start + 16 : start + 32])
        assert np.array_equal(found[:, start + 16 : start + 32], array[:, start + 48 : start + 64])
        assert not found[:, start + 32 : start + 64].any()


def test_blocks_that_stay_are_counted_anew(described: Callable[[str], Any]) -> None:
    structure, _, tensors = described("bert:embedding")
    names = renumbered(list(tensors), structure, (0, 2))
    assert names["encoder.layer.2.output.dense.bias"] == "encoder.layer.1.output.dense.bias"
    assert not any(name.startswith("encoder.layer.1.") for name in names)
    assert names["embeddings.LayerNorm.weight"] == "embeddings.LayerNorm.weight"
    assert len(set(names.values())) == len(names)
