"""What a proof measures beside the artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from compress import pipeline, proof
from compress.cli import main
from compress.errors import ResourceError
from compress.profile import load_profile
from compress.progress import Stages
from compress.source import open_checkpoint
from compress.validation import room

FLOATS = {"x86-int4": onnx.TensorProto.FLOAT, "cuda-int4": onnx.TensorProto.FLOAT16}


@pytest.mark.usefixtures("fast_skeletons")
@pytest.mark.parametrize("name", FLOATS)
def test_the_float_baseline_has_the_profiles_floats(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    profile, options = load_profile(name), pipeline.ExportOptions(threads=1)
    with (
        open_checkpoint(str(tiny_model("llama"))) as checkpoint,
        proof._float_baseline(checkpoint, profile, tmp_path / "artifact", options, room.Way()) as (path, reason),
    ):
        assert path is not None, reason
        graph = onnx.load(path, load_external_data=False).graph
    assert not any(node.op_type == "MatMulNBits" for node in graph.node)
    cache = next(value for value in graph.input if value.name == "past_key_values.0.key")
    assert cache.type.tensor_type.elem_type == FLOATS[name]


def test_what_is_not_quantized_has_no_float_baseline(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    options = pipeline.ExportOptions(threads=1)
    with (
        open_checkpoint(str(tiny_model("llama"))) as checkpoint,
        proof._float_baseline(
            checkpoint, load_profile("cuda-fp16"), tmp_path / "artifact", options, room.Way()
        ) as found,
    ):
        assert found == (None, "the profile does not ask for it")


CAP = 2_000_000_000


def code_of(words: list[str]) -> object:
    """Run a command line and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


@pytest.mark.usefixtures("fast_skeletons")
def test_an_artifact_that_does_not_fit_is_measured_in_pieces(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exported and validated again; the prediction alone is made larger than it is."""
    monkeypatch.setattr(room._Decoding, "artifact", lambda work: 5_000_000_000)
    source, output = str(tiny_model("llama")), tmp_path / "artifact"
    overrides = ["validation.tokens=128", "validation.window=32", "budget.max_kl=9", "budget.min_top1_agreement=none"]
    options = pipeline.ExportOptions(threads=1, max_memory=CAP)
    timed, untimed = (
        load_profile("arm-int4", [*overrides, *more]) for more in ((), ("budget.min_speedup_vs_pytorch=none",))
    )
    with pytest.raises(ResourceError, match="speedup_vs_pytorch, which is not measured within --max-memory 2.00 GB"):
        pipeline.export(pipeline.ModelReference(source), timed, output, options, Stages())
    assert not output.exists()
    made = pipeline.export(pipeline.ModelReference(source), untimed, output, options, Stages())
    why = "the whole artifact would take 5.20 GB, --max-memory is 2.00 GB"
    assert made.report is not None and made.exit_code == 0, made.report
    assert made.report["speed"] == [] and made.report["providers"][0]["not_measured"] == {"speed": why, "samples": why}
    assert made.report["stages"][-1]["name"] == "drift on cpu in 5 pieces"

    words = ["validate", str(output), "--reference", source, "--threads", "1"]
    assert code_of([*words, "--max-memory", "2GB"]) == 0
    shown = capsys.readouterr().out
    assert "no speed" in shown and "drift on cpu in 5 pieces" in shown
    assert code_of([*words, "--max-memory", "100MB"]) == 1
    assert "validation would take" in capsys.readouterr().err
