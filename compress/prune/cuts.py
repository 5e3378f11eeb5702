"""From what is kept to what becomes of every checkpoint tensor: rows and columns, by the structure alone.

Requires a :class:`~compress.contracts.Structure` and, for every block, the neurons and heads that stay; ensures for
each tensor the rows and columns of the pruned checkpoint, in the tensor's own orientation. No family appears here: a
linear's role says which of its rows and columns are neurons, and which are heads.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from compress.contracts import Decoder, FloatArray, IntArray, Linear, Slice, Structure


@dataclass(frozen=True)
class Kept:
    """What stays of one block: neurons, query heads (those of a group together) and key-value heads, ascending.

    ``None``: all of them.
    """

    neurons: IntArray | None = None
    heads: IntArray | None = None
    kv_heads: IntArray | None = None


@dataclass(frozen=True)
class Cut:
    """What becomes of a tensor ``[rows, columns]``: source indices of what is stored; ``None``: as they are.

    Where ``zero_rows`` (``zero_columns``) is true, zeros are stored instead. ``transposed``: the tensor lies as
    ``[columns, rows]``.
    """

    rows: IntArray | None = None
    columns: IntArray | None = None
    zero_rows: npt.NDArray[np.bool_] | None = None
    zero_columns: npt.NDArray[np.bool_] | None = None
    transposed: bool = False

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape that a tensor of this shape gets."""
        sizes = list(reversed(shape)) if self.transposed else list(shape)
        for axis, index in enumerate((self.rows, self.columns)):
            if index is not None:
                sizes[axis] = len(index)
        return tuple(reversed(sizes) if self.transposed else sizes)

    def apply(self, tensor: FloatArray) -> FloatArray:
        """Return what is stored of a tensor."""
        result = tensor.T if self.transposed else tensor
        if self.rows is not None:
            result = result[self.rows]
        if self.columns is not None:
            result = result[:, self.columns]
        if self.zero_rows is not None or self.zero_columns is not None:
            result = result.copy()
            if self.zero_rows is not None:
                result[self.zero_rows] = 0
            if self.zero_columns is not None:
                result[:, self.zero_columns] = 0
        return np.ascontiguousarray(result.T if self.transposed else result)


@dataclass
class _Index:
    """Rows or columns of a tensor while linears name theirs."""

    source: list[IntArray] = field(default_factory=list)
    zero: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    def arrays(self) -> tuple[IntArray, npt.NDArray[np.bool_] | None]:
        zero = np.concatenate(self.zero)
        return np.concatenate(self.source), zero if zero.any() else None


def block_cuts(structure: Structure, block: int, kept: Kept, *, leave_zeros: bool) -> dict[str, Cut]:
    """Return the cuts of one block's tensors, by name; tensors that stay as they are are not there.

    Args:
        structure: The source's.
        block: Which one, counted as ``Linear.layer`` is.
        kept: What stays.
        leave_zeros: Heads that go are moved behind those that stay and become zeros, instead of being left out.
    """
    cuts: dict[str, Cut] = {}
    for linear in structure.linears:
        if linear.layer != block:
            continue
        rows, columns = _rows(structure, linear, kept), _columns(structure, linear, kept)
        zeros = leave_zeros and linear.role in ("qkv", "attention_output")
        if rows is not None:
            _cut_rows(cuts, linear.weight, rows, linear.out_features, zeros)
            _cut_rows(cuts, linear.bias, rows, linear.out_features, zeros)
        if columns is not None:
            behind = np.setdiff1d(np.arange(linear.in_features), columns) if zeros else columns[:0]
            index = np.concatenate([columns, behind])
            zero = np.arange(len(index)) >= len(columns)
            for name, transposed in {piece.tensor: piece.transposed for piece in linear.weight}.items():
                cuts[name] = Cut(None, index, None, zero if zero.any() else None, transposed)
    return cuts


def head_channels(heads: IntArray, size: int) -> IntArray:
    """Return the channels of heads of ``size`` channels each."""
    channels: IntArray = (heads[:, None] * size + np.arange(size)).reshape(-1)
    return channels


