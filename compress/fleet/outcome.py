"""What a job left: read from its artifact, where the artifact is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import EXIT_OK, EXIT_OUTSIDE_BUDGET, EXIT_PROVIDER, CompressError
from compress.fleet.model import Loss, Outcome, Timing
from compress.package import manifest
from compress.package.manifest_schema import Manifest, parse_manifest
from compress.package.tree import sha256
from compress.package.verify import verify
from compress.report import json as report_json
from compress.report.model import AnyDrift, DecoderDrift, EncoderDrift, Report, Speed


def read(directory: Path) -> Outcome:
    """Return what an artifact says of itself.

    Raises:
        CompressError: It is no artifact, or its manifest or report is damaged.
    """
    found = parse_manifest(manifest.read_manifest(directory))
    path = directory / report_json.NAME
    report = report_json.read(path) if path.is_file() else None
    told: dict[str, Any] = {
        "status": found.status,
        "manifest_sha256": sha256(directory / manifest.NAME),
        "digest": digest(found),
    }
    if report is None:
        return Outcome(**told, exit_code=EXIT_OK, model_bytes=_model_bytes(directory, found))
    peaks = [stage.peak_rss_bytes for stage in report.stages if stage.peak_rss_bytes is not None]
    return Outcome(
        **told,
        exit_code=_exit_code(report),
        reasons=report.verdict.reasons,
        model_bytes=report.size.artifact_bytes,
        source_bytes=report.size.source_bytes,
        loss=None if report.drift is None else _loss(report.drift),
        timing=_timing(report),
        peak_rss_bytes=max(peaks, default=None),
    )


def digest(found: Manifest) -> str:
    """Return one SHA-256 over the files that are not measurements.

    It is that of the lines ``SHA256  NAME`` in the names' order, as ``sha256sum`` prints them.
    """
    lines = sorted((item.name, item.sha256) for item in found.files if not manifest.measured(item.name))
    return hashlib.sha256("".join(f"{value}  {name}\n" for name, value in lines).encode()).hexdigest()


def still_there(directory: Path, expected: Outcome) -> bool:
    """Return whether an artifact is the one that was recorded, every file of its manifest included.

    Files that the manifest does not list may have been added.
    """
    try:
        same = sha256(directory / manifest.NAME) == expected.manifest_sha256
    except CompressError:
        return False
    return same and all(problem.kind == "extra" for problem in verify(directory).problems)


def _model_bytes(directory: Path, found: Manifest) -> int:
    from compress.validation.artifact import model_bytes

    graph = directory / "model.onnx"
    return model_bytes(graph) if graph.is_file() else sum(item.size for item in found.files)


def _exit_code(report: Report) -> int:
    if report.passed:
        return EXIT_OK
    at_fault = any(item.state in ("fell_back", "failed") for item in report.providers)
    return EXIT_PROVIDER if at_fault else EXIT_OUTSIDE_BUDGET


def _loss(drift: AnyDrift) -> Loss | None:
    """Return one number for what was lost: the divergence, else the distance of embeddings, else other labels."""
    text = drift.eval_text.sha256
    if isinstance(drift, DecoderDrift):
        kl = drift.kl_divergence
        return Loss(measure="kl", value=kl.mean, standard_error=kl.standard_error, text=text, items=drift.tokens)
    return _encoder_loss(drift, text)


def _encoder_loss(drift: EncoderDrift, text: str) -> Loss | None:
    found: Mapping[str, Any] | None = None
    if drift.kl_divergence is not None:
        found = {
            "measure": "kl",
            "value": drift.kl_divergence.mean,
            "standard_error": drift.kl_divergence.standard_error,
        }
    elif drift.cosine is not None:
        error = drift.cosine.standard_error
        found = {"measure": "cosine_distance", "value": max(0.0, 1 - drift.cosine.mean), "standard_error": error}
    elif drift.label_agreement is not None:
        error = drift.label_agreement_error
        found = {"measure": "label_disagreement", "value": 1 - drift.label_agreement, "standard_error": error}
    return None if found is None else Loss(**found, text=text, items=drift.items)


def _timing(report: Report) -> Timing | None:
    """Return the first provider's speed, ``None`` where nothing ran on real hardware."""
    speed = next((item for item in report.speed if item.evidence == "measured"), None)
    if speed is None:
        return None
    shared: dict[str, Any] = {
        "provider": speed.provider,
        "machine": f"{report.environment.cpu}, {report.environment.cores} cores, {speed.device}",
        "threads": speed.threads,
        "speedup_vs_pytorch": speed.speedup_vs_pytorch,
        "speedup_vs_onnx_float": speed.speedup_vs_onnx_float,
    }
    if isinstance(speed, Speed):
        work = f"{speed.new_tokens} tokens after {speed.prompt_tokens}"
        return Timing(value=speed.decode_tokens_per_second.median, unit="tokens/s", work=work, **shared)
    return Timing(value=speed.latency_ms.p50, unit="ms", work=f"{speed.batch} x {speed.length} tokens", **shared)
