"""The schema of ``manifest.json``, version 1: what a file that somebody else may have written has to look like.

Names of files are checked apart (:func:`compress.package.tree.name_fault`), so that each bad one is told by itself.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from compress.errors import CompressError
from compress.package.manifest import NAME
from compress.report.model import TensorRecord

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class File(_Strict):
    """A file by its name relative to the directory, ``/`` between parts; its size is in bytes."""

    name: str
    size: Annotated[int, Field(ge=0)]
    sha256: Sha256


class Source(_Strict):
    """Where the weights came from; ``files`` are those that were read."""

    kind: str
    id: str
    revision: str | None
    files: list[File]
    adapter: dict[str, Any] | None = None


class Manifest(_Strict):
    """All of it. ``measured_files`` is absent where an older compress wrote the manifest."""

    schema_version: Literal[1]
    status: Literal["built", "accepted", "rejected"]
    source: Source
    profile: dict[str, Any]
    seed: int
    tools: dict[str, str]
    files: list[File]
    measured_files: list[str] | None = None
    task: str | None = None
    fusions: dict[str, int] = Field(default_factory=dict)
    targets: list[str] = Field(default_factory=list)
    tensors: list[TensorRecord] = Field(default_factory=list)
    pruning: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    allocation: dict[str, Any] | None = None


def parse_manifest(document: dict[str, Any]) -> Manifest:
    """Check a manifest.

    Raises:
        CompressError: A key is missing, unknown or malformed; the first one is named.
    """
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the document"
        raise CompressError(f"{key}: {first['msg']}", where=NAME) from None
