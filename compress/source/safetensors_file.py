"""One safetensors file: the library checks the header, positioned reads bring the rows.

Format: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}``, then the data;
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.contracts import FloatArray, TensorInfo
from compress.errors import SourceError, did_you_mean
from compress.source.files import RandomAccessFile

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
#: A header of ten thousand tensors has a megabyte; read, it takes ten times its size.
MAX_HEADER_BYTES = 8 << 20
MAX_DIMENSIONS = 8
CHUNK_ELEMENTS = 1 << 18
_DAMAGED = "the file is truncated or damaged: download or copy it again"


class SafetensorsFile:
    """A safetensors file whose rows are read when asked for.

    Args:
        path: The file.
        label: The name an error message shows.

    Raises:
        SourceError: The file is not safetensors, is truncated, or its header lies.
    """

    def __init__(self, path: Path, label: str | None = None) -> None:
        self.label = label or path.name
        self._file = RandomAccessFile(path, self.label)
        try:
            header, self._data = self._read_header()
            self._begin = {name: int(entry["data_offsets"][0]) for name, entry in header.items()}
            self.tensors = {name: _info(name, entry, self.label) for name, entry in header.items()}
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """Return the header without metadata, and where the data begins."""
        if self._file.size < 8:
            raise SourceError("not a safetensors file: shorter than 8 bytes", where=self.label, hint=_DAMAGED)
        prefix = bytearray(8)
        self._file.read_into(0, memoryview(prefix), "the header's length")
        length = int.from_bytes(prefix, "little")
        if length > min(MAX_HEADER_BYTES, self._file.size - 8):
            raise SourceError(
                f"not a safetensors file, or truncated: its header claims {length} bytes",
                where=self.label,
                hint=_DAMAGED,
            )
        _validate(self._file.path, self.label)
        text = bytearray(length)
        self._file.read_into(8, memoryview(text), "the header")
        header = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, self.label))
        header.pop("__metadata__", None)
        return header, 8 + length

    def read(self, name: str, start: int = 0, stop: int | None = None) -> FloatArray:
        """Return rows ``[start, stop)`` of a tensor as a new C-contiguous float32 array.

        Temporaries stay below 1 MiB: float32 is read in place, 16-bit types through a small buffer.

        Raises:
            SourceError: Unknown tensor, rows outside it, an integer type, or a file shorter than its header says.
        """
        info = lookup(self.tensors, name, self.label)
        start, stop = row_range(info, start, stop, self.label)
        if info.dtype not in ITEM_BYTES:
            raise SourceError(f"tensor {name!r} is stored as {info.dtype}, which is not a float type", where=self.label)
        row = math.prod(info.shape[1:])
        out = np.empty((stop - start, *info.shape[1:]) if info.shape else (), dtype=np.float32)
        offset = self._data + self._begin[name] + start * row * ITEM_BYTES[info.dtype]
        self._fill(out.reshape(-1), offset, info)
        return out

    def _fill(self, out: FloatArray, offset: int, info: TensorInfo) -> None:
        what = f"tensor {info.name!r}"
        if info.dtype == "F32":
            self._file.read_into(offset, out.data, what)
            return
        buffer = np.empty(min(CHUNK_ELEMENTS, out.size), dtype=np.uint16)
        for begin in range(0, out.size, CHUNK_ELEMENTS):
            part = buffer[: min(CHUNK_ELEMENTS, out.size - begin)]
            self._file.read_into(offset + 2 * begin, part.data, what)
            if info.dtype == "F16":
                out[begin : begin + part.size] = part.view(np.float16)
            else:  # bfloat16 is the upper half of a float32
                bits = out[begin : begin + part.size].view(np.uint32)
                np.left_shift(part, np.uint32(16), out=bits, dtype=np.uint32, casting="unsafe")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def lookup(tensors: Mapping[str, TensorInfo], name: str, where: str) -> TensorInfo:
    """Return a tensor's header.

    Raises:
        SourceError: There is no such tensor; suggests near names.
    """
    info = tensors.get(name)
    if info is None:
        hint = did_you_mean(name, tensors) if len(tensors) <= 2000 else None
        raise SourceError(f"the checkpoint has no tensor {name!r}", where=where, hint=_short(hint))
    return info


def row_range(info: TensorInfo, start: int, stop: int | None, where: str) -> tuple[int, int]:
    """Return ``start, stop`` with the default filled in; a scalar counts as one row.

    Raises:
        SourceError: The rows are not all there, as when the config promises more than the tensor has.
    """
    rows = info.shape[0] if info.shape else 1
    stop = rows if stop is None else stop
    whole = info.shape or (start, stop) == (0, 1)
    if not (0 <= start <= stop <= rows and whole):
        raise SourceError(f"rows {start}:{stop} of tensor {info.name!r}, which has {rows}, do not exist", where=where)
    return start, stop


def _short(hint: str | None) -> str | None:
    return hint if hint is None or len(hint) <= 300 else hint[:297] + "..."


def _info(name: str, entry: Mapping[str, Any], label: str) -> TensorInfo:
    begin, end = entry["data_offsets"]
    if len(entry["shape"]) > MAX_DIMENSIONS:
        raise SourceError(f"tensor {name!r:.80} has {len(entry['shape'])} dimensions", where=label, hint=_DAMAGED)
    return TensorInfo(name, tuple(entry["shape"]), entry["dtype"], end - begin)


def _unique(pairs: list[tuple[str, Any]], label: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise SourceError("the safetensors header names a tensor twice", where=label)
    return found


def _validate(path: Path, label: str) -> None:
    """Let the reference implementation judge the header: offsets without gaps, sizes that fit shapes and the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(f"not a valid safetensors file: {error}", where=label, hint=_DAMAGED) from error
