"""What every encoder family keeps on top of the family contract: the graph's names, labels, heads and spellings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress.contracts import Encoder, TensorInfo
from compress.errors import SourceError, UnsupportedModelError
from compress.families import load_family
from compress.families._bidirectional import BidirectionalFamily
from compress.source import open_checkpoint
from compress.tasks import TASKS
from tiny_models import ENCODER_STEMS, ENCODERS, LABELS, TASK_SUFFIXES

Model = tuple[Mapping[str, Any], Mapping[str, TensorInfo]]
CLASSIFIERS = tuple(name for name in ENCODERS if name.partition(":")[2] in LABELS)


@pytest.fixture
def read(tiny_model: Callable[[str], Path]) -> Callable[[str], Model]:
    def get(name: str) -> Model:
        with open_checkpoint(str(tiny_model(name))) as checkpoint:
            return checkpoint.config, checkpoint.tensors()

    return get


@pytest.fixture(params=ENCODERS)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def describe(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Encoder:
    structure = load_family(config).describe(config, tensors)
    assert isinstance(structure, Encoder)
    return structure


def without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def renamed(tensors: Mapping[str, TensorInfo], rename: Callable[[str], str]) -> dict[str, TensorInfo]:
    return {rename(name): replace(info, name=rename(name)) for name, info in tensors.items()}


# ----------------------------------------------------------------------------------------------------------- structure


def test_every_family_does_every_encoder_task() -> None:
    expected = {task.name for task in TASKS} - {"text-generation"}
    assert expected == set(TASK_SUFFIXES)
    for family in ENCODER_STEMS:
        found = load_family({"model_type": family})
        assert isinstance(found, BidirectionalFamily)
        assert set(found.architectures) >= {f"{ENCODER_STEMS[family]}{suffix}" for suffix in TASK_SUFFIXES.values()}


def test_structure_says_what_the_task_needs(name: str, read: Callable[[str], Model]) -> None:
    family, _, task = name.partition(":")
    encoder = describe(*read(name))
    assert encoder.task == task
    assert encoder.labels == LABELS.get(task, ())
    segments = () if family == "distilbert" else ("token_type_ids",)
    assert encoder.inputs == ("input_ids", "attention_mask", *segments)
    tables = ["token", "position", *(["type"] if segments else [])]
    assert sorted(table.role for table in encoder.tables) == sorted(tables)
    assert encoder.tied == (task == "fill-mask")
    outside = [linear.role for linear in encoder.linears if linear.layer is None]
    narrow = ["projection"] if family in ("albert", "electra") else []
    head = {
        "embedding": [],
        "text-classification": ["pooler", "classifier"],
        "token-classification": ["classifier"],
        "question-answering": ["classifier"],
        "fill-mask": ["projection", "head"],
    }[task]
    assert outside == narrow + head
    blocks = {linear.layer for linear in encoder.linears} - {None}
    assert blocks == ({0} if family == "albert" else {0, 1, 2}), "shared layers are described once"
    for block in blocks:
        roles = [linear.role for linear in encoder.linears if linear.layer == block]
        assert list(dict.fromkeys(roles)) == ["qkv", "attention_output", "up", "down"]


def test_graph_names_are_transformers_own(name: str, read: Callable[[str], Model]) -> None:
    """Every name the graph is searched for is a parameter of transformers' class, in the shape that is planned."""
    import torch
    import transformers

    config, tensors = read(name)
    with torch.device("meta"):
        settings = transformers.AutoConfig.for_model(**config)
        model = getattr(transformers, config["architectures"][0])(settings)
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters(remove_duplicate=False)}
    encoder = describe(config, tensors)
    seen: set[str] = set()
    for linear in encoder.linears:
        assert sum(shapes[part][0] for part in linear.graph_weights) == linear.out_features
        assert {shapes[part][1:] for part in linear.graph_weights} == {(linear.in_features,)}
        assert sum(shapes[part][0] for part in linear.graph_biases) == linear.out_features
        seen |= {*linear.graph_weights, *linear.graph_biases}
    for table in encoder.tables:
        assert shapes[table.graph_name] == (table.rows, table.columns)
        seen.add(table.graph_name)
    for vector in encoder.vectors:
        assert shapes[vector.graph_name] == (vector.size,)
        seen.add(vector.graph_name)
    tied = {"cls.predictions.decoder.", "vocab_projector.", "predictions.decoder.", "generator_lm_head."}
    left = {key for key in set(shapes) - seen if not key.startswith(("pooler.", *tied))}
    assert left == set(), "a parameter nobody plans would have no value in the graph"


