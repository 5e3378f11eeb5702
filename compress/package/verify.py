"""Is an artifact what its manifest says, whole, unchanged, and without a way out of its directory?

Everything that is wrong is told, not only the first. The files are hostile until checked: they are listed without
following a link, read in chunks or up to a bound, and none of the weights is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import CompressError, UsageError, printable
from compress.package import sbom, signing
from compress.package.manifest import NAME, SCHEMA_VERSION, SIGNATURE_NAME, measured
from compress.package.manifest_schema import Manifest, parse_manifest
from compress.package.onnx_check import GRAPH_SUFFIX, check_graphs
from compress.package.tree import Tree, name_fault, scan, sha256
from compress.report import json as report_json
from compress.report.model import SCHEMA_VERSION as REPORT_VERSION
from compress.report.model import DecoderDrift, Report
from compress.source.files import MAX_INDEX_BYTES, read_json_object

GENAI_NAME = "genai_config.json"
#: What a verdict makes of an artifact's status.
STATUS = {"pass": "accepted", "fail": "rejected"}
#: Characters of a line that are shown.
MAX_SHOWN = 400
_UPGRADE = "upgrade compress"


@dataclass(frozen=True)
class Problem:
    """Something wrong.

    Attributes:
        kind: One of :data:`KINDS`.
        file: The file concerned, by its name in the artifact.
        message: A sentence.
    """

    kind: str
    file: str
    message: str


#: Kinds of problems, and what they are.
KINDS = {
    "manifest": "the manifest is missing, too large, or not of its schema",
    "newer-schema": "written by a newer compress",
    "name": "the manifest lists a name that is refused, or one twice",
    "missing": "a listed file is not there",
    "extra": "a file is there that is not listed",
    "symlink": "a symbolic link",
    "special": "a pipe, socket or device",
    "size": "a file has another size",
    "digest": "a file has other bytes",
    "report": "the report is damaged, or contradicts the manifest",
    "status": "the status is not what the report's verdict makes it",
    "onnx": "a graph that ONNX's checker refuses",
    "external-data": "a graph refers to a place outside, or beyond the end of a file",
    "config": "genai_config.json names a graph that is not here",
    "sbom": "the bill of materials is damaged, or contradicts the manifest",
    "unsigned": "a signature was asked for, there is none",
    "signature": "the signature does not hold",
}


@dataclass
class Verification:
    """What was found; ``signature`` is ``absent``, ``not checked``, ``valid`` or ``invalid``."""

    artifact: Path
    problems: list[Problem] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    manifest_status: str | None = None
    signature: str = "absent"
    signer: str | None = None

    @property
    def ok(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.problems

    def add(self, kind: str, file: str, message: str) -> None:
        """Note a problem."""
        assert kind in KINDS
        self.problems.append(Problem(kind, file, message))

    def document(self) -> dict[str, Any]:
        """Return it for ``--json``."""
        return {
            "schema_version": 1,
            "status": "ok" if self.ok else "failed",
            "manifest_status": self.manifest_status,
            "files": self.files,
            "bytes": self.bytes,
            "signature": {"state": self.signature, "signer": self.signer},
            "problems": [vars(problem) for problem in self.problems],
        }


def verify(artifact: Path, trust: signing.Trust | None = None) -> Verification:
    """Check an artifact.

    Args:
        artifact: Its directory.
        trust: Whom to believe; without it a signature is not checked.

    Raises:
        CompressError: There is no such directory, or ``model-signing`` is needed and missing.
        UsageError: A key or certificate to trust cannot be read.
    """
    if not artifact.is_dir():
        raise CompressError("there is no such artifact directory", where=str(artifact))
    result = Verification(artifact)
    tree = scan(artifact)
    result.files, result.bytes = len(tree.files), sum(tree.files.values())
    _check_kinds(tree, result)
    manifest = _manifest(artifact, tree, result)
    if manifest is not None:
        result.manifest_status = manifest.status
        _check_files(artifact, manifest, tree, result)
        _check_report(artifact, manifest, tree, result)
        _check_bill(artifact, manifest, tree, result)
    _check_graphs(artifact, tree, result)
    _check_signature(artifact, trust, tree, result)
    return result


def _check_kinds(tree: Tree, result: Verification) -> None:
    for name, target in tree.links.items():
        result.add("symlink", name, f"a symbolic link to {target!r}; an artifact holds its files itself")
    for name, kind in tree.special.items():
        result.add("special", name, f"a {kind}, not a regular file")


def _manifest(artifact: Path, tree: Tree, result: Verification) -> Manifest | None:
    """Return the manifest where it can be believed to be one."""
    if NAME not in tree.files:
        if NAME not in tree:
            result.add("manifest", NAME, "it is missing: this is no artifact of compress")
        return None
    path = artifact / NAME
    try:
        document = read_json_object(path, MAX_INDEX_BYTES)
        version = document.get("schema_version")
        if type(version) is int and version > SCHEMA_VERSION:
            result.add(
                "newer-schema", NAME, f"schema version {version}, this compress knows {SCHEMA_VERSION}: {_UPGRADE}"
            )
            return None
        return parse_manifest(document)
    except CompressError as error:
        result.add("manifest", NAME, error.what)
    return None


def _check_files(artifact: Path, manifest: Manifest, tree: Tree, result: Verification) -> None:
    listed: set[str] = set()
    for item in manifest.files:
        fault = _fault(item.name)
        if fault is None and item.name in listed:
            fault = "it is listed twice"
        if fault is not None:
            result.add("name", NAME, f"the name {item.name!r} is refused: {fault}")
            continue
        listed.add(item.name)
        if item.name not in tree.files:
            if not _behind(item.name, tree):  # told already
                result.add("missing", item.name, "listed in the manifest, not there")
            continue
        found = tree.files[item.name]
        if found != item.size:
            result.add("size", item.name, f"{found} bytes, the manifest says {item.size}")
            continue
        try:
            same = sha256(artifact / item.name) == item.sha256
        except CompressError as error:
            result.add("digest", item.name, error.what)
            continue
        if not same:
            result.add("digest", item.name, "its SHA-256 is not the manifest's: the bytes were changed")
    for name in sorted(tree.files.keys() - listed - {NAME, SIGNATURE_NAME}):
        result.add("extra", name, "not listed in the manifest")
    expected = sorted(name for name in listed if measured(name))
    if manifest.measured_files is not None and sorted(manifest.measured_files) != expected:
        result.add("manifest", NAME, f"measured_files is not {', '.join(expected) or 'empty'}")


def _fault(name: str) -> str | None:
    """Return why a manifest cannot list a name, ``None`` where it can."""
    return "it cannot be listed" if name in (NAME, SIGNATURE_NAME) else name_fault(name)


def _behind(name: str, tree: Tree) -> bool:
    """Return whether a name is, or lies behind, something that is no regular file."""
    parts = name.split("/")
    return any("/".join(parts[:count]) in tree for count in range(1, len(parts) + 1))


def _check_report(artifact: Path, manifest: Manifest, tree: Tree, result: Verification) -> None:
    if report_json.NAME not in tree.files:
        if manifest.status != "built" and report_json.NAME not in tree:
            result.add(
                "status", report_json.NAME, f"the status is {manifest.status}, and there is no report to show why"
            )
        return
    report = _read_report(artifact / report_json.NAME, result)
    if report is None:
        return
    expected = STATUS[report.verdict.status]
    if manifest.status != expected:
        result.add("status", NAME, f"the verdict is {report.verdict.status}, but the status is {manifest.status}")
    if (report.verdict.status == "pass") == bool(report.verdict.reasons):
        result.add("report", report_json.NAME, "the verdict contradicts its reasons")
    failed = [item.provider for item in report.providers if item.verdict.status == "fail"]
    if failed and report.verdict.status == "pass":
        result.add("report", report_json.NAME, f"the verdict is pass, but {failed[0]}'s is fail")
    if report.source is not None and report.source.identifier != manifest.source.id:
        result.add("report", report_json.NAME, f"it is about {report.source.identifier!r}, not {manifest.source.id!r}")
    positions = report.drift.positions if isinstance(report.drift, DecoderDrift) else None
    listed = {item.name: item.sha256 for item in manifest.files}
    if positions is not None and listed.get(positions.file) != positions.sha256:
        result.add("report", report_json.NAME, f"the {positions.file} that it tells of is another one, or not here")
    if report.profile is not None and report.profile.name != manifest.profile.get("name"):
        result.add("report", report_json.NAME, f"it is about the profile {report.profile.name!r}")


def _read_report(path: Path, result: Verification) -> Report | None:
    try:
        version = read_json_object(path, MAX_INDEX_BYTES).get("schema_version")
        if type(version) is int and version > REPORT_VERSION:
            result.add(
                "newer-schema", path.name, f"schema version {version}, this compress knows {REPORT_VERSION}: {_UPGRADE}"
            )
            return None
        return report_json.read(path)
    except CompressError as error:
        result.add("report", path.name, error.what)
        return None


def _check_bill(artifact: Path, manifest: Manifest, tree: Tree, result: Verification) -> None:
    if sbom.NAME not in tree.files:
        return  # where it is listed, that it is missing is told already; an older compress wrote none
    try:
        billed = sbom.read_digests(artifact / sbom.NAME)
    except CompressError as error:
        result.add("sbom", sbom.NAME, error.what)
        return
    # A refused name is told already.
    listed = {item.name: item.sha256 for item in manifest.files if sbom.listed(item.name) and _fault(item.name) is None}
    for name in sorted(billed.keys() | listed.keys()):
        if billed.get(name) != listed.get(name):
            result.add("sbom", sbom.NAME, f"it and the manifest do not agree on {name!r}")


def _check_graphs(artifact: Path, tree: Tree, result: Verification) -> None:
    graphs = sorted(name for name in tree.files if name.endswith(GRAPH_SUFFIX))
    for name, kind, message in check_graphs(artifact, graphs, tree):
        result.add(kind, name, message)
    if GENAI_NAME not in tree.files:
        return
    try:
        named = sorted(set(_filenames(read_json_object(artifact / GENAI_NAME, MAX_INDEX_BYTES).get("model"))))
    except CompressError as error:
        result.add("config", GENAI_NAME, error.what)
        return
    for name in named:
        fault = name_fault(name)
        if fault is None and name not in tree.files:
            fault = "it is not there"
        if fault is not None:
            result.add("config", GENAI_NAME, f"the graph {name!r} is refused: {fault}")


def _filenames(value: object) -> Iterator[str]:
    """Yield what any ``filename`` inside a document says."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "filename":
                yield str(inner)
            else:
                yield from _filenames(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _filenames(inner)


def _check_signature(artifact: Path, trust: signing.Trust | None, tree: Tree, result: Verification) -> None:
    present = SIGNATURE_NAME in tree.files
    if trust is None or not trust.wanted:
        result.signature = "not checked" if present else "absent"
        return
    if not present:
        result.add("unsigned", SIGNATURE_NAME, "a signature was asked for, there is none")
        return
    try:
        result.signer = signing.verify_signature(artifact, trust)
        result.signature = "valid"
    except (UsageError, signing.MissingLibraryError):
        raise
    except CompressError as error:
        result.signature = "invalid"
        result.add("signature", SIGNATURE_NAME, error.what)


def text(result: Verification) -> Iterator[str]:
    """Yield a line a problem, and one about all of it."""
    for problem in result.problems:
        yield printable(f"{problem.kind:<14} {problem.file}: {problem.message}", MAX_SHOWN)
    signed = {"valid": f"signed by {result.signer}", "not checked": "signed, which was not checked"}
    size = f"{result.files} files, {result.bytes:,} bytes, status {result.manifest_status or 'unknown'}"
    about = f"{size}, {signed.get(result.signature, 'no valid signature' if result.problems else 'not signed')}"
    count = len(result.problems)
    outcome = "ok" if result.ok else f"failed: {count} problem{'s' if count > 1 else ''}"
    yield printable(f"{outcome} ({about})", MAX_SHOWN)
