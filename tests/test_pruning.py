"""Pruning from the outside: the command, its worker, trimmed vocabularies, aims, distillation, the report's chain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner

from compress import cli, pipeline, proof, pruning
from compress.errors import CompressError, ResourceError, UsageError
from compress.planning import make_plan
from compress.profile import load_profile
from compress.progress import Stages
from compress.prune.amounts import Amounts
from compress.report.chain import chain_svg
from compress.report.model import Report
from compress.source import open_checkpoint
from same_process import prune_here

SMALL = ("calibration.tokens=2048", "calibration.window=64")
#: What reports of tiny models need: no speed, few tokens.
QUICK = ("validation.tokens=128", "validation.window=32", "validation.prompt_tokens=4", "validation.new_tokens=2")


def options(**more: Any) -> pipeline.ExportOptions:
    return pipeline.ExportOptions(**{"validate": False, "threads": 1, **more})


def prune_to(source: Path, output: Path, *overrides: str, **more: Any) -> dict[str, Any]:
    profile = load_profile("float", (*SMALL, *overrides))
    reference = pipeline.ModelReference(str(source))
    return dict(pruning.prune_to(reference, profile, output, options(**more), Stages()))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.cli, arguments, catch_exceptions=True)


def test_the_command_and_its_worker(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker writes the bytes that this process does."""
    asked = ("--ffn", "0.4", "--layers", "1", "--set", SMALL[0], "--set", SMALL[1], "--json")
    done = run("prune", str(tiny_model("llama")), "-o", str(tmp_path / "worker"), *asked)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["pruning"]
    assert told["before"] == {"inner": 160, "heads": 4, "kv_heads": 2, "layers": 3}
    assert told["after"] == {"inner": 96, "heads": 4, "kv_heads": 2, "layers": 2}
    prune_here(monkeypatch)
    prune_to(tiny_model("llama"), tmp_path / "here", "prune.ffn=0.4", "prune.layers=1")
    for path in sorted((tmp_path / "worker").iterdir()):
        assert path.read_bytes() == (tmp_path / "here" / path.name).read_bytes(), path.name
    transformers.AutoTokenizer.from_pretrained(tmp_path / "worker")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "worker"]


def test_what_is_asked_wrongly_is_told(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source, output = tiny_model("llama"), tmp_path / "less"
    for wrong, message in (
        ((), "nothing is to be removed"),
        (("prune.ffn=0.001",), "so little cannot be removed"),
        (("prune.layers=5",), "5 blocks are to be removed, the model has 3"),
        (("prune.ffn=0.4", "prune.algorithm=surgeom"), "no pruning algorithm is named"),
        (("prune.layers=1", "prune.depth=deep"), "no pruning algorithm is named"),
        (("prune.ffn=0.4", "prune.speedup=2"), "give them or amounts, not both"),
        (("prune.sparsity=0.5", "prune.ffn=0.4"), "single weights are set to zero in a model whose parts stay"),
        (("prune.sparsity=0.3", "prune.pattern=2:4"), "is a sparsity of 0.5"),
    ):
        with pytest.raises(UsageError, match=message):
            prune_to(source, output, *wrong)
    with pytest.raises(UsageError, match="runs one block several times"):
        prune_to(tiny_model("albert:embedding"), output, "prune.sparsity=0.5")
    short = tmp_path / "short.txt"
    short.write_text("Too little to learn anything from.\n" * 3)
    for name in ("llama", "bert:embedding"):
        with pytest.raises(UsageError, match="needs at least"):
            prune_to(tiny_model(name), output, "prune.ffn=0.4", calibration_text=short)
    with pytest.raises(ResourceError, match="pruning would take .* more than --max-memory"):
        prune_to(source, output, "prune.ffn=0.4", max_memory=10_000_000)
    assert not output.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["short.txt"]


def test_weights_that_are_no_numbers_are_told(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    prune_here(monkeypatch)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_model("llama").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match="not a finite number") as error:
        prune_to(broken, tmp_path / "less", "prune.ffn=0.4")
    assert "model.layers.1.mlp.down_proj.weight, row 3" in str(error.value.where)
    assert not (tmp_path / "less").exists()


def test_a_plan_knows_what_is_left(tiny_model: Callable[[str], Path]) -> None:
    profile = load_profile("arm-int4", ("prune.ffn=0.4", "prune.layers=1"))
    with pipeline.planned(pipeline.ModelReference(str(tiny_model("llama"))), profile, options(), Stages()) as found:
        less = found.plan
        whole = make_plan(pipeline.describe(found.checkpoint), profile, found.checkpoint)
    assert less.structure.layers == 2 and less.data_bytes < whole.data_bytes
    assert {linear.in_features for linear in less.structure.linears if linear.role == "down"} == {96}


@pytest.mark.parametrize("name", ["llama", "llama-untied", "bert:fill-mask", "gpt2"])
def test_a_trimmed_vocabulary_leaves_the_logits(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune_here(monkeypatch)
    text = tmp_path / "text.txt"
    text.write_text("the list of the names of the class is a list\n" * 400)
    record = prune_to(tiny_model(name), tmp_path / "less", "prune.vocabulary=from-text", calibration_text=text)
    kept = np.load(tmp_path / "less" / "kept_ids.npy")
    assert record["vocabulary"]["after"] == len(kept) < record["vocabulary"]["before"] == 384
    models = []
    for path in (tiny_model(name), tmp_path / "less"):
        config = json.loads((path / "config.json").read_text())
        models.append(getattr(transformers, config["architectures"][0]).from_pretrained(path).eval())
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, len(kept), (2, 20)))
    with torch.inference_mode():
        wanted = models[0](input_ids=torch.from_numpy(kept)[ids]).logits[..., torch.from_numpy(kept)]
        got = models[1](input_ids=ids).logits
    assert (got - wanted).abs().max() <= 1e-5
    assert (got - wanted.roll(1, -1)).abs().max() > 1e-2
    sentence = "the names of the list"
    before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (tiny_model(name), tmp_path / "less"))
    assert kept[after(sentence).input_ids].tolist() == before(sentence).input_ids


