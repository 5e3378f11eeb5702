"""Runs in a real MLflow store on disk, through the client alone (mlflow-skinny)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_report import REPORT

from compress import cli
from compress.errors import CompressError
from compress.package.manifest import read_manifest
from compress.report import mlflow_log
from compress.report.model import Report

# The client warns of its own and its libraries' deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "mlruns").as_uri()


def runs(uri: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [item for item in client.search_experiments() if item.name == mlflow_log.EXPERIMENT]
    return list(client.search_runs([experiment.experiment_id]))


def test_a_run_has_parameters_measures_and_documents(tiny_artifact: Callable[..., Path], store: str) -> None:
    artifact = tiny_artifact("llama")
    report = Report.model_validate(REPORT).model_dump(mode="json")
    tracking = mlflow_log.connect(store)
    manifest = read_manifest(artifact)
    identifier = tracking.log(artifact, manifest, report)
    (run,) = runs(store)
    assert (run.info.run_id, run.info.status) == (identifier, "FINISHED")
    assert run.data.params["profile.quantize.bits"] == "4"
    assert run.data.params["seed"] == "0"
    assert run.data.params["version.torch"] == manifest["tools"]["torch"]
    assert run.data.metrics["drift.kl_divergence.mean"] == 0.4125
    assert run.data.metrics["speed.cpu.decode_tokens_per_second.median"] == 107.0
    assert run.data.metrics["size.artifact_bytes"] == 86_500_000
    assert run.data.metrics["passed"] == 0
    # What was asked for, or not measured, is no measure.
    assert not {"speed.cpu.repeats", "drift.kl_divergence.standard_error"} & run.data.metrics.keys()
    assert run.data.tags["compress.status"] == "built"
    logged = {path.name for path in Path(run.info.artifact_uri.removeprefix("file://")).iterdir()}
    assert logged == {"manifest.json", "sbom.cdx.json"}
    # A second one goes into the same experiment.
    mlflow_log.connect(store).log(artifact, manifest, None)
    assert len(runs(store)) == 2


@pytest.mark.usefixtures("fast_skeletons")
def test_the_command_logs_and_finds_out_early(
    tiny_model: Callable[[str], Path], tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = ["export", str(tiny_model("llama")), "--profile", "arm-int4", "-o", str(tmp_path / "out"), "--no-validate"]
    assert cli.run([*words, "--mlflow", store, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["manifest"]["status"] == "built" and "MLflow run: " in err
    assert len(runs(store)) == 1
    # Where the store does not answer, no work is done.
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    words[5] = str(tmp_path / "other")
    assert cli.run([*words, "--mlflow", f"{store}-other"]) == 1
    assert not (tmp_path / "other").exists()
    assert "MLflow: " in capsys.readouterr().err


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(CompressError, match="mlflow-skinny") as caught:
        mlflow_log.connect("file:///nowhere")
    assert caught.value.hint is not None and "compress-slm[mlflow]" in caught.value.hint


def test_a_measure_that_is_no_number_is_left_out() -> None:
    found = dict(mlflow_log._numbers({"a": float("nan"), "b": True, "c": "1", "d": {"e": 2}, "repeats": 3}, "x"))
    assert found == {"x.d.e": 2.0}
