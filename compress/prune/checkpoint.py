"""The pruned checkpoint's weights: safetensors whose space is claimed first, filled tensor by tensor."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from compress.contracts import FloatArray
from compress.package.staging import write_file
from compress.package.writer import DataFile
from compress.source.local_directory import INDEX_NAME, WEIGHTS_NAME

#: What a weights file holds at most, as transformers saves them.
SHARD_BYTES = 5_000_000_000
_TYPES: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: its name, storage type (``F32``, ``F16``, ``BF16``) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes it takes."""
        return math.prod(self.shape) * int(np.dtype(_TYPES[self.dtype]).itemsize)


def stored_type(dtype: str) -> str:
    """Return the type that a source tensor of this one is written in: floats as they are, all else as float32."""
    return dtype if dtype in _TYPES else "F32"


class WeightsWriter:
    """The weights files of a checkpoint while they are written; tensors come in any order.

    Args:
        directory: Where they go.
        tensors: All of them.
        shard_bytes: What a file holds at most; one tensor is never cut.
    """

    def __init__(self, directory: Path, tensors: Sequence[Stored], shard_bytes: int = SHARD_BYTES) -> None:
        self._places: dict[str, tuple[DataFile, int, Stored]] = {}
        self._left = {tensor.name for tensor in tensors}
        self._files: list[DataFile] = []
        shards = _shards(sorted(tensors, key=lambda tensor: tensor.name), shard_bytes)
        names = [WEIGHTS_NAME] if len(shards) == 1 else _names(len(shards))
        for name, shard in zip(names, shards, strict=True):
            header, offsets = _header(shard)
            data = DataFile(directory / name, len(header) + sum(tensor.nbytes for tensor in shard))
            self._files.append(data)
            data.write(0, np.frombuffer(header, np.uint8))
            for tensor in shard:
                self._places[tensor.name] = data, len(header) + offsets[tensor.name], tensor
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors)
            places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            write_file(directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")

    def write(self, name: str, array: FloatArray) -> None:
        """Write a tensor whole, rounded to its storage type.

        Raises:
            ResourceError: The disk is full after all.
        """
        data, offset, tensor = self._places[name]
        assert array.shape == tensor.shape, f"{name}: {array.shape}, planned {tensor.shape}"
        data.write(offset, np.ascontiguousarray(array, _TYPES[tensor.dtype]).reshape(-1).view(np.uint8))
        self._left.discard(name)

    def __enter__(self) -> WeightsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close(sync=kind is None)
        assert kind is not None or not self._left, f"not written: {sorted(self._left)[:3]}"


def _shards(tensors: Sequence[Stored], most: int) -> list[list[Stored]]:
    shards: list[list[Stored]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _names(count: int) -> list[str]:
    stem = WEIGHTS_NAME.removesuffix(".safetensors")
    return [f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors" for index in range(count)]


def _header(tensors: Sequence[Stored]) -> tuple[bytes, dict[str, int]]:
    """Return a file's header with its length in front, and where each tensor's data begins behind it.

    Source: the format's specification, github.com/huggingface/safetensors.
    """
    offsets, entries, end = {}, {}, 0
    for tensor in tensors:
        offsets[tensor.name] = end
        span = [end, end + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
        end += tensor.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets
