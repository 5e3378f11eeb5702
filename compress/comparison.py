"""Reads what ``compress compare`` puts side by side: an artifact, or a report alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.errors import CompressError
from compress.inspection import inspect_document, source_files
from compress.report import json as report_json
from compress.report.compare_model import Side, StoredFile, StoredTensor
from compress.report.model import DecoderDrift, Report
from compress.validation import losses
from compress.validation.artifact import model_bytes


def read_side(path: Path) -> Side:
    """Read an artifact's directory, or a ``report.json``.

    Raises:
        CompressError: It is neither, or something of it is damaged.
    """
    try:
        return _artifact(path) if path.is_dir() else _report_alone(path)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise CompressError(f"the manifest is damaged: {key}: {first['msg']}", where=str(path)) from None


def _report_alone(path: Path) -> Side:
    if not path.exists():
        raise CompressError(
            "there is no such artifact or report", where=str(path), hint="give an artifact's directory or a report.json"
        )
    report = report_json.read(path)
    return Side(
        name=str(path),
        kind="report",
        status=None,
        task=_task(report),
        artifact_bytes=report.size.artifact_bytes,
        versions=report.environment.versions,
        tensors=_of_report(report),
        **_of_source(report),
        **_losses(report, path.parent),
    )


def _losses(report: Report, directory: Path) -> dict[str, Any]:
    """Return a decoder's losses by position, from the file beside its report, or why there are none."""
    drift = report.drift
    if not isinstance(drift, DecoderDrift):
        return {}
    if drift.positions is None:
        return {"no_losses": "its report names none"}
    path = directory / losses.NAME
    if not path.is_file() or path.is_symlink():
        return {"no_losses": f"{losses.NAME} is not beside its report"}
    return {"losses": losses.read(path, drift.positions, windows=drift.windows, tokens=drift.tokens)}


def _artifact(path: Path) -> Side:
    document = inspect_document(path)
    report = report_json.read(path / report_json.NAME) if (path / report_json.NAME).is_file() else None
    graph = None if document["graph"] is None else path / document["graph"]
    if graph is None and report is not None:
        return _report_alone(path / report_json.NAME)
    assert graph is not None, "inspecting refuses a directory without graph and report"
    source: Mapping[str, Any] = document["source"] or {}
    profile: Mapping[str, Any] = document["profile"] or {}
    known = {**_of_source(report), **_losses(report, path)} if report is not None else {}
    if source:
        adapter = source.get("adapter")
        known |= {
            "source": source.get("id"),
            "revision": source.get("revision"),
            "adapter": adapter.get("directory") if isinstance(adapter, Mapping) else None,
        }
    known |= {"profile": profile.get("name"), "resolved": profile} if profile else {}
    blank: dict[str, Any] = {
        key: None for key in ("source", "revision", "adapter", "profile", "created", "verdict", "report")
    }
    return Side(
        **{
            **blank,
            **known,
            "name": str(path),
            "kind": "artifact",
            "status": document["status"],
            "task": document["task"] or (_task(report) if report is not None else None),
            "seed": document["seed"],
            "artifact_bytes": model_bytes(graph),
            "versions": document["tools"] or (report.environment.versions if report is not None else {}),
            "source_files": source_files(path),
            "files": {
                item["name"]: StoredFile(bytes=item["size"], sha256=item["sha256"])
                for item in document["files"]
                if item["sha256"] is not None
            },
            "tensors": () if report is None else _of_report(report),
            "graph_tensors": tuple(_of_graph(document["tensors"])),
        }
    )


def _of_source(report: Report) -> dict[str, Any]:
    source, profile = report.source, report.profile
    return {
        "source": source.identifier if source else None,
        "revision": source.revision if source else None,
        "adapter": source.adapter if source else None,
        "profile": profile.name if profile else None,
        "resolved": profile.resolved if profile else {},
        "created": report.created,
        "verdict": report.verdict,
        "report": report,
    }


def _task(report: Report) -> str | None:
    return None if report.drift is None else getattr(report.drift, "task", "text-generation")


def _of_report(report: Report) -> tuple[StoredTensor, ...]:
    return tuple(StoredTensor.model_validate(item.model_dump()) for item in report.tensors)


def _of_graph(tensors: list[dict[str, Any]]) -> list[StoredTensor]:
    keys = ("name", "role", "layer", "storage", "bits", "bytes")
    return [StoredTensor.model_validate({key: item[key] for key in keys}) for item in tensors]
