"""The data file: space is claimed first, then every tensor is written at the offset that the plan gave it.

Because offsets are known before work starts, row chunks may be finished in any order by any thread and the bytes are
the same. The space is allocated up front, so a full disk is found out before hours of work, not after.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.errors import ResourceError

#: Free space asked for beyond the artifact itself: graph, tokenizer, reports.
_HEADROOM_BYTES = 64 << 20


class DataFile:
    """``model.onnx.data`` while it is written: claims ``size`` bytes, takes arrays at offsets, fsyncs on close."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            if size:
                _allocate(self._descriptor, size)
        except OSError as error:
            self.close(sync=False)
            path.unlink(missing_ok=True)
            if is_full(error):
                raise no_space(path.parent, size) from None
            raise

    @classmethod
    def claim(cls, path: Path, size: int, *, kept: bool) -> DataFile:
        """Open the file anew; where what is in it is ``kept``, and it has the size, as it is."""
        if kept and path.is_file() and path.stat().st_size == size:
            return cls.reopen(path)
        path.unlink(missing_ok=True)
        return cls(path, size)

    @classmethod
    def reopen(cls, path: Path) -> DataFile:
        """Open a file whose space was claimed, in another process that writes its share of it."""
        file = cls.__new__(cls)
        file.path = path
        file._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        return file

    def write(self, offset: int, array: npt.NDArray[Any]) -> None:
        """Write a C-contiguous array's bytes at ``offset``; safe from several threads.

        Raises:
            ResourceError: The disk is full after all (a file system that does not keep its promises).
        """
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        try:
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            if is_full(error):
                raise disk_full(self.path) from None
            raise

    def sync(self) -> None:
        """Flush what was written to the disk."""
        os.fdatasync(self._descriptor) if hasattr(os, "fdatasync") else os.fsync(self._descriptor)

    def close(self, *, sync: bool = True) -> None:
        """Flush to the disk (``sync``) and close; a second call does nothing."""
        if self._descriptor >= 0:
            try:
                if sync:
                    os.fsync(self._descriptor)
            finally:
                os.close(self._descriptor)
                self._descriptor = -1

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(sync=kind is None)


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:  # macOS: the file is extended, its blocks are claimed as they are written
        os.ftruncate(descriptor, size)


def existing_parent(path: Path) -> Path:
    """Return the nearest ancestor directory that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def require_space(directory: Path, needed: int) -> None:
    """Refuse before work starts when ``needed`` bytes and some headroom are not free.

    Raises:
        ResourceError: With what is needed and what is there.
    """
    if shutil.disk_usage(existing_parent(directory)).free < needed + _HEADROOM_BYTES:
        raise no_space(directory, needed + _HEADROOM_BYTES)


def is_full(error: OSError) -> bool:
    """Return whether an error says that a disk, a quota or a file has no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full(path: Path) -> ResourceError:
    """Return the error for a write that found no room."""
    return ResourceError(
        "no space is left on the disk", where=str(path), hint="free some space, or choose another place with -o"
    )


def no_space(directory: Path, needed: int) -> ResourceError:
    """Return the error for a full disk."""
    free = shutil.disk_usage(existing_parent(directory)).free
    return ResourceError(
        f"not enough disk space: {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free",
        where=str(directory),
        hint="free some space, or choose another place with -o",
    )