# ------------------------------------------------------------------------------------------------------------ spellings


def test_a_checkpoint_may_lack_or_have_the_base_models_prefix(name: str, read: Callable[[str], Model]) -> None:
    config, tensors = read(name)
    family = name.partition(":")[0]
    expected = describe(config, tensors)
    heads = ("cls.", "classifier", "pre_classifier", "qa_outputs", "vocab_", "predictions.", "generator_")
    bare = renamed(tensors, lambda key: key.removeprefix(f"{family}."))
    full = renamed(bare, lambda key: key if key.startswith(heads) else f"{family}.{key}")
    assert bare.keys() & full.keys() == {key for key in bare if key.startswith(heads)}
    for spelling in (bare, full):
        found = describe(config, spelling)
        sources = {piece.tensor for linear in found.linears for piece in (*linear.weight, *linear.bias)}
        sources |= {table.source.tensor for table in found.tables} | {part.source.tensor for part in found.vectors}
        assert sources <= set(spelling)
        assert [linear.name for linear in found.linears] == [linear.name for linear in expected.linears]
        assert [linear.graph_weights for linear in found.linears] == [item.graph_weights for item in expected.linears]
        assert [part.graph_name for part in found.vectors] == [part.graph_name for part in expected.vectors]


def test_old_checkpoints_call_a_norms_parts_gamma_and_beta(name: str, read: Callable[[str], Model]) -> None:
    config, tensors = read(name)
    norms = {vector.source.tensor for vector in describe(config, tensors).vectors}

    def old(key: str) -> str:
        if key not in norms:
            return key
        return (
            key.removesuffix(".weight") + ".gamma" if key.endswith(".weight") else key.removesuffix(".bias") + ".beta"
        )

    found = describe(config, renamed(tensors, old))
    assert {vector.source.tensor for vector in found.vectors} == {old(key) for key in norms}
    for vector in found.vectors:
        assert vector.graph_name.endswith(".weight") == vector.source.tensor.endswith(".gamma")


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_labels_must_fit_the_head(name: str, read: Callable[[str], Model]) -> None:
    config, tensors = read(name)
    three = dict(enumerate(LABELS[name.partition(":")[2]]))
    bad: list[tuple[Any, str]] = [
        ({0: "a", 1: "b"}, "has 3 outputs, config.json names 2 labels"),
        ({**three, 3: "more"}, "has 3 outputs, config.json names 4 labels"),
        ({}, "id2label names no labels"),
        ("abc", "id2label names no labels"),
        ({"a": "x", "b": "y", "c": "z"}, "does not number its labels"),
        ({1: "x", 2: "y", 3: "z"}, "does not number its labels"),
        ({0: "x", 1: "y", 2: 5}, "does not number its labels"),
        ({0: "x", 1: "y", 2: ""}, "does not number its labels"),
        ({0: "x", "0": "w", 1: "y", 2: "z"}, "does not number its labels"),
        ({str(index): "x" for index in range(1 << 17)}, "id2label names no labels"),
    ]
    for labels, reason in bad:
        with pytest.raises(SourceError, match=reason) as caught:
            describe({**config, "id2label": labels}, tensors)
        assert caught.value.hint
    # Keys of JSON are text, and come in any order.
    shuffled = {str(index): three[index] for index in (2, 0, 1)}
    assert describe({**config, "id2label": shuffled}, tensors).labels == tuple(three.values())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_head_without_labels_is_refused_unless_it_is_transformers_default(
    name: str, read: Callable[[str], Model]
) -> None:
    config, tensors = read(name)
    bare = without(config, "id2label", "label2id")
    with pytest.raises(SourceError, match="no labels: config.json has no id2label") as caught:
        describe(bare, tensors)
    assert "id2label" in (caught.value.hint or "") and caught.value.where
    head = caught.value.where.removesuffix(".weight")
    for count, given in ((2, None), (2, 2), (1, 1), (1, None)):
        sizes = {f"{head}.weight": (count, 64), f"{head}.bias": (count,)}
        fewer = {key: replace(info, shape=sizes.get(key, info.shape)) for key, info in tensors.items()}
        wanted = bare if given is None else {**bare, "num_labels": given}
        assert describe(wanted, fewer).labels == ("LABEL_0", "LABEL_1")[:count]
    for count in (3, 0, -1, "2", [], 1 << 40):
        with pytest.raises(SourceError, match="no labels"):
            describe({**bare, "num_labels": count}, tensors)
    assert describe(bare, {}).labels == ("LABEL_0", "LABEL_1"), "a config alone cannot be checked"


