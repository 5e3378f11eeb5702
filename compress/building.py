"""What of a build is finished, told to the journal as it goes, and what of an earlier run's build still holds.

Three things must be the same before anything is used again: the basis (command, texts, versions, processor), the
source's files, and the places that the plan gives to tensors.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import platform
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.contracts import Checkpoint, SourceFile
from compress.errors import SourceError
from compress.kept import Kept
from compress.package.manifest import tool_versions
from compress.package.staging import sync
from compress.package.tree import sha256
from compress.package.writer import DataFile
from compress.planning import Plan
from compress.profile import Profile
from compress.report.environment import processor
from compress.report.model import TensorRecord
from compress.store import AnyArray
from compress.stored_errors import StoredErrors

if TYPE_CHECKING:
    from compress.pipeline import ExportOptions, ModelReference
    from compress.workspace import Workspace

DATA_NAME = "model.onnx.data"
_SOURCE, _DIGESTS, _LAYOUT, _WEIGHTS, _BUILT = "source", "digests", "layout", "weights", "built"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Built:
    """What a build left to say: how often each graph rule fired, what calibration found, and how weights are stored."""

    fired: Mapping[str, int]
    calibration: Mapping[str, Any] | None
    tensors: tuple[TensorRecord, ...]


# --------------------------------------------------------------------------------------------- what results depend on


def basis(model: ModelReference, checkpoint: Checkpoint, profile: Profile, options: ExportOptions) -> dict[str, Any]:
    """Return everything but the source's files that a build's bytes depend on, and so its unfinished parts."""
    request = model.as_request()
    if Path(request["reference"]).exists():
        request["reference"] = str(Path(request["reference"]).resolve())
    return {
        "model": {**request, "revision": checkpoint.revision},
        "profile": profile.model_dump(mode="json"),
        "seed": options.seed,
        "calibration text": None if options.calibration_text is None else sha256(options.calibration_text),
        "versions": {**tool_versions(), "code": _code(), "python": platform.python_version()},
        # Kernels of other instruction sets sum in another order: halves of two machines are nobody's bytes.
        "processor": processor(),
    }


def proof_basis(options: ExportOptions) -> dict[str, Any]:
    """Return what the proof depends on and the build does not."""
    given = {"eval_text": options.eval_text, "eval_labels": options.eval_labels}
    return {"validate": options.validate, **{name: path and sha256(path) for name, path in given.items()}}


def _code() -> str:
    """Return a digest of this package's own source: a version under development has many."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def check_source(space: Workspace, source: Checkpoint) -> None:
    """Drop an earlier run's work where the source's files have changed since; remember how they are now.

    Files that were only touched or copied again count as the same where their digests are known to be.
    """
    kept, stamps = space.kept, _listed(source.stamps())
    before = kept.value(_SOURCE)
    if before is not None and before != stamps:
        digests = kept.value(_DIGESTS)
        if digests is None or digests != _digests(source.files()):
            _log.warning("the model's files have changed since an earlier run read them: starting over")
            space.restart()
            before = None
    if before != stamps:
        kept.keep(_SOURCE, stamps)


def digests(source: Checkpoint, kept: Kept) -> Future[Sequence[SourceFile]]:
    """Start digesting the source's files in a thread, and keep the digests; nothing waits for it on a failure."""
    found: Future[Sequence[SourceFile]] = Future()

    def work() -> None:
        try:
            files = source.files()
            kept.keep(_DIGESTS, _digests(files))
            found.set_result(files)
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            found.set_exception(error)

    threading.Thread(target=work, name="digest", daemon=True).start()
    return found


def require_unchanged(source: Checkpoint, kept: Kept) -> None:
    """Refuse a source that was written to while it was read: nobody knows which of its bytes went where.

    Raises:
        SourceError: Which file.
    """
    before, now = kept.value(_SOURCE), _listed(source.stamps())
    if before == now:
        return
    changed = [item[0] for item in now if item not in (before or [])]
    raise SourceError(
        "the model changed while it was read",
        where=", ".join(changed[:3]) or source.identifier,
        hint="export again, from files that nobody writes to",
    )


def _listed(stamps: Mapping[str, tuple[int, ...]]) -> list[list[Any]]:
    return [[name, *numbers] for name, numbers in sorted(stamps.items())]


