"""A ``.gguf`` file as a Hugging Face checkpoint: rows are dequantized chunk by chunk, when asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from compress.contracts import FloatArray, TensorInfo
from compress.errors import SourceError, UnsupportedModelError, UsageError
from compress.source.base import CONFIG_NAME, BaseCheckpoint, OpenCheckpoint
from compress.source.files import RandomAccessFile
from compress.source.gguf_header import GgufTensor, read_header
from compress.source.gguf_names import Layout, build_config, ignored
from compress.source.gguf_tokenizer import write_tokenizer
from compress.source.safetensors_file import lookup, row_range

CHUNK_ELEMENTS = 1 << 19


class GgufCheckpoint(BaseCheckpoint):
    """A GGUF file, seen under Hugging Face names, row order and orientation.

    ``directory`` is made when first asked for: a temporary one with ``config.json`` and the rebuilt tokenizer, which
    goes when the checkpoint is closed.

    Args:
        path: The file.
        reference: What the user asked for.

    Raises:
        SourceError: Not GGUF, truncated, or inconsistent.
        UnsupportedModelError: An architecture or tensor type that has no implementation.
    """

    def __init__(self, path: Path, *, reference: str) -> None:
        if not path.is_file():
            raise SourceError("there is no such GGUF file", where=reference, hint="check the path")
        self._path = path
        self._header = read_header(path)
        architecture, config = build_config(self._header)
        self._stored: dict[str, tuple[GgufTensor, Layout]] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for tensor in self._header.tensors.values():
            if ignored(tensor.name):
                continue
            renamed = architecture.rename(tensor.name)
            if renamed is None:
                raise UnsupportedModelError(
                    f"tensor {tensor.name!r} has no counterpart in a {config['model_type']} model", where=path.name
                )
            self._add(*renamed, tensor)
        self._heads = {
            "heads": int(config.get("num_attention_heads", 0)),
            "kv_heads": int(config.get("num_key_value_heads", 0)),
        }
        super().__init__(
            reference=reference, kind="gguf", identifier=path.name, revision=None, config=config, directory=None
        )
        self._check_heads()
        self._file = RandomAccessFile(path)

    def _add(self, name: str, layout: Layout, tensor: GgufTensor) -> None:
        if len(tensor.shape) > 2:
            raise UnsupportedModelError(
                f"tensor {tensor.name!r} has {len(tensor.shape)} dimensions", where=self._path.name
            )
        shape = tensor.shape[::-1] if layout == "transposed" else tensor.shape
        self._tensors[name] = TensorInfo(name, shape, tensor.type_name, tensor.nbytes)
        self._stored[name] = (tensor, layout)

    def _check_heads(self) -> None:
        for name, (tensor, layout) in self._stored.items():
            if layout in self._heads and tensor.shape[0] % (2 * self._heads[layout]):
                raise SourceError(
                    f"the {tensor.shape[0]} rows of {name!r} are not {self._heads[layout]} heads", where=self._path.name
                )

    def _make_directory(self) -> Path:
        directory = self._temporary_directory()
        text = json.dumps(dict(self.config), indent=2, sort_keys=True) + "\n"
        (directory / CONFIG_NAME).write_text(text, encoding="utf-8")
        write_tokenizer(self._path, self._header.metadata, directory)
        return directory

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor's header by name; ``dtype`` is the GGUF type, ``nbytes`` what it takes in the file."""
        return self._tensors

    def read(self, name: str, start: int = 0, stop: int | None = None) -> FloatArray:
        """Return rows ``[start, stop)`` along axis 0 as a new C-contiguous float32 array.

        Temporaries stay at a few MiB. Rows of a transposed matrix (GPT-2) cost a pass over the whole tensor.

        Raises:
            SourceError: Unknown tensor, rows outside it, or a file shorter than its header says.
            UnsupportedModelError: The tensor's quantization cannot be undone by the gguf package.
        """
        info = lookup(self._tensors, name, self.identifier)
        start, stop = row_range(info, start, stop, self.identifier)
        tensor, layout = self._stored[name]
        if layout == "transposed":
            return self._read_transposed(tensor, start, stop)
        if layout == "plain":
            out = np.empty((stop - start, *tensor.shape[1:]), dtype=np.float32)
            self._rows(tensor, start, out)
            return out
        return self._read_heads(tensor, start, stop, tensor.shape[0] // self._heads[layout])

    def _read_heads(self, tensor: GgufTensor, start: int, stop: int, head_dim: int) -> FloatArray:
        """Undo llama.cpp's interleaving of a head's two rotary halves: row ``2 i + j`` was row ``j head_dim/2 + i``."""
        begin = start // head_dim * head_dim
        end = -(-stop // head_dim) * head_dim
        stored = np.empty((end - begin, *tensor.shape[1:]), dtype=np.float32)
        self._rows(tensor, begin, stored)
        rows = np.arange(start, stop)
        within = rows % head_dim
        half = head_dim // 2
        source = rows - within + 2 * (within % half) + within // half - begin
        return np.ascontiguousarray(stored[source])

    def _read_transposed(self, tensor: GgufTensor, start: int, stop: int) -> FloatArray:
        out = np.empty((stop - start, tensor.shape[0]), dtype=np.float32)
        step = max(1, CHUNK_ELEMENTS // tensor.shape[1])
        for begin in range(0, tensor.shape[0], step):
            rows = np.empty((min(step, tensor.shape[0] - begin), tensor.shape[1]), dtype=np.float32)
            self._rows(tensor, begin, rows)
            out[:, begin : begin + len(rows)] = rows[:, start:stop].T
        return out

    def _rows(self, tensor: GgufTensor, start: int, out: FloatArray) -> None:
        """Fill ``out`` with stored rows from ``start`` on; a vector is one row of blocks, read whole."""
        if len(tensor.shape) == 1:
            vector = np.empty((1, tensor.shape[0]), dtype=np.float32)
            self._blocks(tensor, tensor.offset, vector)
            out[:] = vector[0, start : start + len(out)]
            return
        step = max(1, CHUNK_ELEMENTS // tensor.shape[1])
        for begin in range(0, len(out), step):
            self._blocks(tensor, tensor.offset + (start + begin) * tensor.row_bytes, out[begin : begin + step])

    def _blocks(self, tensor: GgufTensor, offset: int, out: FloatArray) -> None:
        what = f"tensor {tensor.name!r}"
        if tensor.type_name == "F32":
            self._file.read_into(offset, out.reshape(-1).data, what)
            return
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        raw = np.empty((len(out), tensor.row_bytes), dtype=np.uint8)
        self._file.read_into(offset, raw.reshape(-1).data, what)
        try:
            out[:] = dequantize(raw, GGMLQuantizationType[tensor.type_name])
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{what} is quantized as {tensor.type_name}, which cannot be undone here", where=self.identifier
            ) from error

    def close(self) -> None:
        """Close the file and remove the temporary directory."""
        self._file.close()
        super().close()

    def _paths(self) -> Mapping[str, Path]:
        return {self._path.name: self._path}


class GgufFile:
    """The source kind ``gguf``."""

    name = "gguf"
    describes = "a .gguf file"
    priority = 20

    def matches(self, reference: str) -> bool:
        """Return whether the reference ends in ``.gguf``."""
        return reference.lower().endswith(".gguf")

    def open(
        self, reference: str, *, revision: str | None, cache_dir: Path | None, config_only: bool
    ) -> OpenCheckpoint:
        """Open the file."""
        if revision is not None:
            raise UsageError("a GGUF file has no revisions", where=reference, hint="leave the revision out")
        return GgufCheckpoint(Path(reference).expanduser(), reference=reference)


SOURCE = GgufFile()
