"""Exports that are killed and repeated: the same bytes as undisturbed, nothing done twice, nothing of another model."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kills
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from compress import building, pipeline, workspace
from compress.calibrate import decoder_worker
from compress.errors import SourceError
from compress.journal import Journal
from compress.profile import load_profile
from compress.progress import Stages
from same_process import calibrate_here, prune_here

pytestmark = pytest.mark.usefixtures("fast_skeletons")

CALIBRATED = ("quantize.effort=balanced", "calibration.tokens=2048", "calibration.window=64", "prune.recover=none")
#: Keys and values as bytes, which optimum does not take.
BYTES = ("graph.cache_type=int8", 'targets=["genai"]')
PRUNED = ("prune.layers=1", "prune.recover=none")
QUICK = (
    "validation.baselines=[]", "validation.repeats=1", "validation.tokens=64", "validation.window=32",
    "validation.prompt_tokens=8", "validation.new_tokens=2", "validation.sample_tokens=0", "budget.max_kl=1e-9",
)  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL; whatever cleans up behind other exceptions is switched off."""


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate_here(monkeypatch)
    prune_here(monkeypatch)
    monkeypatch.setattr("compress.weights._TELL_SECONDS", 0.0)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def export(
    model: Path, output: Path, profile: str, *overrides: str, validate: bool = False, fresh: bool = False
) -> Any:
    """Export."""
    options = pipeline.ExportOptions(validate=validate, fresh=fresh, threads=1)
    reference = pipeline.ModelReference(str(model))
    return pipeline.export(reference, load_profile(profile, overrides), output, options, Stages())


def kill_at(patch: pytest.MonkeyPatch, entry: int) -> None:
    """Let this process be killed before the journal's entry of that number gets there."""
    seen = 0
    put = Journal.put

    def counted(self: Journal, name: str, value: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > entry:
            raise Killed
        put(self, name, value)

    patch.setattr(Journal, "put", counted)
    leave_everything(patch)


def leave_everything(patch: pytest.MonkeyPatch) -> None:
    """A killed process cleans nothing up."""
    patch.setattr(workspace, "_remove_all", lambda space: None)
    patch.setattr(workspace, "_remove_empty", lambda made: None)


def entries(model: Path, output: Path, *words: str) -> int:
    """Export undisturbed; return how many entries its journal had."""
    seen = []
    put = Journal.put
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "put", lambda self, name, value: (seen.append(name), put(self, name, value)))
        export(model, output, *words)
    return len(seen)


CASES = {
    "llama": ("arm-int4",),
    "phi3": ("arm-int4", "quantize.allocation=budget", "budget.max_bytes=160KB", *CALIBRATED, *BYTES),
    "bert:embedding": ("x86-int8",),
    "mistral": ("arm-int4", *PRUNED),
    "gpt2": ("web-int4",),
}


