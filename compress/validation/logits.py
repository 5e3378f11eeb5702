"""Logits on disk: float32 ``.npy`` files ``[tokens, vocab]`` written and read in pieces, never mapped or held whole.

A mapped file counts as resident memory while its pages are warm; plain reads and writes do not.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from compress.errors import CompressError, ResourceError

FloatArray = npt.NDArray[np.float32]
DISK_RESERVE = 64 << 20


class Rows(Protocol):
    """What drift needs of an array of logits: an array is one, so is :class:`LogitsFile`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(tokens, vocab)``."""
        ...

    def __getitem__(self, rows: slice, /) -> FloatArray:
        """Return some rows."""
        ...


class LogitsWriter:
    """A file of ``[rows, columns]`` to be filled in any order; a context manager."""

    def __init__(self, path: str | Path, rows: int, columns: int) -> None:
        self.shape = (rows, columns)
        self._stream = Path(path).open("wb")  # noqa: SIM115 - closed by __exit__
        header = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self._stream, header)
        self._stream.flush()
        self._start = self._stream.tell()
        os.ftruncate(self._stream.fileno(), self._start + 4 * rows * columns)

    def write(self, row: int, column: int, block: FloatArray) -> None:
        """Put ``block`` float32 ``[r, c]`` at ``(row, column)``."""
        rows, columns = self.shape
        if row + block.shape[0] > rows or column + block.shape[1] > columns:
            raise CompressError(f"logits {list(block.shape)} at {(row, column)} do not fit in {list(self.shape)}")
        block = np.ascontiguousarray(block, dtype="<f4")
        lines = [block] if block.shape[1] == columns else list(block)
        for index, line in enumerate(lines):
            self._put(self._start + 4 * ((row + index) * columns + column), line.tobytes())

    def _put(self, offset: int, data: bytes) -> None:
        while data:
            written = os.pwrite(self._stream.fileno(), data, offset)
            data, offset = data[written:], offset + written

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


class LogitsFile:
    """A file of logits, read by slices of rows.

    Args:
        path: A float32 .npy of two dimensions.
        rows: Which rows it shows, in order; all of them by default.

    Raises:
        CompressError: The file is something else.
    """

    def __init__(self, path: Path, rows: npt.NDArray[np.int64] | None = None) -> None:
        self._path = path
        with path.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            self._start = stream.tell()
        if version != (1, 0) or fortran or dtype != np.dtype("<f4") or len(shape) != 2:
            raise CompressError("these are not logits", where=str(path))
        self._columns = int(shape[1])
        self._rows = rows
        self.shape: tuple[int, ...] = (int(shape[0]) if rows is None else len(rows), self._columns)

    def __getitem__(self, rows: slice) -> FloatArray:
        """Return rows ``[start, stop)`` as a new array."""
        start, stop, _ = rows.indices(self.shape[0])
        with self._path.open("rb") as stream:
            if self._rows is None:
                return self._read(stream.fileno(), start, stop - start)
            chosen = self._rows[start:stop]
            return np.concatenate([self._read(stream.fileno(), int(row), 1) for row in chosen])

    def _read(self, descriptor: int, row: int, count: int) -> FloatArray:
        width = 4 * self._columns
        os.lseek(descriptor, self._start + row * width, os.SEEK_SET)
        values = np.empty((count, self._columns), "<f4")
        view, done = values.reshape(-1).view(np.uint8).data, 0
        while done < len(view):
            got = os.readv(descriptor, [view[done:]])
            if got == 0:
                raise CompressError("the logits end too early", where=str(self._path))
            done += got
        return values


def check_disk(directory: Path, needed: int) -> None:
    """Refuse work whose files do not fit.

    Raises:
        ResourceError: ``directory``'s file system has less than ``needed`` bytes and a reserve.
    """
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if free < needed + DISK_RESERVE:
        raise ResourceError(
            f"validation needs {needed / 1e9:.1f} GB of disk for logits, {free / 1e9:.1f} GB are free",
            where=str(directory),
            hint="free some space, set TMPDIR to a larger file system, or validate on fewer tokens",
        )
