"""An export or a validation as a run of MLflow: parameters, what was measured, and both documents as artifacts.

The client is ``mlflow-skinny``. Whether it is there and answers is found out before work starts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.package.manifest import NAME as MANIFEST_NAME
from compress.package.sbom import flattened

EXPERIMENT = "compress"
DOCUMENTS = ("report.json", "report.html", "sbom.cdx.json", MANIFEST_NAME)
#: MLflow's own limits: https://mlflow.org/docs/latest/api_reference/rest-api.html
MAX_VALUE, MAX_BATCH = 6000, 100
#: What a report says of the run itself; the rest of its numbers are measures.
_MEASURES = ("size", "drift", "speed", "placement")
_NO_METRICS = ("repeats", "threads", "edges", "counts", "points", "baselines", "prompt_tokens", "new_tokens")


@dataclass(frozen=True)
class Tracking:
    """A tracking server or store that answered, and the experiment in it."""

    client: Any
    experiment: str
    uri: str

    def log(self, artifact: Path, manifest: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
        """Log a run about an artifact and return its id.

        Args:
            artifact: Its directory; its documents are logged from it.
            manifest: Its manifest.
            report: Its report; ``None`` where nothing was validated.

        Raises:
            CompressError: The store refuses it, or does not answer any more; the artifact stays.
        """
        from mlflow.entities import Metric, Param, RunTag

        with _explained(self.uri):
            run = self.client.create_run(self.experiment, run_name=artifact.resolve().name).info
            params = [Param(key, value[:MAX_VALUE]) for key, value in parameters(manifest)]
            values = [Metric(key, value, run.start_time, 0) for key, value in metrics(report or {}, artifact, manifest)]
            tags = [RunTag("compress.status", str(manifest["status"]))]
            for start in range(0, max(len(params), len(values), 1), MAX_BATCH):
                part = slice(start, start + MAX_BATCH)
                self.client.log_batch(
                    run.run_id, metrics=values[part], params=params[part], tags=tags if start == 0 else []
                )
            for name in DOCUMENTS:
                if (artifact / name).is_file():
                    self.client.log_artifact(run.run_id, str(artifact / name))
            self.client.set_terminated(run.run_id)
        return str(run.run_id)


def connect(uri: str) -> Tracking:
    """Reach a tracking server or store, and make the experiment ``compress`` in it where it is missing.

    Raises:
        CompressError: ``mlflow-skinny`` is not installed, or the store does not answer.
    """
    # Usage statistics are the user's to send, not ours: the client would post them to its makers.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise CompressError(
            f"logging needs the package mlflow-skinny: {error}", hint="pip install 'compress-slm[mlflow]'"
        ) from None
    with _explained(uri):
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(EXPERIMENT)
        experiment = client.create_experiment(EXPERIMENT) if found is None else found.experiment_id
    return Tracking(client, experiment, uri)


def parameters(manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what decided the artifact: the source, the seed, the resolved profile and versions, dotted keys."""
    source = manifest["source"]
    yield "model", str(source["id"])
    yield "model_kind", str(source["kind"])
    if source.get("revision"):
        yield "model_revision", str(source["revision"])
    if manifest.get("task"):
        yield "task", str(manifest["task"])
    yield "seed", str(manifest["seed"])
    yield from flattened(manifest["profile"], "profile")
    for name, version in sorted(manifest["tools"].items()):
        yield f"version.{name}", str(version)


def metrics(report: Mapping[str, Any], artifact: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield what was measured, dotted keys: ``drift.kl_divergence.mean``, ``speed.cpu.load_seconds``.

    What was not measured has no entry. ``files_bytes`` is of all files of the artifact.
    """
    yield "files_bytes", float(sum(item["size"] for item in manifest["files"]))
    for key in _MEASURES:
        value = report.get(key)
        if isinstance(value, Mapping):
            yield from _numbers(value, key)
        for item in value if isinstance(value, list) else ():
            yield from _numbers(item, f"{key}.{item['provider']}")
    if report:
        yield "passed", float(report["verdict"]["status"] == "pass")


def _numbers(value: object, prefix: str) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers inside mappings; what a run was asked for is no measure."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _NO_METRICS:
                yield from _numbers(inner, f"{prefix}.{key}")
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield prefix, float(value)


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Tell what MLflow complains of: it raises its own errors, requests' and the operating system's."""
    try:
        yield
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise CompressError(f"MLflow: {first or type(error).__name__}", where=uri, hint="check --mlflow") from error
