"""A decoder's losses position by position, in ``drift.npz`` beside the report: what a paired comparison is made of.

Two artifacts of a source err alike: the same words are hard for both. The difference of two means has the error of the
positions' *differences*, a few times less than the means' own, and only positions tell it.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from compress.errors import CompressError
from compress.package.staging import write_file
from compress.report.model import Positions

NAME = "drift.npz"
#: Positions of the largest file that is written or read: 32 MiB of losses.
MAX_POSITIONS = 1 << 22
_HEADER_BYTES = 4096


@dataclass(frozen=True)
class Losses:
    """Losses in nats: ``nll`` of the text's own next token, ``kl`` from the source; float32 ``[windows, length - 1]``.

    ``windows_sha256`` is :func:`digest`'s of the token ids.
    """

    nll: npt.NDArray[np.float32]
    kl: npt.NDArray[np.float32]
    windows_sha256: str

    def write(self, directory: Path) -> Positions | None:
        """Write ``drift.npz`` and return what the report says of it, ``None`` past :data:`MAX_POSITIONS`."""
        if self.nll.size > MAX_POSITIONS:
            (directory / NAME).unlink(missing_ok=True)
            return None
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, nll=self.nll.astype("<f4"), kl=self.kl.astype("<f4"))
        content = stream.getvalue()
        write_file(directory / NAME, content)
        return Positions(sha256=hashlib.sha256(content).hexdigest(), windows_sha256=self.windows_sha256)


def digest(windows: npt.NDArray[np.int64]) -> str:
    """Return the SHA-256 of token ids ``[windows, length]``, their shape among them."""
    ids = np.ascontiguousarray(windows, "<i8")
    return hashlib.sha256(f"{ids.shape}".encode() + ids.tobytes()).hexdigest()


def read(path: Path, record: Positions, *, windows: int, tokens: int) -> Losses:
    """Read the losses that a report tells of.

    Args:
        path: The file.
        record: What the report says of it.
        windows: How many windows the report says were measured.
        tokens: How many positions in all.

    Raises:
        CompressError: It is not the file that the report tells of, or damaged. Nothing is read past what ``tokens``
            positions take, and no more than :data:`MAX_POSITIONS`.
    """
    if not 0 < tokens <= MAX_POSITIONS or windows < 1 or tokens % windows:
        raise _damaged(path, f"the report tells of {tokens} positions in {windows} windows")
    try:
        with path.open("rb") as stream:
            limit = 2 * (4 * tokens + _HEADER_BYTES)
            content = stream.read(limit + 1)
    except OSError as error:
        raise CompressError(f"the losses cannot be read: {error.strerror}", where=str(path)) from error
    if len(content) > limit:
        raise _damaged(path, f"it is larger than {tokens} positions take")
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise _damaged(path, "it is not the one that the report tells of")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            shape = (windows, tokens // windows)
            nll, kl = _array(archive, "nll", shape, path), _array(archive, "kl", shape, path)
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, str(error)) from None
    return Losses(nll, kl, record.windows_sha256)


def _array(archive: zipfile.ZipFile, name: str, shape: tuple[int, int], path: Path) -> npt.NDArray[np.float32]:
    """Return a member; its header is judged before anything of its size is allocated."""
    entry = archive.getinfo(f"{name}.npy")
    size = 4 * math.prod(shape)
    if entry.compress_type != zipfile.ZIP_STORED or not size < entry.file_size <= size + _HEADER_BYTES:
        raise _damaged(path, f"{name} is stored otherwise than {list(shape)} numbers are")
    stream = io.BytesIO(archive.read(entry))
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise _damaged(path, f"{name} has another version of the format")
    found, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if found != shape or fortran or dtype != np.dtype("<f4"):
        raise _damaged(path, f"{name} is {dtype} {list(found)} where float32 {list(shape)} was expected")
    values = np.frombuffer(stream.read(), "<f4")
    if values.size != math.prod(shape) or not np.isfinite(values).all():
        raise _damaged(path, f"{name} has numbers that are missing or not finite")
    return values.reshape(shape)


def _damaged(path: Path, why: str) -> CompressError:
    return CompressError(
        f"the losses by position are damaged: {why}", where=str(path), hint="validate the artifact again"
    )
