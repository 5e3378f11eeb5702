"""Every family passes the same checks, found by its file; a new one adds a tiny model to ``tiny_models.py`` alone."""

from __future__ import annotations

import importlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from compress.contracts import Decoder, FloatArray, ForwardFamily, Slice, Structure, TensorInfo
from compress.errors import CompressError, SourceError, UnsupportedModelError
from compress.families import available_families, load_family
from compress.source import open_checkpoint
from tiny_models import ENCODERS, FAMILIES

Model = tuple[Mapping[str, Any], Mapping[str, TensorInfo]]


def model_type_of(directory: Path) -> str:
    return str(json.loads((directory / "config.json").read_text())["model_type"])


@pytest.fixture(params=[*FAMILIES, *ENCODERS])
def model(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Iterator[Model]:
    """Every family, an encoder's once a task."""
    with open_checkpoint(str(tiny_model(request.param))) as checkpoint:
        yield checkpoint.config, checkpoint.tensors()


@pytest.fixture(params=FAMILIES)
def writer(request: pytest.FixtureRequest, tiny_model: Callable[[str], Path]) -> Iterator[Model]:
    """Every decoder."""
    with open_checkpoint(str(tiny_model(request.param))) as checkpoint:
        yield checkpoint.config, checkpoint.tensors()


def describe(model: Model) -> Structure:
    return load_family(model[0]).describe(*model)


def decoder_of(model: Model) -> Decoder:
    structure = describe(model)
    assert isinstance(structure, Decoder)
    return structure


def slices(structure: Structure) -> list[Slice]:
    found = [piece for linear in structure.linears for piece in linear.bias]
    for linear in structure.linears:
        if not (linear.role == "head" and structure.tied):
            found += linear.weight
    return [*found, *(table.source for table in structure.tables), *(vector.source for vector in structure.vectors)]


def used(model: Model) -> dict[str, TensorInfo]:
    """Return the tensors that the model's task needs: a base model may have a pooler that embeddings do not."""
    names = {piece.tensor for piece in slices(describe(model))}
    return {name: info for name, info in model[1].items() if name in names}


@pytest.mark.parametrize("name", available_families())
def test_a_family_is_named_as_its_file(name: str) -> None:
    family = importlib.import_module(f"compress.families.{name}").FAMILY
    assert family.model_type == name
    assert family.architectures
    assert load_family({"model_type": name}) is family


def test_every_family_has_a_tiny_model(tiny_model: Callable[[str], Path]) -> None:
    assert {model_type_of(tiny_model(name)) for name in (*FAMILIES, *ENCODERS)} == set(available_families())


def test_sizes_agree_with_transformers(model: Model) -> None:
    from transformers import AutoConfig

    structure = describe(model)
    config = AutoConfig.for_model(**model[0])
    assert structure.model_type == config.model_type
    assert structure.layers == config.num_hidden_layers
    assert structure.hidden_size == config.hidden_size
    assert structure.heads == config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert structure.head_dim == head_dim
    assert structure.vocab_size == config.vocab_size
    assert structure.context_length == config.max_position_embeddings
    if isinstance(structure, Decoder):
        assert structure.kv_heads == (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        assert structure.tied == config.tie_word_embeddings


def test_every_element_of_the_checkpoint_is_used_once(model: Model) -> None:
    tensors = model[1]
    rows: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for piece in slices(describe(model)):
        shape = tensors[piece.tensor].shape
        length = shape[-1] if piece.transposed else shape[0]
        rows[piece.tensor].append((piece.start, length if piece.stop is None else piece.stop))
    assert {name for name in set(tensors) - set(rows) if not name.startswith("pooler.")} == set()
    for name, parts in rows.items():
        parts.sort()
        shape = tensors[name].shape
        assert parts[0][0] == 0 and parts[-1][1] in (shape[0], shape[-1]), name
        assert all(first[1] == second[0] for first, second in zip(parts, parts[1:], strict=False)), name


def test_names_are_unique(model: Model) -> None:
    structure = describe(model)
    names = [item.name for item in (*structure.linears, *structure.tables)]
    assert len(set(names)) == len(names)
    assert [table.role for table in structure.tables].count("token") == 1
    for linear in structure.linears:
        assert bool(linear.bias) == bool(linear.graph_biases)


def test_a_decoders_roles_make_sense(writer: Model) -> None:
    decoder = decoder_of(writer)
    assert [linear.role for linear in decoder.linears].count("head") == 1
    for linear in decoder.linears:
        assert (linear.layer is None) == (linear.role == "head")
    for layer in range(decoder.layers):
        roles = [linear.role for linear in decoder.linears if linear.layer == layer]
        assert roles in (["qkv", "attention_output", "gate_up", "down"], ["qkv", "attention_output", "up", "down"])


class Recorder:
    """Answers a forward pass with small numbers, notes what it asks for, and checks what it hands over."""

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        self._linears = {linear.name: linear for linear in decoder.linears}
        self._vectors = {vector.graph_name: vector.size for vector in decoder.vectors}
        self._tables = {table.name: table for table in decoder.tables}
        self._tokens, self._random = tokens, np.random.default_rng(0)
        self.linears: list[str] = []
        self.observed: list[str] = []
        self.vectors: list[str] = []
        self.tables: dict[str, list[int]] = {}

    def _made(self, *shape: int) -> FloatArray:
        return self._random.standard_normal(shape).astype(np.float32)

    def rows(self, table: str, indices: npt.NDArray[np.int64]) -> FloatArray:
        self.tables[table] = indices.tolist()
        assert indices.min() >= 0 and indices.max() < self._tables[table].rows
        return self._made(len(indices), self._tables[table].columns)

    def vector(self, name: str) -> FloatArray:
        self.vectors.append(name)
        return self._made(self._vectors[name])

    def linear(self, name: str, inputs: FloatArray) -> FloatArray:
        self.observe(name, inputs)
        self.observed.pop()
        return self._made(self._tokens, self._linears[name].out_features)

    def observe(self, name: str, inputs: FloatArray) -> None:
        assert inputs.shape == (self._tokens, self._linears[name].in_features), name
        assert inputs.dtype == np.float32, name
        self.linears.append(name)
        self.observed.append(name)


def test_a_forward_pass_meets_every_linear_once_in_the_plans_order(writer: Model) -> None:
    """Whoever waits for a linear's statistics would wait for ever for one that is left out."""
    decoder, family = decoder_of(writer), load_family(writer[0])
    tokens = np.array([5, 0, decoder.vocab_size - 1, 5, 77, 3, 2], np.int64)
    runner = Recorder(decoder, len(tokens))
    assert isinstance(family, ForwardFamily)
    family.forward(writer[0], decoder, tokens, runner)
    assert runner.linears == [linear.name for linear in decoder.linears]
    assert runner.observed == [linear.name for linear in decoder.linears if linear.role == "head"]
    assert Counter(runner.vectors) == Counter(vector.graph_name for vector in decoder.vectors)
    expected = {"token": tokens.tolist(), "position": list(range(len(tokens)))}
    assert runner.tables == {table.name: expected[table.role] for table in decoder.tables}


def test_a_missing_tensor_is_named(model: Model) -> None:
    config, tensors = model
    family = load_family(config)
    # GPT-2 tells its two spellings apart by this one; without it, others are missed first.
    for name in sorted(set(used(model)) - {"transformer.wte.weight"}):
        with pytest.raises(SourceError, match=r"lacks a tensor|has no [a-z-]+ head") as caught:
            family.describe(config, {key: info for key, info in tensors.items() if key != name})
        assert caught.value.where == name


def test_a_tensor_of_another_shape_is_named(model: Model) -> None:
    config, tensors = model
    family = load_family(config)
    for name, info in used(model).items():
        for shape in ((info.shape[0] + 1, *info.shape[1:]), (*info.shape[:-1], info.shape[-1] - 1), (*info.shape, 1)):
            with pytest.raises(SourceError, match=r"disagree|has \d outputs, config\.json names 3") as caught:
                family.describe(config, {**tensors, name: replace(info, shape=shape)})
            where = caught.value.where or ""
            assert name in where or where.endswith(("_proj", "c_attn", ".qkv")), (name, where)


def test_config_alone_is_enough(model: Model) -> None:
    config, _ = model
    assert load_family(config).describe(config, {}) == describe(model)


SIZES = ("num_", "n_", "hidden_s", "hidden_dim", "dim", "vocab", "intermediate", "embedding_s", "type_vocab", "max_pos")


def test_hostile_configs_are_refused_in_words(model: Model) -> None:
    config, tensors = model
    family = load_family(config)
    sizes = [key for key in config if key.startswith(SIZES)]
    assert len(sizes) >= 5
    for key in sizes:
        if config[key] is None:
            continue
        for value in (0, -1, 1.5, "64", True, 1 << 40, [], {}, float("nan")):
            with pytest.raises(CompressError, match=key):
                family.describe({**config, key: value}, tensors)
    for key in ("num_hidden_layers", "n_layer", "n_layers"):
        if key in config:
            with pytest.raises(SourceError, match="up to 1024"):
                family.describe({**config, key: 1 << 20}, {})


def test_what_has_no_implementation_is_refused(writer: Model) -> None:
    config, tensors = writer
    family = load_family(config)
    changes: list[dict[str, Any]] = (
        [{"activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}, {"tie_word_embeddings": False}]
        if config["model_type"] == "gpt2"
        else [
            {"hidden_act": "gelu"},
            {"rope_parameters": {**(config.get("rope_parameters") or {}), "rope_type": "dynamic"}},
            {"rope_parameters": {**(config.get("rope_parameters") or {}), "partial_rotary_factor": 0.5}},
            {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0}},
            {"partial_rotary_factor": 0.5},
            {"mlp_bias": True},
        ]
    )
    for change in changes:
        with pytest.raises(UnsupportedModelError, match="is not supported") as caught:
            family.describe({**config, **change}, tensors)
        assert caught.value.hint and "supported" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "what", "hint"),
    [
        ({}, "names no model_type", "transformers"),
        ({"model_type": 5}, "names no model_type", "transformers"),
        ({"model_type": "lama"}, "no family exports model_type 'lama'", "did you mean llama"),
        ({"model_type": "_gated"}, "no family exports", ", ".join(available_families())),
        ({"model_type": "../llama"}, "no family exports", "supported"),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, "is not exported", "LlamaForCausalLM"),
        ({"model_type": "llama", "architectures": 5}, "is not exported", "LlamaForCausalLM"),
        ({"model_type": "llama", "architectures": [["x"]]}, "is not exported", "LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_unknown_models_list_what_is_supported(config: dict[str, Any], what: str, hint: str) -> None:
    with pytest.raises(UnsupportedModelError, match=what) as caught:
        load_family(config)
    assert hint in (caught.value.hint or "")


def test_gpt2_of_the_hub_has_no_prefix(tiny_model: Callable[[str], Path]) -> None:
    with open_checkpoint(str(tiny_model("gpt2"))) as checkpoint:
        saved = checkpoint.tensors()
        hub = {name.removeprefix("transformer."): info for name, info in saved.items()}
        decoder = load_family(checkpoint.config).describe(checkpoint.config, hub)
        expected = load_family(checkpoint.config).describe(checkpoint.config, saved)
    assert {piece.tensor for piece in slices(decoder)} == set(hub)
    assert [linear.name for linear in decoder.linears] == [linear.name for linear in expected.linears]
