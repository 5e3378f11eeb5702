"""An artifact run a block at a time gives the logits of the whole session, bit by bit, and so do its bugs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from compress import providers, validation
from compress.errors import CompressError, WorkerError
from compress.validation import in_pieces, on_provider, run, worker
from compress.validation.artifact import open_artifact
from compress.validation.room import Way
from compress.validation.speed import SpeedPlan
from tiny_models import INT8_CACHE

#: Longer than LongRoPE's switch and the sliding windows.
LENGTH, PREFILL = 40, 29
WHY = "the whole artifact would take 4.30 GB, --max-memory is 1.00 GB"
Logits = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


def jobs(place: Path, vocab: int = 380) -> list[dict[str, Any]]:
    """The two jobs of a drift, on two random windows."""
    place.mkdir(parents=True, exist_ok=True)
    windows = np.random.default_rng(2).integers(3, vocab, (2, LENGTH)).astype(np.int64)
    np.save(place / "windows.npy", windows)
    return [
        {"kind": "logits", "windows": str(place / "windows.npy"), "output": str(place / "all.npy")},
        {
            "kind": "cached_logits",
            "windows": str(place / "windows.npy"),
            "output": str(place / "cached.npy"),
            "prefill": PREFILL,
        },
    ]


def answer(model: Path, place: Path, *, pieces: bool, vocab: int = 380) -> tuple[dict[str, Any], Logits]:
    """Run the jobs in this process."""
    request = {"model": str(model), "provider": "cpu", "threads": 1, "jobs": jobs(place, vocab), "in_pieces": pieces}
    response = worker.handle(request, place)
    return response, (np.load(place / "all.npy"), np.load(place / "cached.npy"))


def assert_equal(model: Path, place: Path, vocab: int = 380) -> Logits:
    """Run a graph both ways and compare all that is said of it; returns the logits."""
    whole, expected = answer(model, place / "whole", pieces=False, vocab=vocab)
    cut, found = answer(model, place / "pieces", pieces=True, vocab=vocab)
    for one, other in zip(found, expected, strict=True):
        assert np.abs(other).max() > 0.5
        np.testing.assert_array_equal(one, other)
    assert cut["results"] == whole["results"]
    assert cut["placement"] == whole["placement"] and cut["placement"]["nodes_total"] > 20
    assert set(cut) == {*whole, "pieces"}
    assert not list(model.parent.glob(".piece*")) and not list(place.glob("*/.compress-pieces-*"))
    return found


@pytest.mark.parametrize(
    ("family", "profile"),
    [
        ("llama", "arm-int4"),
        ("llama-untied", "arm-int4"),
        ("mistral", "arm-int4"),
        ("phi3", "arm-int4"),
        ("phi3-longrope", "arm-int4"),
        ("gpt2", "arm-int4"),
        ("llama", "arm-int8"),
        ("llama-untied", "arm-int8"),
        ("gpt2", "arm-int8"),
        ("llama", "float"),
        ("llama", "x86-int8-hybrid"),
        ("phi3", "x86-int8-hybrid"),
    ],
)
def test_pieces_give_the_logits_of_the_whole(
    family: str, profile: str, tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    artifact = tiny_artifact(family, profile)
    model = shutil.copytree(artifact, tmp_path / "artifact") / "model.onnx"
    logits, cached = assert_equal(model, tmp_path)
    assert np.abs(logits[1:] - logits[:-1]).max() > 0.1  # a shift by one position would be seen
    assert len(cached) == 2 * (LENGTH - PREFILL)


@pytest.mark.parametrize("family", ["llama", "phi3-longrope", "gpt2"])
def test_so_do_graphs_whose_cache_is_of_bytes(family: str, tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    logits = {}
    for kind, overrides in (("bytes", INT8_CACHE), ("floats", ())):
        artifact = shutil.copytree(tiny_artifact(family, "float", *overrides), tmp_path / kind)
        logits[kind] = assert_equal(artifact / "model.onnx", tmp_path / f"{kind}-answers")[1]
    assert np.abs(logits["bytes"] - logits["floats"]).mean() > 1e-3


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gpt2"])
def test_so_do_graphs_that_somebody_else_made(family: str, float_graphs: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is fused, heads are tied by a Transpose, and what attention needs is computed in the graph."""
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(float_graphs[family].with_name(name), tmp_path)
    assert_equal(tmp_path / "model.onnx", tmp_path, vocab=250)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_bug_in_one_block_shows_as_in_the_whole(
    block: int, tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    """The control: pairs of neighbours are rotated instead of halves, in one block alone."""
    good = tiny_artifact("llama")
    place = shutil.copytree(good, tmp_path / "artifact")
    model = ir.load(place / "model.onnx")
    node = [item for item in model.graph if item.op_type == "GroupQueryAttention"][block]
    node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", 1)
    ir.save(model, place / "model.onnx")
    found = assert_equal(place / "model.onnx", tmp_path)
    _, right = answer(good / "model.onnx", tmp_path / "good", pieces=False)
    for one, other in zip(found, right, strict=True):
        assert np.abs(one - other).max() > 1e-2


def test_a_damaged_weight_file_is_told(tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    place = shutil.copytree(tiny_artifact("llama"), tmp_path / "artifact")
    with (place / "model.onnx.data").open("rb+") as data:
        data.truncate(10_000)
    with pytest.raises(CompressError, match="cannot load the model"):
        answer(place / "model.onnx", tmp_path / "work", pieces=True)
    assert not (place / in_pieces.PIECE_NAME).exists()


def test_jobs_that_need_the_whole_are_refused(tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_artifact("llama") / "model.onnx"
    job = {**jobs(tmp_path)[0], "kind": "speed"}
    with pytest.raises(CompressError, match="the job 'speed' needs the whole graph"):
        in_pieces.run(model, providers.load("cpu"), {}, 1, {}, [job], lambda fraction: None)


def test_without_a_job_pieces_are_loaded_and_placed(tiny_artifact: Callable[..., Path]) -> None:
    model = tiny_artifact("gpt2") / "model.onnx"
    done = in_pieces.run(model, providers.load("cpu"), {}, 1, {}, [], lambda fraction: None)
    assert done.pieces == 5 and done.results == [] and len(done.nodes["CPUExecutionProvider"]) > 20


def test_a_worker_that_is_killed_leaves_no_piece(
    tiny_artifact: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = shutil.copytree(tiny_artifact("llama"), tmp_path / "artifact")

    def killed(*_: Any, **__: Any) -> Any:
        (place / in_pieces.PIECE_NAME).write_bytes(b"half a graph")
        raise WorkerError("the worker crashed with SIGKILL")

    monkeypatch.setattr(on_provider, "run_worker", killed)
    artifact = run.replace(open_artifact(place), in_pieces=True)
    with pytest.raises(WorkerError):
        on_provider.run_artifact(artifact, "cpu", [], 1, 60, lambda fraction: None)
    assert not (place / in_pieces.PIECE_NAME).exists()


def test_a_validation_in_pieces_measures_drift_and_says_why_nothing_else(
    tiny_artifact: Callable[..., Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact = shutil.copytree(tiny_artifact("llama"), tmp_path / "artifact")
    settings: dict[str, Any] = {
        "checkpoint_spec": validation.CheckpointSpec(str(tiny_model("llama"))),
        "tokens": 128,
        "window": 32,
        "speed_plan": SpeedPlan(prompt_tokens=8, new_tokens=2, repeats=1, timeout=120),
        "sample_tokens": 4,
        "way": Way(by_rows=True, in_pieces=WHY),
    }
    budgets = {"max_kl": 9.0, "min_speedup_vs_pytorch": 0.1}
    result = validation.run_validation(artifact, budgets=budgets, **settings)
    assert result.verdict.reasons == (
        f"speedup_vs_pytorch was not measured ({WHY}), and the budget asks for at least 0.1",
    )
    assert [stage.name for stage in result.stages] == ["reference", "drift on cpu in 5 pieces"]
    assert result.drift is not None and result.speed == () and result.samples == ()
    (provider,) = result.providers
    assert provider.not_measured == {"speed": WHY, "samples": WHY} and provider.state == "ran"
    assert provider.placement is not None and provider.placement.nodes_total > 20