@pytest.mark.parametrize("name", CASES)
def test_killed_again_and_again_the_bytes_are_the_same(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    words = CASES[name]
    total = entries(tiny_model(name), tmp_path / "whole", *words)
    expected = kills.digests(tmp_path / "whole")
    output = tmp_path / "room" / "out"
    times = 0
    for entry in (0, 1, 4, total // 2):  # each run gets so many entries further than the last
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            kill_at(patch, entry)
            export(tiny_model(name), output, *words)
            break
        times += 1
        assert not output.exists()
    assert times >= 3
    export(tiny_model(name), output, *words)
    assert kills.differing(expected, kills.digests(output)) == []
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_finished_weights_are_not_read_again(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = pipeline.weights.read_rows

    def counted(checkpoint: Any, fate: Any, start: int, stop: int) -> Any:
        read.append(fate.name)
        return real(checkpoint, fate, start, stop)

    monkeypatch.setattr("compress.weights.read_rows", counted)
    with monkeypatch.context() as patch:
        leave_everything(patch)
        patch.setattr("compress.graph.build.build_graph", raising)
        with pytest.raises(Killed):
            export(tiny_model("llama"), tmp_path / "out", "arm-int4", "quantize.importance=none")
    first, read[:] = set(read), []
    export(tiny_model("llama"), tmp_path / "out", "arm-int4", "quantize.importance=none")
    assert len(first) > 10
    small = {name for name in first if "norm" in name}
    assert set(read) <= small, "what is on the disk was read again"


def test_finished_blocks_are_not_visited_again(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited: list[int] = []
    real = decoder_worker.Quantization._visit

    def counted(self: Any, index: int, *arguments: Any) -> Any:
        if index == 2 and 2 not in visited:
            visited.append(index)
            raise Killed
        visited.append(index)
        return real(self, index, *arguments)

    export(tiny_model("llama"), tmp_path / "whole", "arm-int4", *CALIBRATED)
    with monkeypatch.context() as patch:
        patch.setattr(decoder_worker.Quantization, "_visit", counted)
        with monkeypatch.context() as killed:
            leave_everything(killed)
            with pytest.raises(Killed):
                export(tiny_model("llama"), tmp_path / "out", "arm-int4", *CALIBRATED)
        export(tiny_model("llama"), tmp_path / "out", "arm-int4", *CALIBRATED)
    assert visited == [0, 1, 2, 2]
    assert kills.differing(kills.digests(tmp_path / "whole"), kills.digests(tmp_path / "out")) == []


def raising(*arguments: Any, **named: Any) -> Any:
    """Be killed here."""
    raise Killed


def halfway(model: Path, output: Path) -> None:
    """Leave an export that was killed when its weights were written."""
    with pytest.MonkeyPatch.context() as patch:
        leave_everything(patch)
        patch.setattr("compress.graph.build.build_graph", raising)
        with pytest.raises(Killed):
            export(model, output, "arm-int4")


def rescale(model: Path) -> None:
    """Write other weights of the same shapes into a model's file, and give it its old time back."""
    path = model / "model.safetensors"
    before = path.stat()
    tensors = {name: np.asarray(array * 1.5, array.dtype) for name, array in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_another_models_weights_are_never_used(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    halfway(model, tmp_path / "out")
    halfway(model, tmp_path / "control")
    rescale(model)
    export(model, tmp_path / "new", "arm-int4")
    expected = kills.digests(tmp_path / "new")
    export(model, tmp_path / "out", "arm-int4")
    assert kills.differing(expected, kills.digests(tmp_path / "out")) == []
    # The control: without the check, it would be the other model's.
    monkeypatch.setattr(building, "check_source", lambda space, source: None)
    monkeypatch.setattr(building, "require_unchanged", lambda source, kept: None)
    export(model, tmp_path / "control", "arm-int4")
    assert "model.onnx.data" in kills.differing(expected, kills.digests(tmp_path / "control"))


def test_files_that_were_only_copied_again_are_the_same_model(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    halfway(model, tmp_path / "out")
    (model / "config.json").touch()
    with monkeypatch.context() as patch:
        patch.setattr("compress.store.Store.quantized", raising)
        export(model, tmp_path / "out", "arm-int4")
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_a_model_that_changes_while_it_is_read_is_refused(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    written = pipeline.weights.write_weights

    def meanwhile(*arguments: Any, **named: Any) -> Any:
        rescale(model)
        return written(*arguments, **named)

    monkeypatch.setattr("compress.weights.write_weights", meanwhile)
    with pytest.raises(SourceError, match="the model changed while it was read") as caught:
        export(model, tmp_path / "out" / "artifact", "arm-int4")
    assert caught.value.where == "model.safetensors"
    assert not (tmp_path / "out").exists()


def test_a_run_killed_when_all_was_done_tells_its_result(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "room" / "out"
    with monkeypatch.context() as patch:
        leave_everything(patch)
        first = export(tiny_model("llama"), output, "arm-int4", *QUICK, validate=True)
    assert first.exit_code == 3 and len(list(output.parent.iterdir())) == 2
    monkeypatch.setattr("compress.pipeline._export", raising)  # nothing is done again
    second = export(tiny_model("llama"), output, "arm-int4", *QUICK, validate=True)
    assert (second.exit_code, second.report, second.manifest) == (3, first.report, first.manifest)
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_an_interrupt_after_the_weights_keeps_them(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    output = tmp_path / "room" / "out"
    with monkeypatch.context() as patch:
        patch.setattr("compress.graph.build.build_graph", interrupt)
        with pytest.raises(KeyboardInterrupt):
            export(tiny_model("llama"), output, "arm-int4")
    assert [path.name for path in output.parent.iterdir()] == [".out.partial"]
    with monkeypatch.context() as patch:
        patch.setattr("compress.store.Store.quantized", raising)
        export(tiny_model("llama"), output, "arm-int4")
    export(tiny_model("llama"), tmp_path / "fresh", "arm-int4", fresh=True)
    assert kills.differing(kills.digests(tmp_path / "fresh"), kills.digests(output)) == []


@pytest.mark.slow
def test_a_real_kill(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    case = kills.undisturbed((str(tiny_model("llama")), "--profile", "float", "--no-validate"), tmp_path)
    faults, reached = kills.trial(case, [0.6 * case.seconds], tmp_path, elsewhere=True)
    assert faults == [] and len(reached) == 1
