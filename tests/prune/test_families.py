"""Every family: what is left is an ordinary model, equal to the source with the removed parts silenced."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from compress import pipeline, pruning
from compress.contracts import KEPT_HEADS, Decoder, Structure
from compress.families import load_family
from compress.profile import load_profile
from compress.progress import Stages
from compress.source import open_checkpoint
from plain_decoder import PlainDecoder
from plain_encoder import PlainEncoder
from same_process import prune_here

SMALL = ("calibration.tokens=2048", "calibration.window=64")
DECODERS = ("llama", "llama-untied", "mistral", "phi3", "phi3-longrope", "gpt2")
ENCODERS = ("bert:embedding", "distilbert:text-classification", "albert:embedding", "electra:fill-mask")
#: Sizes of the tiny models: 160 neurons (GPT-2: 256), 4 heads (2 groups in the Llama shape), 3 blocks.
WIDTH = ("prune.ffn=0.4",)
Export = Callable[..., Path]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, fast_skeletons: None) -> None:
    prune_here(monkeypatch)


def amounts_of(name: str) -> tuple[str, ...]:
    if name == "gpt2" or ":" in name:
        return (*WIDTH, "prune.heads=0.25")
    if name == "phi3-longrope":
        return WIDTH
    return (*WIDTH, "prune.heads=0.5") if name in ("phi3", "llama-untied") else (*WIDTH, "prune.kv_groups=1")


def pruned(source: Path, output: Path, *overrides: str) -> dict[str, Any]:
    profile = load_profile("float", (*SMALL, *overrides))
    options = pipeline.ExportOptions(validate=False, threads=1)
    return dict(pruning.prune_to(pipeline.ModelReference(str(source)), profile, output, options, Stages()))


def loaded(directory: Path) -> Any:
    config = json.loads((directory / "config.json").read_text())
    model, found = getattr(transformers, config["architectures"][0]).from_pretrained(
        directory, output_loading_info=True
    )
    wrong = {key: names for key, names in found.items() if key != "error_msgs" and names}
    assert not wrong, wrong
    return model.eval()


def answers(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=ids)[0]
    return result


def silenced(source: Path, smaller: Path, record: dict[str, Any]) -> Any:
    """Return the source with zeros for what a pruned checkpoint lacks, found by comparing weights alone."""
    model, config = loaded(source), json.loads((source / "config.json").read_text())
    with open_checkpoint(str(source)) as checkpoint, open_checkpoint(str(smaller)) as less:
        structure = load_family(config).describe(checkpoint.config, checkpoint.tensors())
        left = load_family(less.config).describe(less.config, less.tensors())
        for linear, fewer in zip(structure.linears, left.linears, strict=True):
            if linear.role in ("down", "attention_output"):
                _silence(model, checkpoint, less, linear, fewer, structure)
    return model


def _silence(model: Any, checkpoint: Any, less: Any, linear: Any, fewer: Any, structure: Structure) -> None:
    before, after = (source.read(item.weight[0].tensor) for source, item in ((checkpoint, linear), (less, fewer)))
    transposed = linear.weight[0].transposed
    before, after = (before.T, after.T) if transposed else (before, after)
    stay = {column.tobytes() for column in after.T if column.any()}
    gone = [index for index, column in enumerate(before.T) if np.ascontiguousarray(column).tobytes() not in stay]
    name = linear.weight[0].tensor
    parameters = dict(model.named_parameters())
    weight = next(value for key, value in parameters.items() if key.endswith(name) or name.endswith(key))
    with torch.no_grad():
        (weight.T if transposed else weight)[:, gone] = 0


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_what_is_left_is_the_source_with_silent_parts(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tiny_model(name)
    record = pruned(source, tmp_path / "less", *amounts_of(name), "prune.recover=none", "prune.algorithm=magnitude")
    assert record["after"]["inner"] < record["before"]["inner"]
    assert (record["after"]["heads"] < record["before"]["heads"]) == (name != "phi3-longrope")
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, 300, (2, 20)))
    less = answers(loaded(tmp_path / "less"), ids)
    silent = answers(silenced(source, tmp_path / "less", record), ids)
    scale = silent.std()
    assert (less - silent).abs().max() <= 1e-5 * max(1.0, float(silent.abs().max()))
    # The negative control: what was removed did something.
    assert (less - answers(loaded(source), ids)).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_the_graph_of_what_is_left_equals_pytorch(name: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Pruned, fitted, exported: heads that a config cannot leave out are not in the graph."""
    overrides = (*SMALL, *amounts_of(name), "graph.pooling=none")
    source, output = tiny_model(name), tmp_path / "artifact"
    pruned(source, tmp_path / "less", *overrides)
    pipeline.export(
        pipeline.ModelReference(str(tmp_path / "less")),
        load_profile("float", overrides[len(SMALL) + len(amounts_of(name)) :]),
        output,
        pipeline.ExportOptions(validate=False, threads=1),
        Stages(),
    )
    ids = np.random.default_rng(1).integers(5, 300, (2, 20))
    wanted = answers(loaded(tmp_path / "less"), torch.from_numpy(ids)).numpy()
    if ":" in name:
        found = PlainEncoder(output)(ids, np.ones_like(ids), np.zeros_like(ids))
        got = found.get("last_hidden_state", found.get("logits"))
    else:
        positions = np.tile(np.arange(ids.shape[1]), (2, 1))
        got = PlainDecoder(output).feed(ids, np.ones_like(ids), positions)
    assert got is not None
    assert np.abs(got - wanted).max() <= 1e-4 * max(1.0, float(np.abs(wanted).max()))
    config = json.loads((tmp_path / "less" / "config.json").read_text())
    zeros = config.get(KEPT_HEADS)
    assert (zeros is not None) == (name == "gpt2" or ":" in name)
    with open_checkpoint(str(tmp_path / "less")) as checkpoint:
        structure = load_family(checkpoint.config).describe(checkpoint.config, checkpoint.tensors())
    assert zeros is None or structure.heads == zeros
    assert not isinstance(structure, Decoder) or structure.kv_heads <= structure.heads