def _rows(structure: Structure, linear: Linear, kept: Kept) -> list[IntArray] | None:
    """Return the stacked rows that stay, a list an equal part: query, key, value; gate, up."""
    if linear.role == "up" and kept.neurons is not None:
        return [kept.neurons]
    if linear.role == "gate_up" and kept.neurons is not None:
        return [kept.neurons, linear.out_features // 2 + kept.neurons]
    if linear.role == "qkv" and kept.heads is not None:
        size, query = structure.head_dim, structure.heads * structure.head_dim
        pairs = structure.kv_heads if isinstance(structure, Decoder) else structure.heads
        shared = kept.heads if kept.kv_heads is None else kept.kv_heads
        return [
            head_channels(kept.heads, size),
            query + head_channels(shared, size),
            query + pairs * size + head_channels(shared, size),
        ]
    return None


def _columns(structure: Structure, linear: Linear, kept: Kept) -> IntArray | None:
    if linear.role == "down":
        return kept.neurons
    if linear.role == "attention_output" and kept.heads is not None:
        return head_channels(kept.heads, structure.head_dim)
    return None


def _cut_rows(cuts: dict[str, Cut], pieces: Sequence[Slice], rows: Sequence[IntArray], total: int, zeros: bool) -> None:
    """Add what becomes of the tensors that a linear's rows are stacked from."""
    found: dict[str, _Index] = {}
    below = 0
    for piece in pieces:
        length = total - below if piece.stop is None else piece.stop - piece.start
        index = found.setdefault(piece.tensor, _Index())
        for part in rows:
            stay = part[(part >= below) & (part < below + length)] - below
            index.source.append(stay + piece.start)
            index.zero.append(np.zeros(len(stay), bool))
        if zeros:
            stay = np.concatenate(rows) - below
            gone = np.setdiff1d(np.arange(length), stay) + piece.start
            index.source.append(gone)
            index.zero.append(np.ones(len(gone), bool))
        below += length
    transposed = {piece.tensor: piece.transposed for piece in pieces}
    for name, index in found.items():
        source, zero = index.arrays()
        cuts[name] = Cut(source, None, zero, None, transposed[name])


def vocabulary_cuts(structure: Structure, kept: IntArray) -> dict[str, Cut]:
    """Return the cuts of the token table, the head and its bias for the ids that stay."""
    cuts = {table.source.tensor: Cut(kept) for table in structure.tables if table.role == "token"}
    for linear in structure.linears:
        if linear.role == "head":
            cuts |= {piece.tensor: Cut(kept) for piece in (*linear.weight, *linear.bias)}
    return cuts


def block_prefix(structure: Structure, block: int) -> str:
    """Return what the names of a block's tensors begin with, its own number the last part: ``model.layers.3.``."""
    names = [
        piece.tensor
        for linear in structure.linears
        if linear.layer == block
        for piece in (*linear.weight, *linear.bias)
    ]
    return common_prefix(names)


def common_prefix(names: Sequence[str]) -> str:
    """Return what dotted names begin with, whole parts only: ``encoder.layer.3.``."""
    common = os.path.commonprefix(list(names))
    return common[: common.rindex(".") + 1]


def renumbered(names: Sequence[str], structure: Structure, blocks: Sequence[int]) -> Mapping[str, str]:
    """Return new names for the tensors that stay when only these blocks do, ascending, by old name.

    Args:
        names: All tensors of the checkpoint.
        structure: The source's; every run of a block has its own tensors.
        blocks: The blocks that stay.
    """
    first = block_prefix(structure, 0)
    match = re.fullmatch(r"(.*?)(\d+)\.", first)
    assert match, f"blocks are not numbered at the end of {first!r}"
    pattern = re.compile(rf"{re.escape(match[1])}(\d+)(\..+)")
    places = {block: place for place, block in enumerate(blocks)}
    found = {}
    for name in names:
        inside = pattern.fullmatch(name)
        if inside is None:
            found[name] = name
        elif int(inside[1]) in places:
            found[name] = f"{match[1]}{places[int(inside[1])]}{inside[2]}"
    return found