def test_single_weights_become_zeros(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune_here(monkeypatch)
    for index, asked in enumerate((("prune.sparsity=0.5", "prune.pattern=2:4"), ("prune.sparsity=0.6",))):
        record = prune_to(tiny_model("mistral"), tmp_path / str(index), *asked)
        assert record["before"] == record["after"] and record["sparsity"] == float(asked[0].rpartition("=")[2])
        with open_checkpoint(str(tmp_path / str(index))) as less:
            weight = less.read("model.layers.1.mlp.gate_proj.weight")
            norm = less.read("model.layers.1.input_layernorm.weight")
        assert norm.all()
        if index == 0:
            assert ((weight.reshape(len(weight), -1, 4) != 0).sum(axis=2) == 2).all()
        else:
            assert (weight == 0).mean() == pytest.approx(0.6, abs=0.01)


def test_an_aim_is_searched(tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time by the number of weights: what the latency model says of a real machine, on none."""
    prune_here(monkeypatch)

    class Counting:
        def __init__(self, threads: int, **_: Any) -> None:
            assert threads == 1

        def predictor(self, geometry: Any, workload: Any, sizes: Any) -> Callable[[Amounts], float]:
            assert list(sizes)
            return lambda size: size.layers * (3 * size.inner + 2 * (size.heads + size.kv_heads) * 16) + 64.0

    monkeypatch.setattr("compress.latency.model.LatencyModel", Counting)
    record = prune_to(tiny_model("llama"), tmp_path / "fast", "prune.speedup=1.5")
    assert record["search"]["predicted_speedup"] >= 1.5
    assert record["after"] != record["before"] and record["search"]["frontier"][0][0] == 1
    losses = [loss for _, loss in record["search"]["frontier"]]
    assert losses == sorted(losses)
    record = prune_to(tiny_model("llama"), tmp_path / "near", "prune.max_kl=0.5")
    measured = record["search"]["measured_kl"]
    assert any(kl <= 0.5 for *_, kl in measured) and len(measured) <= 5
    with pytest.raises(CompressError, match="times faster"):
        prune_to(tiny_model("llama"), tmp_path / "no", "prune.speedup=500")
    with pytest.raises(UsageError, match="models that write text"):
        prune_to(tiny_model("bert:embedding"), tmp_path / "no", "prune.max_kl=0.5")
    assert not (tmp_path / "no").exists()


def test_distillation_follows_a_cut(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune_here(monkeypatch)
    asked = ("prune.ffn=0.6", "prune.heads=0.25", "prune.layers=1", "prune.recover=distill", "prune.steps=60")
    record = prune_to(tiny_model("bert:embedding"), tmp_path / "less", *asked)
    learnt = record["distillation"]
    assert learnt["after"] < learnt["before"] and 0 < learnt["steps"] <= 60
    model, found = transformers.AutoModel.from_pretrained(tmp_path / "less", output_loading_info=True)
    assert not any(found.values()), found
    # Removed heads are zeros still.
    assert not model.encoder.layer[0].attention.self.query.weight[48:].any()
    assert not model.encoder.layer[0].attention.output.dense.weight[:, 48:].any()
    assert not list(tmp_path.glob(".*"))


def test_the_report_shows_the_chain(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_skeletons: None
) -> None:
    prune_here(monkeypatch)
    output = tmp_path / "artifact"
    profile = load_profile("arm-int4", (*SMALL, *QUICK, "prune.ffn=0.4", "validation.repeats=1"))
    result = pipeline.export(
        pipeline.ModelReference(str(tiny_model("llama"))), profile, output, options(validate=True), Stages()
    )
    assert result.report is not None
    chain = Report.model_validate(result.report).pruning
    assert chain is not None and [item.step for item in chain.chain] == ["source", "pruned", "quantized"]
    source, less, quantized = chain.chain
    assert source.bytes > less.bytes > quantized.bytes and source.speedup_vs_source == 1
    assert less.size_factor == pytest.approx(source.bytes / less.bytes)
    assert less.drift is not None and quantized.drift is not None
    assert less.speedup_vs_source and quantized.speed_factor
    picture = (output / "pruning.svg").read_text()
    assert picture == chain_svg(chain.chain) and "x smaller" in picture
    assert result.manifest["pruning"]["after"]["inner"] == 96
    assert result.manifest["source"]["id"] == tiny_model("llama").name
    # Validated again, the pruned model is gone: what was measured of it stays.
    made, _ = proof.validate_artifact(
        output,
        reference=str(tiny_model("llama")),
        adapter=None,
        providers=(),
        eval_text=None,
        eval_labels=None,
        threads=1,
        stages=Stages(),
    )
    again = Report.model_validate(made).pruning
    assert again is not None and again.chain[:2] == chain.chain[:2]
    assert again.chain[2].drift == quantized.drift
    # So does how weights are stored, which the manifest keeps; texts are written again.
    assert made["tensors"] == result.report["tensors"] == result.manifest["tensors"] and len(made["tensors"]) > 10
    assert made["samples"] == result.report["samples"] and len(made["samples"]) == 4 and made["created"]


def test_a_trimmed_artifact_is_compared_with_the_tokens_that_are_left(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_skeletons: None
) -> None:
    prune_here(monkeypatch)
    output = tmp_path / "artifact"
    overrides = (*SMALL, *QUICK, "prune.vocabulary=from-text", "validation.baselines=[]", "validation.repeats=1")
    profile = load_profile("float", overrides)
    reference = pipeline.ModelReference(str(tiny_model("llama")))
    result = pipeline.export(reference, profile, output, options(validate=True), Stages())
    assert result.report is not None and result.report["drift"]["kl_divergence"]["mean"] < 1e-6
    made, code = proof.validate_artifact(
        output,
        reference=str(tiny_model("llama")),
        adapter=None,
        providers=(),
        eval_text=None,
        eval_labels=None,
        threads=1,
        stages=Stages(),
    )
    assert code == 0 and made["drift"]["kl_divergence"]["mean"] < 1e-6
    assert [sample["first_difference"] for sample in made["samples"]] == [None] * 4, "ids are not the trimmed ones"
    np.save(output / "kept_ids.npy", np.array([5, 3], np.int64))
    with pytest.raises(CompressError, match="no list of kept token ids"):
        proof.validate_artifact(
            output,
            reference=str(tiny_model("llama")),
            adapter=None,
            providers=(),
            eval_text=None,
            eval_labels=None,
            threads=1,
            stages=Stages(),
        )