def test_an_export_prunes_first(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """One command gives the bytes of the two."""
    source, asked = tiny_model("llama"), (*SMALL, *WIDTH, "prune.layers=1")
    options = pipeline.ExportOptions(validate=False, threads=1)
    reference = pipeline.ModelReference(str(source))
    result = pipeline.export(reference, load_profile("arm-int4", asked), tmp_path / "one", options, Stages())
    pruned(source, tmp_path / "less", *asked[len(SMALL) :])
    second = pipeline.ModelReference(str(tmp_path / "less"))
    pipeline.export(second, load_profile("arm-int4"), tmp_path / "two", options, Stages())
    for name in ("model.onnx", "model.onnx.data", "config.json", "genai_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert result.manifest["source"]["files"] and result.manifest["pruning"]["after"]["layers"] == 2
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def test_fitting_helps_where_it_is_measured(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_model("bert:embedding")
    losses = {}
    ids = torch.from_numpy(np.random.default_rng(2).integers(5, 300, (8, 40)))
    wanted = answers(loaded(source), ids)
    for recover in ("none", "refit"):
        output = tmp_path / recover
        record = pruned(source, output, "prune.ffn=0.4", f"prune.recover={recover}")
        losses[recover] = float((answers(loaded(output), ids) - wanted).square().mean())
        assert (recover == "refit") == bool(record["errors"])
    assert losses["refit"] < 0.7 * losses["none"]
    assert all(after <= before for before, after in record["errors"].values())


def test_threads_change_no_byte(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    for threads in (1, 3):
        options = pipeline.ExportOptions(validate=False, threads=threads)
        profile = load_profile("float", (*SMALL, *WIDTH, "prune.layers=1"))
        reference = pipeline.ModelReference(str(tiny_model("mistral")))
        pruning.prune_to(reference, profile, tmp_path / str(threads), options, Stages())
    for name in ("model.safetensors", "config.json", "pruning.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()
