"""Plans of encoders: sizes that come true, tables a row a scale, tied heads, and integer schemes that cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress import pipeline
from compress.contracts import Scheme
from compress.errors import UsageError
from compress.planning import INLINE_LIMIT, Plan, make_plan
from compress.profile import load_profile
from compress.progress import Stages
from compress.show import plan_document, plan_text
from compress.source import open_checkpoint
from plain_encoder import PlainEncoder, example
from tiny_models import ENCODERS, PLAIN_INT8, VOCABULARY, save_tiny_model

WORDS = "embeddings.word_embeddings"
VARIANTS: dict[str, tuple[str, ...]] = {
    "float": ("float",),
    "int8": (PLAIN_INT8,),
    "blocks": (PLAIN_INT8, "quantize.activations=none", "quantize.block_size=32"),
    "int4": ("x86-int4",),
}


def plan_of(directory: Path, profile: str = PLAIN_INT8, *overrides: str, config_only: bool = False) -> Plan:
    recipe = load_profile(profile, overrides)
    with open_checkpoint(str(directory), config_only=config_only) as checkpoint:
        return make_plan(pipeline.describe(checkpoint), recipe, checkpoint)


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ENCODERS)
def test_predicted_bytes_come_true(
    name: str, variant: str, tiny_model: Callable[[str], Path], tiny_artifact: Callable[..., Path]
) -> None:
    plan = plan_of(tiny_model(name), *VARIANTS[variant])
    artifact = tiny_artifact(name, *VARIANTS[variant])
    graph, data = ((artifact / file).stat().st_size for file in ("model.onnx", "model.onnx.data"))
    assert data == plan.data_bytes
    assert plan.predicted_bytes == pytest.approx(graph + data, rel=0.01)
    assert plan.graph_bytes == pytest.approx(graph, rel=0.03)


def test_variants_and_tasks_differ(tiny_model: Callable[[str], Path]) -> None:
    """Negative control: a prediction that ignored the scheme, or the head, would miss."""
    sizes = {variant: plan_of(tiny_model("bert:fill-mask"), *VARIANTS[variant]).predicted_bytes for variant in VARIANTS}
    for first, second in zip(sorted(sizes.values()), sorted(sizes.values())[1:], strict=False):
        assert second > 1.03 * first, sizes
    heads = [plan_of(tiny_model(f"bert:{task}")).predicted_bytes for task in ("text-classification", "embedding")]
    assert heads[0] > 1.02 * heads[1]


@pytest.mark.parametrize("name", ENCODERS)
def test_config_alone_gives_the_same_plan(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copyfile(tiny_model(name) / "config.json", tmp_path / "config.json")
    from_config, from_headers = plan_of(tmp_path, config_only=True), plan_of(tiny_model(name))
    assert from_config.fates == from_headers.fates
    assert from_config.predicted_bytes == from_headers.predicted_bytes
    assert from_headers.source_bytes == 2 * from_config.source_bytes


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ENCODERS)
def test_places_are_aligned_and_apart(name: str, variant: str, tiny_model: Callable[[str], Path]) -> None:
    plan = plan_of(tiny_model(name), *VARIANTS[variant])
    tensors = [stored for fate in plan.fates for stored in fate.stored]
    assert len({stored.name for stored in tensors}) == len(tensors)
    end = 0
    for stored in tensors:
        assert (stored.offset is None) == (stored.nbytes < INLINE_LIMIT), stored.name
        if stored.offset is not None:
            assert stored.offset >= end and stored.offset % 64 == 0 and stored.offset - end < 64
            end = stored.offset + stored.nbytes
    assert end == plan.data_bytes


def test_shared_layers_cost_their_bytes_once(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    """ALBERT with four times the layers: no weight more, and only nodes in the graph."""
    config = json.loads((tiny_model("albert:embedding") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 12}))
    three, twelve = plan_of(tiny_model("albert:embedding")), plan_of(tmp_path, config_only=True)
    assert twelve.fates == three.fates and twelve.data_bytes == three.data_bytes
    assert three.graph_bytes < twelve.graph_bytes < 3 * three.graph_bytes


def test_the_document_names_every_tensor(tiny_model: Callable[[str], Path]) -> None:
    directory, recipe = tiny_model("distilbert:text-classification"), load_profile(PLAIN_INT8)
    with open_checkpoint(str(directory)) as checkpoint:
        plan = make_plan(pipeline.describe(checkpoint), recipe, checkpoint)
        document = plan_document(plan, recipe, checkpoint, 1)
        elements = sum(int(np.prod(info.shape)) for info in checkpoint.tensors().values())
    tensors = {tensor["name"]: tensor for tensor in document["tensors"]}
    assert document["parameters"] == elements == sum(int(np.prod(tensor["shape"])) for tensor in tensors.values())
    assert [tensors[f"distilbert.{WORDS}"][key] for key in ("role", "shape", "storage", "bytes")] == [
        "embedding", [VOCABULARY, 64], "int8 row sym", VOCABULARY * (64 + 4)
    ]  # fmt: skip
    position = tensors["distilbert.embeddings.position_embeddings"]
    assert (position["role"], position["storage"]) == ("position", "int8 row sym")
    up = tensors["distilbert.transformer.layer.0.ffn.lin1"]
    assert [up[key] for key in ("role", "shape", "storage", "bytes")] == [
        "up", [160, 64], "int8 row dynamic", 160 * (64 + 4)
    ]  # fmt: skip
    assert tensors["classifier.bias"] == {
        "name": "classifier.bias", "role": "vector", "shape": [3], "storage": "float32", "algorithm": None, "bytes": 12
    }  # fmt: skip
    assert sum(tensor["bytes"] for tensor in tensors.values()) <= document["predicted_bytes"]
    page = plan_text(document)
    for line in ("up                int8 row dynamic", "embedding         int8 row sym", "pooler"):
        assert line in page


# -------------------------------------------------------------------------------------------------------------- tables


def test_tables_have_a_scale_a_row_and_segments_stay_float(tiny_model: Callable[[str], Path]) -> None:
    plan = plan_of(tiny_model("electra:embedding"))
    words, segments = plan.by_name[WORDS], plan.by_name["embeddings.token_type_embeddings"]
    assert words.scheme == Scheme(8, 0, symmetric=True)
    assert [(part.name, part.dtype, part.shape) for part in words.stored] == [
        (f"{WORDS}.codes", "uint8", (VOCABULARY, 32)),
        (f"{WORDS}.scales", "float32", (VOCABULARY, 1)),
    ]
    assert segments.scheme is None and segments.nbytes == 2 * 32 * 4
    asymmetric = plan_of(
        tiny_model("electra:embedding"), PLAIN_INT8, "quantize.roles.embedding.symmetric=false",
        "quantize.roles.embedding.bits=4",
    ).by_name[WORDS]  # fmt: skip
    assert [(part.dtype, part.shape) for part in asymmetric.stored] == [
        ("uint8", (VOCABULARY, 16)), ("float32", (VOCABULARY, 1)), ("uint8", (VOCABULARY, 1))
    ]  # fmt: skip


def test_a_tied_head_shares_the_tables_bytes_where_a_block_divides_the_width(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    table, head = f"bert.{WORDS}", "cls.predictions.decoder"
    plan = plan_of(tiny_model("bert:fill-mask"))
    assert plan.by_name[table].tied and head not in plan.by_name
    assert plan.by_name[table].scheme == Scheme(8, 64, symmetric=True), "a head multiplies whole blocks"
    config = json.loads((tiny_model("bert:fill-mask") / "config.json").read_text())
    for width, block in ((312, 0), (320, 64), (384, 128), (768, 256), (304, 16)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": width}))
        plan = plan_of(tmp_path, config_only=True)
        words = plan.by_name[table]
        assert words.tied == (head not in plan.by_name) == bool(block), width
        assert words.scheme == Scheme(8, block, symmetric=True), width
    apart = plan_of_width(tmp_path, config, 312)
    codes = apart.by_name[head].part("codes")
    assert codes is not None and codes.shape == (VOCABULARY, 3 * 128), "three blocks of 128, the last one filled up"
    assert apart.data_bytes > VOCABULARY * (312 + 3 * 128)


def plan_of_width(directory: Path, config: dict[str, Any], width: int) -> Plan:
    (directory / "config.json").write_text(json.dumps({**config, "hidden_size": width}))
    return plan_of(directory, config_only=True)


@pytest.mark.usefixtures("fast_skeletons")
def test_a_table_that_no_block_divides_works_end_to_end(tmp_path: Path) -> None:
    """40 columns, as TinyBERT's 312: the table is looked up by rows, the head has its own bytes."""
    import torch
    import transformers

    changes = {"hidden_size": 40, "num_hidden_layers": 1, "intermediate_size": 96}
    model = save_tiny_model("bert:fill-mask", tmp_path / "model", **changes)
    plan = plan_of(model)
    assert "cls.predictions.decoder" in plan.by_name and not plan.by_name[f"bert.{WORDS}"].tied
    batch = example((13, 9), 13, vocabulary=VOCABULARY)
    found = {}
    for profile in ("float", PLAIN_INT8):
        output = tmp_path / Path(profile).stem
        options = pipeline.ExportOptions(validate=False, threads=1)
        pipeline.export(pipeline.ModelReference(str(model)), load_profile(profile), output, options, Stages())
        found[profile] = PlainEncoder(output)(*batch)["logits"]
    reference = transformers.BertForMaskedLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        ids, mask, segments = (torch.tensor(item) for item in batch)
        expected = reference(input_ids=ids, attention_mask=mask, token_type_ids=segments).logits.numpy()
    kept = batch[1].astype(bool)
    assert np.abs(found["float"] - expected)[kept].max() <= 2e-5
    error = (found[PLAIN_INT8] - expected)[kept]
    assert 1e-3 < np.sqrt((error**2).mean() / expected[kept].var()) < 0.05
    graph = sum((tmp_path / "plain-int8" / file).stat().st_size for file in ("model.onnx", "model.onnx.data"))
    assert plan.predicted_bytes == pytest.approx(graph, rel=0.01)


