"""The header of a GGUF file: metadata and where each tensor lies. Little-endian, versions 2 and 3.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The ``gguf`` package's own reader maps the
whole file, trusts its counts and makes an array object of every token, hence this one: it reads the header once,
bounds every count by the bytes that are there, and keeps plain Python values.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from compress.errors import SourceError, UnsupportedModelError
from compress.source.files import open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 256 << 20
MAX_ENTRIES = 1 << 20
#: Items of all arrays together: vocabularies have a million of them, and each becomes a Python object.
MAX_ITEMS = 1 << 22
MAX_ALIGNMENT = 1 << 20
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32
# Value type -> struct format of a scalar; 8 is a string, 9 an array.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
_DAMAGED = "the file is truncated or damaged: download or copy it again"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: Its name in the file.
        shape: Dimensions, outermost first (GGUF writes them innermost first).
        type_name: ``F32``, ``Q4_1`` ...
        block_size: Elements of a quantization block, along the innermost dimension.
        block_bytes: Bytes of a block.
        offset: Where its data begins in the file, bytes.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    block_size: int
    block_bytes: int
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one innermost row."""
        return self.shape[-1] // self.block_size * self.block_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GgufHeader:
    """Metadata (scalars, strings, lists) and tensors by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        SourceError: Not GGUF, truncated, a tensor outside the file, or a name given twice.
        UnsupportedModelError: A version, byte order or tensor type that is not supported.
    """
    try:
        with io.BufferedReader(open_regular(path)) as stream:
            return _Parser(stream, path.stat().st_size, path.name).parse()
    except OSError as error:
        raise SourceError(f"cannot read the file: {error.strerror or error}", where=path.name) from error


class _Parser:
    def __init__(self, stream: BinaryIO, size: int, label: str) -> None:
        self.stream = stream
        self.size = size
        self.label = label
        self.position = 0
        self.items = 0

    def parse(self) -> GgufHeader:
        tensor_count, entry_count = self._preamble()
        metadata: dict[str, Any] = {}
        for _ in range(entry_count):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"the metadata names {key!r} twice")
            metadata[key] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        whole = type(alignment) is int and 0 < alignment <= MAX_ALIGNMENT
        if not whole or alignment & (alignment - 1):
            raise self._damaged(f"the alignment {alignment!r} is not a power of two")
        data = -(-self.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, type_id, offset in infos:
            if name in tensors:
                raise self._damaged(f"the file names tensor {name!r} twice")
            tensors[name] = self._tensor(name, shape, type_id, data + offset)
        self._check_apart(tensors)
        return GgufHeader(metadata, tensors)

    def _check_apart(self, tensors: Mapping[str, GgufTensor]) -> None:
        """Refuse tensors that share bytes: bytes that are two things at once are nobody's honest weights."""
        last: GgufTensor | None = None
        for tensor in sorted(tensors.values(), key=lambda item: item.offset):
            if last is not None and tensor.offset < last.offset + last.nbytes:
                raise self._damaged(f"tensors {last.name!r:.80} and {tensor.name!r:.80} lie over each other")
            last = tensor

    def _preamble(self) -> tuple[int, int]:
        if self.size < 24 or self._take(4) != MAGIC:
            raise SourceError("not a GGUF file: it does not begin with GGUF", where=self.label, hint=_DAMAGED)
        version = self._scalar("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "a big-endian GGUF file" if swapped else f"GGUF version {version}"
            raise UnsupportedModelError(
                f"{what} is not supported", where=self.label, hint="convert the model again with a current llama.cpp"
            )
        counts = self._scalar("Q"), self._scalar("Q")
        if max(counts) > MAX_ENTRIES:
            raise self._damaged(f"the header claims {counts[0]} tensors and {counts[1]} metadata entries")
        return counts

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name!r} claims {dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))
        return name, shape[::-1], self._scalar("I"), self._scalar("Q")

    def _tensor(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GgufTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(type_id)
        except ValueError as error:
            raise UnsupportedModelError(
                f"tensor {name!r} has the unknown type {type_id}", where=self.label, hint="update the gguf package"
            ) from error
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        tensor = GgufTensor(name, shape, kind.name, block_size, block_bytes, offset)
        if min(shape) < 1 or shape[-1] % block_size:
            raise self._damaged(f"tensor {name!r} of shape {list(shape)} cannot be {kind.name}")
        if offset + tensor.nbytes > self.size:
            raise self._damaged(f"tensor {name!r} ends {offset + tensor.nbytes - self.size} bytes past the file's end")
        return tensor

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(self._format(kind))
        item, count = self._scalar("I"), self._scalar("Q")
        if item == ARRAY:
            raise self._damaged("the metadata holds nested arrays")
        self.items += count
        if self.items > min(self.size, MAX_ITEMS):
            raise self._damaged(f"an array claims {count} items")
        if item == STRING:
            return [self._string() for _ in range(count)]
        dtype = np.dtype(self._format(item)).newbyteorder("<")
        return np.frombuffer(self._take(count * dtype.itemsize), dtype=dtype).tolist()

    def _format(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self._damaged(f"the metadata holds a value of the unknown type {kind}")
        return SCALARS[kind]

    def _scalar(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _string(self) -> str:
        # llama.cpp writes tokens as bytes that need not be UTF-8 on their own.
        return self._take(self._scalar("Q")).decode("utf-8", errors="replace")

    def _take(self, count: int) -> bytes:
        if count > min(self.size, MAX_HEADER_BYTES) - self.position:
            raise self._damaged("the header is cut off or larger than 256 MiB")
        self.position += count
        data = self.stream.read(count)
        if len(data) != count:
            raise self._damaged("the header is cut off")
        return data

    def _damaged(self, what: str) -> SourceError:
        return SourceError(f"the GGUF file is damaged: {what}", where=self.label, hint=_DAMAGED)
