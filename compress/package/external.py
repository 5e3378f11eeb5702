"""A graph's external data: which files it lies in, and moving it without ever holding it.

ONNX keeps large initializers outside the graph, each with the name of a file (relative to the graph's own), an offset
and a length (onnx.proto3, ``TensorProto.external_data``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import CompressError
from compress.package.staging import sync, write_file
from compress.package.tree import name_fault

if TYPE_CHECKING:
    import onnx

_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class Extent:
    """Bytes ``[start, stop)`` of a data file."""

    start: int
    stop: int


def load_graph(path: Path) -> onnx.ModelProto:
    """Read a graph file; its external data is left where it is.

    Raises:
        CompressError: It is not an ONNX graph.
    """
    import onnx

    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's class for this has moved before, and its package has no types
        if type(error).__name__ != "DecodeError":
            raise
        raise CompressError(f"the graph cannot be read: {error}", where=str(path)) from None


def external_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield the initializers whose bytes lie in another file."""
    import onnx

    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor


def place(tensor: onnx.TensorProto) -> tuple[str, Extent]:
    """Return the file that a tensor names, and which bytes of it are the tensor's.

    Raises:
        CompressError: It names none, or its numbers are no numbers.
    """
    fields = {entry.key: entry.value for entry in tensor.external_data}
    try:
        start, length = int(fields.get("offset", "0")), int(fields["length"])
        if start < 0 or length < 0 or not isinstance(fields["location"], str):
            raise ValueError("negative, or not text")
        return fields["location"], Extent(start, start + length)
    except (KeyError, ValueError, TypeError):
        raise CompressError(f"the external data of {tensor.name!r} has no place", where="model.onnx") from None


def data_files(graph: Path) -> list[Path]:
    """Return the files that a graph's external data lies in, each once, in the order of their names.

    Raises:
        CompressError: It is not an ONNX graph, or it refers to a place outside its own directory.
    """
    names = sorted({place(tensor)[0] for tensor in external_tensors(load_graph(graph))})
    for name in names:
        fault = name_fault(name)
        if fault is not None:
            raise CompressError(f"the graph's data is not in its directory: {name!r}: {fault}", where=str(graph))
    return [graph.parent / name for name in names]


def chunks(extents: Sequence[Extent], most: int) -> list[Extent]:
    """Cut a data file into pieces of at most ``most`` bytes, never through a tensor.

    Args:
        extents: Where the tensors lie, in any order; several may share bytes.
        most: Bytes a piece may have.

    Returns:
        The pieces in order; each begins where a tensor begins, the first at 0, where the first tensor is.

    Raises:
        CompressError: A tensor alone is larger.
    """
    runs: list[Extent] = []  # tensors that share bytes, as one
    for extent in sorted(extents, key=lambda item: (item.start, item.stop)):
        if runs and extent.start < runs[-1].stop:
            runs[-1] = Extent(runs[-1].start, max(runs[-1].stop, extent.stop))
        else:
            runs.append(extent)
    pieces = [Extent(0, 0)]
    for run in runs:
        if run.stop - run.start > most:
            raise CompressError(
                f"a tensor of {run.stop - run.start:,} bytes does not fit a piece of {most:,}",
                hint="fewer bits for the largest table: --set quantize.roles.embedding.bits=4",
            )
        if run.stop - pieces[-1].start > most:
            pieces.append(run)
        else:
            pieces[-1] = Extent(pieces[-1].start, run.stop)
    return pieces


def split(data: Path, pieces: Sequence[Extent], names: Sequence[Path]) -> None:
    """Make files of a data file's pieces: the first is the file itself, renamed and cut off, the others are copied.

    From the end on, so that no more than one piece exists twice at any moment.

    Raises:
        OSError: The disk refuses.
    """
    with data.open("r+b") as source:
        for piece, name in reversed(list(zip(pieces[1:], names[1:], strict=True))):
            with name.open("xb") as target:
                source.seek(piece.start)
                left = piece.stop - piece.start
                while left:
                    read = source.read(min(left, _COPY_BYTES))
                    if not read:
                        raise CompressError("the data file is shorter than the graph says", where=str(data))
                    target.write(read)
                    left -= len(read)
                target.flush()
                os.fsync(target.fileno())
            source.truncate(piece.start)
    data.rename(names[0])
    sync(names[0].parent)


def relocated(model: onnx.ModelProto, pieces: Mapping[str, Extent]) -> onnx.ModelProto:
    """Return a copy of a graph whose tensors name the piece they lie in, with offsets counted from its beginning.

    ``pieces``: the extents of the old data file, by the new files' names relative to the graph.
    """
    import onnx

    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    for tensor in external_tensors(moved):
        _, extent = place(tensor)
        name, piece = next(
            (name, piece) for name, piece in pieces.items() if piece.start <= extent.start and extent.stop <= piece.stop
        )
        del tensor.external_data[:]
        fields = {"location": name, "offset": extent.start - piece.start, "length": extent.stop - extent.start}
        for key, value in fields.items():
            tensor.external_data.add(key=key, value=str(value))
    return moved


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph file; its external data is not touched."""
    write_file(path, model.SerializeToString(deterministic=True))
