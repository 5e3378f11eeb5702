"""Packed attention computes what the unpacked form does; padding decides nothing where ranges are found at run time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from prepared import Prepare, Prepared, operators

from compress.graph.rules import packed_attention
from compress.source import open_checkpoint
from plain_encoder import PlainEncoder, example
from tiny_models import PLAIN_INT8, VOCABULARY

#: Padding on the right, on the left (negative), none, and next to nothing but padding.
LENGTHS = ((13, 9, -7, 13), (1, -1, 4, 2))
PLAIN = 'graph.fusions=["attention", "gelu"]'
PACKED = 'graph.fusions=["attention", "packed_attention", "gelu"]'


def states(artifact: Path, lengths: tuple[int, ...]) -> np.ndarray:
    """Return hidden states of real tokens."""
    batch = example(lengths, 13, vocabulary=VOCABULARY)
    return PlainEncoder(artifact)(*batch)["last_hidden_state"][batch[1].astype(bool)]


@pytest.mark.parametrize("family", ["bert", "albert"])
@pytest.mark.parametrize(("profile", "most"), [("float", 1e-5), (PLAIN_INT8, 2e-5)], ids=["float", "int8"])
def test_packed_attention_computes_the_same(
    family: str, profile: str, most: float, tiny_artifact: Callable[..., Path]
) -> None:
    """In integers too: the same codes meet the same codes, and float32 rounds what comes of it."""
    packed, plain = (tiny_artifact(f"{family}:embedding", profile, fusions) for fusions in (PACKED, PLAIN))
    for lengths in LENGTHS:
        found, expected = states(packed, lengths), states(plain, lengths)
        assert np.abs(found - expected).max() < most
        other = states(plain, tuple(reversed(lengths)))
        assert other.shape == expected.shape and np.abs(found - other).max() > 1000 * most, "the negative control"


def scaled(factor: float) -> Callable[[ir.Graph], None]:
    """Change the scale of the second attention of a skeleton."""

    def edit(graph: ir.Graph) -> None:
        softmax = [node for node in graph if node.op_type == "Softmax"][1]
        masked = softmax.inputs[0].producer()  # type: ignore[union-attr]
        scale = masked.inputs[0].producer()  # type: ignore[union-attr]
        value = ir.convenience.get_const_tensor(scale.inputs[1]).numpy() * np.float32(factor)  # type: ignore[union-attr]
        new = ir.Value(name="changed_scale", const_value=ir.tensor(value, name="changed_scale"))
        graph.register_initializer(new)
        scale.replace_input_with(1, new)  # type: ignore[union-attr]

    return edit


@pytest.mark.parametrize("profile", ["float", PLAIN_INT8], ids=["float", "int8"])
def test_an_attention_with_another_scale_is_not_packed(profile: str, prepare: Prepare) -> None:
    """The packed operators of integers have no scale of their own."""
    ready: Prepared = prepare("bert:embedding", profile, PACKED)
    assert ready.edited(scaled(1.0)).build().fired["packed_attention"] == 3
    built = ready.edited(scaled(1.5)).build()
    assert built.fired["packed_attention"] == 2
    (left,) = [node for node in built.model.graph if node.op_type == "MultiHeadAttention"]
    assert left.attributes["scale"].as_float() == pytest.approx(1.5 * 16**-0.5)


def test_packing_leaves_other_splits_alone(prepare: Prepare) -> None:
    """A mask, a residual and three values of other products: nothing to pack."""
    built = prepare("bert:embedding", "float", PLAIN).build()
    assert packed_attention.apply(built.model.graph, 8) == 0, "another head size means another scale"
    assert operators(built.model.graph)["MultiHeadAttention"] == 3
    attention = next(node for node in built.model.graph if node.op_type == "MultiHeadAttention")
    query, key = attention.inputs[:2]
    attention.replace_input_with(0, key)
    attention.replace_input_with(1, query)
    assert packed_attention.apply(built.model.graph, 16) == 2, "key and query in each other's place"


# ----------------------------------------------------------------------------------------------------------- padding


@pytest.fixture(scope="module")
def outlier(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT whose word 300 has an embedding unlike all others, and whose first norm lets it through."""
    import shutil

    from safetensors.numpy import load_file, save_file

    directory = tmp_path_factory.mktemp("outlier") / "model"
    shutil.copytree(tiny_model("bert:embedding"), directory)
    weights = {name: value.copy() for name, value in load_file(directory / "model.safetensors").items()}
    weights["embeddings.word_embeddings.weight"][300] = 0
    weights["embeddings.word_embeddings.weight"][300, 11] = (
        1000  # one channel: eight standard deviations after the norm
    )
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(str(directory)) as checkpoint:
        assert checkpoint.read("embeddings.word_embeddings.weight", 300, 301)[0, 11] == 1000
    return directory


@pytest.mark.parametrize("fusions", [PLAIN, PACKED], ids=["plain", "packed"])
def test_a_token_under_the_mask_decides_nothing(
    fusions: str,
    outlier: Path,
    skeletons: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its states would stretch the one range that all inputs of a product share."""
    from compress import pipeline
    from compress.graph.rules import padding
    from compress.profile import load_profile
    from compress.progress import Stages

    ids, mask, segments = example((13, 9, -7), 13, vocabulary=VOCABULARY - 100)
    real, loud = mask.astype(bool), np.where(mask == 1, ids, 300)

    def moved(name: str) -> float:
        profile = load_profile(PLAIN_INT8, [fusions, "quantize.roles.embedding.bits=32"])
        options = pipeline.ExportOptions(validate=False, threads=1)
        pipeline.export(pipeline.ModelReference(str(outlier)), profile, tmp_path / name, options, Stages())
        encoder = PlainEncoder(tmp_path / name)
        quiet, other = (encoder(given, mask, segments) for given in (ids, loud))
        return float(np.abs(quiet["last_hidden_state"] - other["last_hidden_state"])[real].max())

    monkeypatch.setattr("compress.graph.skeleton.build_skeleton", skeletons.build)  # type: ignore[attr-defined]
    assert moved("with") == 0
    monkeypatch.setattr(padding, "apply", lambda *_: 0)
    assert moved("without") > 0.01, "the control: without the rule"


def test_padding_is_left_alone_where_there_is_nothing_to_find(prepare: Prepare) -> None:
    """No mask, no norm of that name, or no product that finds its range at run time."""
    from compress.graph.rules import padding
    from compress.graph.rules._edit import Weights

    ready = prepare("bert:embedding", PLAIN_INT8)
    assert ready.build().fired["padding"] == 1
    assert "padding" not in prepare("bert:embedding", "float").build().fired
    for norm, without, count in (("no.such.norm", False, 0), ("embeddings.LayerNorm", True, 0)):
        model = ir.load(ready.skeleton)
        weights = Weights(model.graph, ready.plan, ready.inline, "model.onnx.data")
        if without:
            mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
            mask.name = "other"
        before = [node.op_type for node in model.graph]
        assert padding.apply(model.graph, weights, norm) == count
        assert [node.op_type for node in model.graph] == before
