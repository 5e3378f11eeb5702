"""Tokenized texts of different lengths: how they are kept on disk, and how they become padded batches.

Workers read this module, also in foreign interpreters: NumPy only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from compress.errors import CompressError

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

#: Tasks with one row of outputs a text; the others have one a token.
PER_TEXT = ("embedding", "text-classification")


@dataclass(frozen=True)
class Encoded:
    """Texts as token ids, one after the other.

    Attributes:
        ids: int64 ``[tokens]``.
        types: int64 ``[tokens]``: which of two texts a token belongs to (``token_type_ids``).
        keep: bool ``[tokens]``: whose outputs are compared, for tasks with an output a token.
        lengths: int64 ``[texts]``, each at least 1.
        truncated: How many texts were cut to fit.
    """

    ids: IntArray
    types: IntArray
    keep: BoolArray
    lengths: IntArray
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> IntArray:
        """Where each text begins, int64 ``[texts]``."""
        starts: IntArray = np.cumsum(self.lengths) - self.lengths
        return starts

    def rows(self, task: str) -> int:
        """Return the rows of outputs that a task has for these texts."""
        return len(self) if task in PER_TEXT else int(self.keep.sum())

    def rows_of_texts(self, task: str) -> IntArray:
        """Return how many rows each text has, int64 ``[texts]``."""
        if task in PER_TEXT:
            return np.ones(len(self), np.int64)
        return np.add.reduceat(self.keep.astype(np.int64), self.starts)

    def save(self, path: Path) -> None:
        """Write them as ``.npz``."""
        np.savez(path, ids=self.ids, types=self.types, keep=self.keep, lengths=self.lengths, truncated=self.truncated)

    @classmethod
    def load(cls, path: str | Path) -> Encoded:
        """Read what :meth:`save` wrote."""
        with np.load(path) as stored:
            return cls(stored["ids"], stored["types"], stored["keep"], stored["lengths"], int(stored["truncated"]))


@dataclass(frozen=True)
class Batch:
    """Some texts padded to the longest of them on the right.

    Attributes:
        texts: Their indices, int64 ``[batch]``.
        ids: int64 ``[batch, sequence]``.
        mask: int64 ``[batch, sequence]``: 1 for a token, 0 for padding.
        types: int64 ``[batch, sequence]``.
        keep: bool ``[batch, sequence]``; never true on padding.
    """

    texts: IntArray
    ids: IntArray
    mask: IntArray
    types: IntArray
    keep: BoolArray


def padded_batches(encoded: Encoded, size: int, pad_id: int) -> Iterator[Batch]:
    """Yield the texts in their order, ``size`` at a time."""
    for first in range(0, len(encoded), size):
        yield batch_of(encoded, np.arange(first, min(first + size, len(encoded))), pad_id)


def unpadded_batches(encoded: Encoded, size: int) -> Iterator[Batch]:
    """Yield texts of equal length together, at most ``size`` at a time, so that nothing is ever padded."""
    for length in np.unique(encoded.lengths):
        texts = np.flatnonzero(encoded.lengths == length)
        for first in range(0, len(texts), size):
            yield batch_of(encoded, texts[first : first + size], 0)


def batch_of(encoded: Encoded, texts: IntArray, pad_id: int, length: int | None = None) -> Batch:
    """Return the texts with these indices, padded to ``length`` tokens; by default to the longest of them."""
    lengths = encoded.lengths[texts]
    shape = (len(texts), int(lengths.max()) if length is None else length)
    real = np.arange(shape[1]) < lengths[:, None]
    ids, types, keep = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    for row, (start, length) in enumerate(zip(encoded.starts[texts], lengths, strict=True)):
        part = slice(start, start + length)
        ids[row, :length] = encoded.ids[part]
        types[row, :length] = encoded.types[part]
        keep[row, :length] = encoded.keep[part]
    return Batch(texts, ids, real.astype(np.int64), types, keep)


def pack(
    ids: Sequence[Sequence[int]],
    types: Sequence[Sequence[int]],
    keep: Sequence[Sequence[bool]],
    truncated: int = 0,
) -> Encoded:
    """Put token lists of texts together.

    Raises:
        CompressError: A text has no tokens, or its lists are not of one length.
    """
    for index, (a, b, c) in enumerate(zip(ids, types, keep, strict=True)):
        if not len(a) or len(a) != len(b) or len(a) != len(c):
            raise CompressError(
                "the tokenizer gave a text no tokens, or lists of different lengths", where=f"text {index}"
            )
    return Encoded(
        np.array([token for text in ids for token in text], np.int64),
        np.array([kind for text in types for kind in text], np.int64),
        np.array([flag for text in keep for flag in text], np.bool_),
        np.array([len(text) for text in ids], np.int64),
        truncated,
    )