# -------------------------------------------------------------------------------------------------- impossible schemes


@pytest.mark.parametrize(
    ("overrides", "what", "hint"),
    [
        (("quantize.bits=4",), "take 7- or 8-bit weights, not 4", "activations to none"),
        (("quantize.bits=2",), "take 7- or 8-bit weights, not 2", "activations to none"),
        (("quantize.roles.up.bits=4",), "take 7- or 8-bit weights, not 4", "activations to none"),
        (("quantize.roles.up.activations=none", "quantize.roles.up.bits=7"), "7-bit weights have no kernel", "8"),
        (("quantize.roles.embedding.bits=7",), "7-bit weights have no kernel", "8"),
        (("quantize.roles.up.activations=none", "quantize.roles.up.block_size=0"), "block size 0", "16"),
        (("quantize.roles.head.block_size=0",), None, None),
        (("quantize.bits=7", "quantize.roles.embedding.bits=8"), None, None),
        (("quantize.roles.up.bits=32", "quantize.roles.down.bits=7"), None, None),
        (("quantize.roles.embedding.bits=4", "quantize.roles.position.bits=2"), None, None),
        (("quantize.roles.embedding.block_size=48",), "block size 48", "64"),
    ],
)
def test_impossible_schemes_are_refused(
    overrides: tuple[str, ...], what: str | None, hint: str | None, tiny_model: Callable[[str], Path]
) -> None:
    if what is None:  # possible: the table's control
        plan_of(tiny_model("bert:embedding"), PLAIN_INT8, *overrides)
        return
    with pytest.raises(UsageError, match=what) as caught:
        plan_of(tiny_model("bert:embedding"), PLAIN_INT8, *overrides)
    assert hint is not None and hint in (caught.value.hint or "")
    assert "profile plain-int8, role" in (caught.value.where or "")


def test_seven_bits_are_bytes_with_room(tiny_model: Callable[[str], Path]) -> None:
    roles = "quantize.roles.embedding.bits=8"
    seven = plan_of(tiny_model("bert:embedding"), PLAIN_INT8, "quantize.bits=7", roles)
    eight = plan_of(tiny_model("bert:embedding"), PLAIN_INT8)
    assert seven.data_bytes == eight.data_bytes
    up = seven.by_name["encoder.layer.0.intermediate.dense"]
    assert up.scheme == Scheme(7, 0, symmetric=True, activations="dynamic")
    assert [(part.dtype, part.shape) for part in up.stored] == [("int8", (64, 160)), ("float32", (160,))]