# ---------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("task", [task for task in TASK_SUFFIXES if task != "embedding"])
@pytest.mark.parametrize("family", ENCODER_STEMS)
def test_a_checkpoint_without_the_tasks_head_is_refused(family: str, task: str, read: Callable[[str], Model]) -> None:
    _, base = read(f"{family}:embedding")
    config, tensors = read(f"{family}:{task}")
    assert describe(config, tensors).task == task
    with pytest.raises(SourceError, match=f"the checkpoint has no {task} head") as caught:
        describe(config, base)
    assert "--task embedding" in (caught.value.hint or "")


def test_a_head_may_lie_beside_what_the_task_needs(read: Callable[[str], Model]) -> None:
    """A fill-mask checkpoint's base model is enough for an embedding; its head stays where it is."""
    for family, stem in ENCODER_STEMS.items():
        config, tensors = read(f"{family}:fill-mask")
        encoder = describe({**config, "architectures": [f"{stem}Model"]}, tensors)
        assert encoder.task == "embedding" and not encoder.tied
        assert all(table.source.tensor.startswith(f"{family}.") for table in encoder.tables)
        assert not any(table.graph_name.startswith(f"{family}.") for table in encoder.tables)


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("family", "change"),
    [
        *((family, {"activation" if family == "distilbert" else "hidden_act": "relu"}) for family in ENCODER_STEMS),
        *((family, {"position_embedding_type": "relative_key"}) for family in ("bert", "albert", "electra")),
        *((family, {"is_decoder": True}) for family in ("bert", "electra")),
        *((family, {"add_cross_attention": True}) for family in ("bert", "electra")),
        ("albert", {"inner_group_num": 2}),
    ],
)
def test_options_without_an_implementation_are_refused(
    family: str, change: dict[str, Any], read: Callable[[str], Model]
) -> None:
    config, tensors = read(f"{family}:embedding")
    with pytest.raises(UnsupportedModelError, match=f"{next(iter(change))} = .* is not supported") as caught:
        describe({**config, **change}, tensors)
    assert "supported" in (caught.value.hint or "")


@pytest.mark.parametrize("family", ENCODER_STEMS)
def test_a_fill_mask_head_of_its_own_is_refused(family: str, read: Callable[[str], Model]) -> None:
    config, tensors = read(f"{family}:fill-mask")
    with pytest.raises(UnsupportedModelError, match="tie_word_embeddings = False"):
        describe({**config, "tie_word_embeddings": False}, tensors)
    embedding, base = read(f"{family}:embedding")
    describe({**embedding, "tie_word_embeddings": False}, base)  # nothing is tied there


def test_contradictory_sizes_are_refused(read: Callable[[str], Model]) -> None:
    for family in ENCODER_STEMS:
        config, tensors = read(f"{family}:embedding")
        heads = "n_heads" if family == "distilbert" else "num_attention_heads"
        with pytest.raises(SourceError, match="not a multiple of 5 attention heads"):
            describe({**config, heads: 5}, tensors)
    config, _ = read("albert:embedding")
    with pytest.raises(SourceError, match="num_hidden_groups is 4"):
        describe({**config, "num_hidden_groups": 4}, {})
    groups = describe({**config, "num_hidden_groups": 2}, {})
    assert {linear.layer for linear in groups.linears} - {None} == {0, 1} and groups.layers == 3


def test_an_encoder_without_an_architecture_is_an_embedding(read: Callable[[str], Model]) -> None:
    config, tensors = read("bert:embedding")
    assert describe(without(config, "architectures"), tensors).task == "embedding"