def _digests(files: Sequence[SourceFile]) -> list[list[Any]]:
    return [[item.name, item.size, item.sha256] for item in files]


# --------------------------------------------------------------------------------------------------- parts of a build


class Weights:
    """The weights that are finished, an earlier run's among them.

    Attributes:
        names: An earlier run's.
        inline: Their tensors that are not in the data file.
    """

    def __init__(self, kept: Kept | None, errors: StoredErrors) -> None:
        self._kept, self._errors = kept, errors
        self.names: set[str] = set()
        self.inline: dict[str, AnyArray] = {}
        for entry in [] if kept is None else kept.values(_WEIGHTS):
            self.names.update(entry["names"])
            errors.restore(entry["errors"])
            self.inline.update({name: _array(told) for name, told in entry["inline"].items()})

    def add(self, names: Sequence[str], inline: Mapping[str, AnyArray]) -> None:
        """Take note of finished weights, and of their tensors that are not in the data file."""
        if self._kept is None:
            return
        small = {name: _text(array) for name, array in inline.items()}
        rows = {name: self._errors.rows(name) for name in names}
        self._kept.keep(_WEIGHTS, {"names": list(names), "errors": rows, "inline": small})


def _text(array: AnyArray) -> list[Any]:
    return [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]


def _array(told: Sequence[Any]) -> AnyArray:
    dtype, shape, content = told
    return np.frombuffer(base64.b64decode(content), dtype).reshape(shape).copy()


@contextmanager
def claimed(path: Path, plan: Plan, kept: Kept | None) -> Iterator[DataFile]:
    """Yield the data file: an earlier run's where every tensor has its place in it still, else a new one."""
    if kept is None:
        with DataFile(path, plan.data_bytes) as data:
            yield data
        return
    layout = {"bytes": plan.data_bytes, "digest": _layout(plan)}
    before = kept.value(_LAYOUT)
    whole = before == layout and path.is_file() and path.stat().st_size == plan.data_bytes
    if before is not None and not whole:
        kept.forget_from(_LAYOUT)
    with DataFile.claim(path, plan.data_bytes, kept=whole) as data:
        if not whole:
            kept.keep(_LAYOUT, layout)  # only now: a file without its space is none to go on with
        yield data


def _layout(plan: Plan) -> str:
    places = [[part.name, part.dtype, list(part.shape), part.offset] for fate in plan.fates for part in fate.stored]
    schemes = [[fate.name, repr(fate.scheme)] for fate in plan.fates]
    return hashlib.sha256(json.dumps([places, schemes]).encode()).hexdigest()


def built(kept: Kept | None, directory: Path) -> Built | None:
    """Return an earlier run's build, its files alone in the directory; ``None`` where it is unfinished.

    Of an unfinished one the data file stays, wherever a packaging target has moved it.
    """
    if kept is None:
        return None
    told = kept.value(_BUILT)
    if told is not None and all((directory / name).is_file() for name in told["files"]):
        clear(directory, set(told["files"]))
        tensors = tuple(TensorRecord.model_validate(item) for item in told["tensors"])
        return Built(told["fired"], told["calibration"], tensors)
    _bring_back(directory, kept.value(_LAYOUT))
    clear(directory, {DATA_NAME})
    return None


def keep_built(kept: Kept | None, directory: Path, made: Built) -> None:
    """Take note of a finished build, whose files are on the disk then."""
    if kept is None:
        return
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    kept.keep(
        _BUILT,
        {
            "fired": dict(made.fired),
            "calibration": None if made.calibration is None else dict(made.calibration),
            "tensors": [item.model_dump(mode="json") for item in made.tensors],
            "files": [path.relative_to(directory).as_posix() for path in files],
        },
    )


def clear(directory: Path, keep: set[str]) -> None:
    """Remove everything from a directory but the files of these names, relative to it."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(directory).as_posix() not in keep:
            path.unlink()


def _bring_back(directory: Path, layout: Mapping[str, Any] | None) -> None:
    data = directory / DATA_NAME
    if layout is None or data.exists():
        return
    moved = [path for path in directory.rglob("*_data") if path.stat().st_size == layout["bytes"]]
    if len(moved) == 1:
        moved[0].rename(data)
