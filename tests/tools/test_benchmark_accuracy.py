from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import accuracy_contenders
import benchmark_accuracy
import onnx
import pytest
from accuracy_contenders import Made, Recipe
from benchmark_accuracy import Row
from measured_export import Missing, Run
from onnx import TensorProto, helper

import compress
from compress.report.model import DecoderDrift
from compress.validation.artifact import Artifact

MINE = Row("compress", "mine", 88_000_000, 0.12, 0.005, 0.85, 1.06, 0.004, (4,), 500.0, 2_900_000_000)
SMALL = Row(
    "onnxruntime-genai builder", "default", 86_500_000, 0.40, 0.014, 0.67, 1.36, 0.01, (4,), 12.0, 2_000_000_000
)
EQUAL = Row("Olive", "gptq", 88_200_000, 0.24, 0.009, 0.73, 1.22, 0.01, (4,), 200.0, 1_900_000_000)
LARGE = Row("onnxruntime-genai builder", "k_quant_mixed", 113_600_000, 0.19, None, 0.79, 1.13, None, (4,))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory that passes for a checkpoint, and two texts beside it."""
    (tmp_path / "text.txt").write_text("Some text.")
    (tmp_path / "calibration.txt").write_text("Another text.")
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(b"weights")
    return source


def words(source: Path, *more: str) -> list[str]:
    return [str(source), "--text", str(source.parent / "text.txt"), *more]


# -------------------------------------------------------------------------------------------------------- arguments


def test_everything_is_compared_unless_said_otherwise(checkpoint: Path) -> None:
    options = benchmark_accuracy.parse(words(checkpoint))
    assert options.peers == ["default", "rtn", "k_quant", "k_quant_mixed", "gptq", "gptq-mixed"]
    assert (options.recipes, options.given, options.tokens, options.window) == ([], [], 6144, 512)


def test_a_recipe_is_an_export_of_ours(checkpoint: Path) -> None:
    calibration = checkpoint.parent / "calibration.txt"
    recipe = "best=--profile x86-int4 --set budget.max_bytes=88MB --calibration-text {calibration}"
    more = ["--calibration-text", str(calibration), "--ours", recipe, "--ours", "other=--profile 'a b'", "--peers"]
    options = benchmark_accuracy.parse(words(checkpoint, *more))
    best, other = options.recipes
    export = best.command[best.command.index("export") :]
    assert export[:4] == ("export", str(checkpoint.resolve()), "--profile", "x86-int4")
    assert export[4:8] == ("--set", "budget.max_bytes=88MB", "--calibration-text", str(calibration))
    assert export[8:] == ("--no-validate", "-o", "{out}")
    assert (best.tool, best.name, best.accepted, best.pins) == ("compress", "best", (0, 3), ())
    assert "a b" in other.command


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ours", "--profile x86-int4"], "is not NAME=OPTIONS"),
        (["--ours", "=--profile x86-int4"], "is not NAME=OPTIONS"),
        (["--ours", "a=--calibration-text {calibration}"], "give --calibration-text"),
        (["--ours", "a=--profile x -o elsewhere"], "not for a recipe to say"),
        (["--ours", "default=--profile x"], "two contenders are called 'default'"),
        (["--artifact", "a"], "is not NAME=DIR"),
        (["--artifact", "a=x", "--artifact", "a=y"], "two contenders are called 'a'"),
        (["--peers", "awq"], "invalid choice"),
        (["--peers"], "nothing to compare"),
        (["--calibration-text", "nowhere.txt"], "there is no text nowhere.txt"),
    ],
)
def test_what_makes_no_sense_is_refused(
    more: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        benchmark_accuracy.parse(words(checkpoint, *more))
    assert message in capsys.readouterr().err


def test_artifacts_with_a_manifest_are_ours(tmp_path: Path) -> None:
    assert accuracy_contenders.given(f"a={tmp_path}") == Made("given", "a", tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    assert accuracy_contenders.given(f"a={tmp_path}") == Made("compress", "a", tmp_path)


# ------------------------------------------------------------------------------------------------------ equal bytes


def test_the_pair_is_the_best_peer_that_is_hardly_larger() -> None:
    (pair,) = benchmark_accuracy.pairs([LARGE, MINE, SMALL, EQUAL])
    assert (pair.ours, pair.peer, pair.equal) == (MINE, EQUAL, True)
    (strict,) = benchmark_accuracy.pairs([LARGE, MINE, SMALL, EQUAL], slack=0.001)
    assert strict.peer == SMALL


def test_a_smaller_and_better_peer_is_not_passed_over() -> None:
    better = dataclasses.replace(SMALL, name="better", kl=0.05)
    (pair,) = benchmark_accuracy.pairs([MINE, EQUAL, better])
    assert pair.peer == better and pair.equal


def test_where_every_peer_is_larger_the_smallest_stands_there_and_is_marked() -> None:
    tiny = dataclasses.replace(MINE, name="tiny", bytes=70_000_000)
    pairs = benchmark_accuracy.pairs([tiny, MINE, LARGE, SMALL])
    assert [(pair.ours.name, pair.peer.name, pair.equal) for pair in pairs] == [
        ("tiny", "default", False),
        ("mine", "default", True),
    ]
    assert "`default` (none so small; the smallest)" in benchmark_accuracy.pair_table(pairs).splitlines()[2]
    assert benchmark_accuracy.pairs([MINE]) == [] and benchmark_accuracy.pairs([SMALL]) == []


# ----------------------------------------------------------------------------------------------------------- tables


def test_tables() -> None:
    over = dataclasses.replace(MINE, exit_code=3)
    rows = benchmark_accuracy.table([LARGE, over, SMALL]).splitlines()
    assert rows[0].startswith("| tool | recipe | MB | KL | top-1 agreement | perplexity ratio | export, s | peak, MB |")
    assert rows[2].startswith("| onnxruntime-genai builder | `default` | 86.5 | 0.4000 +- 0.0140 | 67.0 % |")
    assert rows[3] == (
        "| compress | `mine` (outside its budget) | 88.0 | 0.1200 +- 0.0050 | 85.0 % | 1.060 +- 0.004 | 500 | 2900 |"
    )
    assert rows[4].endswith("| 113.6 | 0.1900 | 79.0 % | 1.130 | not measured | not measured |")
    pair = benchmark_accuracy.pair_table(benchmark_accuracy.pairs([MINE, EQUAL])).splitlines()[2]
    assert pair == "| `mine` | 88.0 | 0.1200 | Olive `gptq` | 88.2 | 0.2400 | 0.50 |"


def test_notes_say_who_is_missing_old_or_otherwise_accurate() -> None:
    odd = dataclasses.replace(EQUAL, levels=(0, 4), day="2026-01-02")
    notes = benchmark_accuracy.notes([odd], [Missing("gptq-mixed", "it broke")])
    assert notes == [
        "Missing: `gptq-mixed`: it broke",
        "`gptq` of Olive was made earlier, on 2026-01-02, and kept",
        "`gptq` of Olive has MatMulNBits of accuracy levels [0, 4]",
    ]
    assert benchmark_accuracy.notes([MINE], []) == [
        "Every MatMulNBits is at accuracy level 4, as it stands in the graphs"
    ]


def test_versions_name_only_peers_that_are_there() -> None:
    found = benchmark_accuracy.versions([MINE, dataclasses.replace(SMALL, tool="given")])
    assert not {"onnxruntime-genai builder", "Olive", "given"} & set(found)
    assert "olive-ai 0.13.0" in benchmark_accuracy.versions([MINE, EQUAL])["Olive"]
    assert "onnxruntime-genai 0.18.0" in benchmark_accuracy.versions([SMALL])[SMALL.tool]


def test_accuracy_levels_are_read_from_the_graph(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMulNBits", ["a", "b", "c"], ["x"], domain="com.microsoft", accuracy_level=4),
        helper.make_node("MatMulNBits", ["x", "b", "c"], ["y"], domain="com.microsoft"),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    value = helper.make_tensor_value_info("a", TensorProto.FLOAT, [1])
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [value], [])), tmp_path / "model.onnx")
    assert benchmark_accuracy.accuracy_levels(tmp_path / "model.onnx") == (0, 4)


def cache_graph(directory: Path, head: str | int) -> Artifact:
    value = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["batch", 2, "past", head])
    node = helper.make_node("Identity", ["past_key_values.0.key"], ["present.0.key"])
    onnx.save(helper.make_model(helper.make_graph([node], "g", [value], [])), directory / "model.onnx")
    config = {"hidden_size": 64, "num_attention_heads": 4}
    return Artifact(directory, directory / "model.onnx", {}, 10, None, config=config)


def test_a_head_size_without_a_number_gets_one_for_the_measurement(tmp_path: Path) -> None:
    artifact = cache_graph(tmp_path, "kv_cache_dim")
    before = artifact.model.read_bytes()
    with benchmark_accuracy.with_head_size(artifact) as stated:
        assert stated.model != artifact.model and stated.bytes > 0
        (value,) = onnx.load(str(stated.model)).graph.input
        shape = [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        assert shape == ["batch", 2, "past", 16]
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"] and artifact.model.read_bytes() == before


def test_a_graph_that_states_its_head_size_is_measured_as_it_is(tmp_path: Path) -> None:
    artifact = cache_graph(tmp_path, 16)
    with benchmark_accuracy.with_head_size(artifact) as stated:
        assert stated is artifact


# ------------------------------------------------------------------------------------------------------- contenders

WRITER = (
    "import sys; from pathlib import Path; out = Path(sys.argv[1]); out.mkdir(); "
    "(out / 'model.onnx').write_bytes(b'12345'); raise SystemExit(int(sys.argv[2]))"
)


def recipe(code: int, pins: tuple[str, ...] = ()) -> Recipe:
    return Recipe("Olive", "gptq", (sys.executable, "-c", WRITER, "{out}", str(code)), (0, 3), pins)


def test_an_artifact_outside_its_budget_is_one(checkpoint: Path, tmp_path: Path) -> None:
    made = accuracy_contenders.make(recipe(3), checkpoint, None, tmp_path, tmp_path)
    assert isinstance(made, Made) and made.run is not None
    assert (made.run.exit_code, made.run.artifact, made.day) == (3, 5, None)
    assert json.loads((made.directory / "config.json").read_text()) == {}


def test_a_failed_export_is_missing_with_its_reason(checkpoint: Path, tmp_path: Path) -> None:
    made = accuracy_contenders.make(recipe(1), checkpoint, None, tmp_path, tmp_path)
    assert isinstance(made, Missing) and made.reason.startswith("Olive failed with exit code 1")
    nothing = Recipe("Olive", "gptq", (sys.executable, "-c", "print('all is well')"))
    made = accuracy_contenders.make(nothing, checkpoint, None, tmp_path, tmp_path)
    assert isinstance(made, Missing) and "exited 0 but wrote no model.onnx" in made.reason
    log = "compress failed with exit code 1: compress export\nnoise\nthe budget cannot be met\n  try: 90 MB"
    assert accuracy_contenders.reason(log) == "the budget cannot be met"


def test_a_peers_artifact_is_kept_as_long_as_nothing_changed(checkpoint: Path, tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.txt"
    peer = recipe(0, ("olive-ai==1",))

    def again(wanted: Recipe) -> bool:
        made = accuracy_contenders.make(wanted, checkpoint, calibration, tmp_path, tmp_path)
        assert isinstance(made, Made) and made.run is not None and made.run.artifact == 5
        return made.day is not None

    assert [again(peer), again(peer)] == [False, True]
    assert [again(recipe(0, ("olive-ai==2",))), again(recipe(0, ("olive-ai==2",)))] == [False, True]
    calibration.write_text("Changed.")
    assert not again(recipe(0, ("olive-ai==2",)))
    (checkpoint / "model.safetensors").write_bytes(b"others")
    assert not again(recipe(0, ("olive-ai==2",)))
    assert [again(recipe(0)), again(recipe(0))] == [False, False]  # ours, without pins, are always made anew


def test_nothing_large_is_loaded_before_exports_are_measured() -> None:
    # A child's peak counts what its parent held when it was started.
    code = "import sys, benchmark_accuracy; print(sorted({'numpy', 'onnx', 'torch', 'pydantic'} & set(sys.modules)))"
    places = [str(Path(module.__file__ or "").parent) for module in (benchmark_accuracy, compress)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([places[0], str(Path(places[1]).parent)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_peers_are_called_as_their_versions_want_it(tmp_path: Path) -> None:
    built = accuracy_contenders.builder("k_quant", tmp_path, Path("python"))
    assert built.command[-3:] == ("block_size=32", "accuracy_level=4", "algo_config=k_quant")
    plain, mixed = (
        accuracy_contenders.olive(name, tmp_path, Path("text"), Path("python")) for name in ("gptq", "gptq-mixed")
    )
    assert Path(plain.command[1]).is_file() and plain.command[2:] == (str(tmp_path), "text", "{out}")
    assert mixed.command[2] == "--mixed"
    missing = accuracy_contenders.peer("gptq", tmp_path, None, tmp_path)
    assert missing == Missing("gptq", "it needs --calibration-text")


# ------------------------------------------------------------------------------------------------------------ a run


@pytest.mark.slow
def test_a_run_of_ours_has_the_numbers_of_validate(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from compress.validation.protocol import CheckpointSpec
    from compress.validation.run import run_validation
    from compress.validation.speed import SpeedPlan

    source, text, out = tiny_model("llama"), tmp_path / "text.txt", tmp_path / "table.md"
    text.write_text("The quick brown fox jumps over the lazy dog, and then it sleeps. " * 40)
    arguments = [
        "x",
        str(source),
        "--text",
        str(text),
        "--tokens",
        "128",
        "--window",
        "32",
        "--threads",
        "1",
        "--peers",
    ]
    arguments += ["--ours", "four=--profile x86-int4", "--ours", "broken=--profile no-such", "--keep", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", "--append", str(out)])
    benchmark_accuracy.main()
    document = json.loads(capsys.readouterr().out)
    (row,) = document["rows"]
    assert row["name"] == "four" and row["levels"] == [4] and row["seconds"] > 0 and row["peak"] > 50e6
    assert document["facts"]["windows"] == 4 and document["recipes"]["four"] == "--profile x86-int4"
    assert "no-such" in document["missing"]["broken"]
    artifact = tmp_path / "compress-four"
    assert row["bytes"] == sum(path.stat().st_size for path in artifact.glob("model.onnx*"))
    drift = run_validation(
        artifact,
        checkpoint_spec=CheckpointSpec(str(source)),
        budgets={},
        eval_text=text,
        tokens=128,
        window=32,
        pytorch_baseline=False,
        speed_plan=SpeedPlan(prompt_tokens=4, new_tokens=2, repeats=1),
    ).drift
    assert isinstance(drift, DecoderDrift)
    assert (row["kl"], row["top1"]) == (drift.kl_divergence.mean, drift.top1_agreement)
    assert (row["kl_error"], row["ratio"]) == (drift.kl_divergence.standard_error, drift.perplexity_ratio.value)
    assert row["kl"] > 0
    section = out.read_text()
    assert section.startswith(f"\n### Accuracy for the bytes: {source.name}, ")
    assert "| compress | `four` |" in section and "Missing: `broken`" in section


def test_an_artifact_that_cannot_run_is_missing(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source, text = tiny_model("llama"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((source / "config.json").read_bytes())
    (broken / "model.onnx").write_bytes(b"no graph")
    options = argparse.Namespace(text=text, tokens=64, window=32, threads=1)
    rows, facts = benchmark_accuracy.evaluate(
        [Made("given", "broken", broken, Run("x", 1, 1, 1, 1, 1))], source, options, tmp_path
    )
    assert isinstance(rows[0], Missing) and rows[0].name == "broken" and rows[0].reason
    assert facts["windows"] == 2
