"""A checkpoint seen rotated: rows come out multiplied, tensor by tensor, and nothing else of it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.contracts import Checkpoint, Decoder, FloatArray, Slice, SourceFile, Structure, TensorInfo
from compress.profile import Profile
from compress.reading import CHUNK_WEIGHTS
from compress.rotation.matrices import Rotation, block_hadamard
from compress.rotation.structure import HEAD_TENSOR, places, rotated

_UNTIED_HEAD = "lm_head.weight"


def applied(checkpoint: Checkpoint, structure: Structure, profile: Profile) -> tuple[Checkpoint, Structure]:
    """Return checkpoint and structure as the profile wants them: rotated, or as they are.

    Raises:
        UsageError: The model has no rotation.
    """
    if profile.quantize.rotation == "none":
        return checkpoint, structure
    changed = rotated(structure)
    assert isinstance(structure, Decoder)
    return RotatedCheckpoint(checkpoint, structure, changed), changed


@dataclass(frozen=True)
class _Change:
    """What becomes of a tensor ``[N, K]``, in this order.

    Attributes:
        norm: The norm in front, whose weight multiplies the columns.
        columns: Multiplies the columns.
        heads: Rows ``[start, stop)`` are value heads, and turned head by head.
        mixed: Rows are turned all together.
        ones: All of it becomes 1: a norm's weight that went elsewhere.
    """

    norm: str | None = None
    columns: Callable[[FloatArray], FloatArray] | None = None
    heads: tuple[int, int] | None = None
    mixed: bool = False
    ones: bool = False


class RotatedCheckpoint:
    """The view; a :class:`compress.contracts.Checkpoint`.

    A tied model's view has two tensors that the source has not: the head of its own, as transformers reads it (the
    config says so), and what turns the head's inputs, as artifacts have it.
    """

    def __init__(self, source: Checkpoint, decoder: Decoder, changed: Decoder) -> None:
        self._source, self._decoder = source, decoder
        self._directory: Path | None = None
        self._stream = Rotation(decoder.hidden_size, "residual stream")
        self._value = Rotation(decoder.head_dim, "values")
        self._places = places(decoder)
        self._norms = {vector.graph_name: vector.source.tensor for vector in decoder.vectors}
        self._blocks = {linear.weight[0].tensor: linear.hadamard for linear in changed.linears if linear.hadamard}
        self._changes = self._describe()
        self.reference, self.kind, self.identifier = source.reference, source.kind, source.identifier
        self.revision = source.revision
        self.config: Mapping[str, Any] = (
            {**source.config, "tie_word_embeddings": False} if decoder.tied else source.config
        )

    @property
    def directory(self) -> Path:
        """The source's directory: its config is not the view's."""
        return self._directory or self._source.directory

    @directory.setter
    def directory(self, path: Path) -> None:
        self._directory = path

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor's header; those that the source has not take no bytes of it."""
        found = dict(self._source.tensors())
        size = self._decoder.hidden_size
        if self._decoder.tied and found:
            rows = self._decoder.vocab_size
            found[_UNTIED_HEAD] = TensorInfo(_UNTIED_HEAD, (rows, size), "F32", 0)
            found[HEAD_TENSOR] = TensorInfo(HEAD_TENSOR, (size, size), "F32", 0)
        return found

    def read(self, name: str, start: int = 0, stop: int | None = None) -> FloatArray:
        """Return rows ``[start, stop)`` as they are after the rotation, float32, C-contiguous.

        Where all rows are turned together, all of them are read: ask for them at once.
        """
        if self._decoder.tied and name == HEAD_TENSOR:
            return self._head_turn()[start:stop]
        tied_head = self._decoder.tied and name == _UNTIED_HEAD
        change = self._changes.get(_UNTIED_HEAD if tied_head else name)
        name = self._places.head.linear.weight[0].tensor if tied_head else name
        if change is None:
            return self._source.read(name, start, stop)
        if change.ones:
            return np.ones_like(self._source.read(name, start, stop))
        last = self._source.tensors()[name].shape[0] if stop is None else stop
        if change.mixed:
            return np.ascontiguousarray(self._all_rows(name, change)[start:last])
        first, end = self._whole_heads(change, start, last)
        rows = self._columns(self._source.read(name, first, end), change)
        if change.heads is not None:
            self._turn_heads(rows, first, change.heads)
        return np.ascontiguousarray(rows[start - first : last - first])

    def files(self) -> Sequence[SourceFile]:
        """Return the source's files."""
        return self._source.files()

    def stamps(self) -> Mapping[str, tuple[int, ...]]:
        """Return the source's."""
        return self._source.stamps()

    def sidecars(self) -> Mapping[str, Path]:
        """Return the source's."""
        return self._source.sidecars()

    def _describe(self) -> dict[str, _Change]:
        found = self._places
        changes = {vector.source.tensor: _Change(ones=True) for vector in found.norms}
        for table in self._decoder.tables:
            changes[table.source.tensor] = _Change(columns=self._stream.apply)
        for reader in [*found.readers, found.head]:
            norm, linear = self._norms[reader.norm], reader.linear
            for piece in linear.weight:
                name = _UNTIED_HEAD if self._decoder.tied and reader is found.head else piece.tensor
                changes[name] = _Change(norm=norm, columns=self._stream.apply)
        for values in found.values:
            for pieces in (values.producer.weight, values.producer.bias):
                for piece, below in _starts(pieces, values.producer.out_features):
                    if below == values.start:
                        before = changes.get(piece.tensor, _Change())
                        end = piece.start + values.producer.out_features - below
                        changes[piece.tensor] = replace(before, heads=(piece.start, end))
        for writer in found.writers:
            name = writer.weight[0].tensor
            columns = self._by_blocks(name) if writer.role == "down" else self._by_heads
            changes[name] = _Change(columns=columns, mixed=True)
            for piece in writer.bias:
                changes[piece.tensor] = _Change(mixed=True)
        return changes

    def _by_heads(self, rows: FloatArray) -> FloatArray:
        return self._value.apply(rows.reshape(len(rows), -1, self._decoder.head_dim)).reshape(rows.shape)

    def _by_blocks(self, name: str) -> Callable[[FloatArray], FloatArray]:
        block = self._blocks.get(name, 0)
        return (lambda rows: block_hadamard(rows, block)) if block else (lambda rows: rows)

    def _columns(self, rows: FloatArray, change: _Change) -> FloatArray:
        if change.norm is not None:
            rows = rows * self._source.read(change.norm)
        return rows if change.columns is None else change.columns(rows)

    def _all_rows(self, name: str, change: _Change) -> FloatArray:
        rows = self._source.read(name)
        if rows.ndim == 1:
            return self._stream.apply(rows)
        step = max(1, CHUNK_WEIGHTS // rows.shape[1])
        for first in range(0, len(rows), step):  # in its place: no second copy of a whole weight
            some = slice(first, first + step)
            rows[some] = self._columns(rows[some], change)
        return self._stream.apply_left(rows)

    def _whole_heads(self, change: _Change, start: int, stop: int) -> tuple[int, int]:
        """Widen a range of rows so that it cuts no value head."""
        if change.heads is None:
            return start, stop
        first, end = change.heads
        size = self._decoder.head_dim
        if first < start < end:
            start -= (start - first) % size
        if first < stop < end:
            stop += -(stop - first) % size
        return start, stop

    def _turn_heads(self, rows: FloatArray, first: int, heads: tuple[int, int]) -> None:
        """Multiply the value heads among ``rows``, the first of which is row ``first``, from the left."""
        start, stop = max(heads[0], first), min(heads[1], first + len(rows))
        if start >= stop:
            return
        part = rows[start - first : stop - first]
        turned = part.reshape(-1, self._decoder.head_dim, *part.shape[1:])
        for head in turned:
            head[...] = self._value.apply_left(head) if head.ndim == 2 else self._value.apply(head)

    def _head_turn(self) -> FloatArray:
        """Return ``(R^T diag(g) R)^T``, which is itself: as a linear stores it."""
        gain = self._source.read(self._norms[self._places.head.norm])
        turn = self._stream.matrix()
        return np.ascontiguousarray((turn * gain[:, None]).T @ turn)


def _starts(pieces: Sequence[Slice], total: int) -> Iterator[tuple[Slice, int]]:
    """Yield the pieces of a stacked weight of ``total`` rows, each with the row that it begins at."""
    below = 0
    for piece in pieces:
        yield piece, below
        below += (total if piece.stop is None else piece.stop) - piece.start
