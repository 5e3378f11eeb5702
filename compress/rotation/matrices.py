"""Orthogonal matrices of any size, and products with them without the matrix.

``R = diag(signs) (H kron Q)``: H is the orthonormal Hadamard matrix of the largest power of two that divides the size,
Q a random orthogonal matrix of the odd rest, signs are random. Its entries are all about equally large, and a product
takes ``n log n`` operations instead of ``n^2``. The same size and purpose give the same matrix, always.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from compress.contracts import FloatArray

#: Largest block of channels that is rotated at run time: a product with it takes a few per cent of the linear behind.
LARGEST_BLOCK = 128
#: Smallest block that is worth its nodes: outliers are spread over so many channels only.
SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class Rotation:
    """The matrix R ``[size, size]`` of a purpose; R R^T is the identity."""

    size: int
    purpose: str

    def apply(self, rows: FloatArray) -> FloatArray:
        """Return ``rows R`` for float32 ``[..., size]``, as a new array."""
        signs, rest = _parts(self.size, self.purpose)
        odd = len(rest)
        mixed = _hadamard_along(rows * signs, self.size // odd, odd)
        if odd > 1:
            mixed = mixed.reshape(-1, odd) @ rest
        return np.ascontiguousarray(mixed.reshape(rows.shape))

    def apply_left(self, columns: FloatArray) -> FloatArray:
        """Make ``R^T columns`` of float32 ``[size, K]`` in its place, some columns at a time, and return it."""
        step = max(1, (1 << 20) // self.size)
        for start in range(0, columns.shape[1], step):
            part = slice(start, start + step)
            columns[:, part] = self.apply(np.ascontiguousarray(columns[:, part].T)).T
        return columns

    def matrix(self) -> FloatArray:
        """Return R itself, float32 ``[size, size]``."""
        return self.apply(np.eye(self.size, dtype=np.float32))


def block_hadamard(rows: FloatArray, block: int) -> FloatArray:
    """Return float32 ``[..., K]`` with every block of neighbouring channels multiplied by the Hadamard matrix.

    The matrix is symmetric and its own inverse.
    """
    return np.ascontiguousarray((rows.reshape(-1, block) @ hadamard(block)).reshape(rows.shape))


def block_of(channels: int) -> int:
    """Return the size of the blocks that so many channels are rotated in at run time, 0 where none divides them."""
    found = channels & -channels  # the largest power of two that divides it
    return min(found, LARGEST_BLOCK) if found >= SMALLEST_BLOCK else 0


@lru_cache(maxsize=32)
def hadamard(size: int) -> FloatArray:
    """Return the orthonormal Hadamard matrix float32 ``[size, size]`` in Sylvester's order.

    Raises:
        ValueError: ``size`` is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"{size} is no power of two")
    matrix = np.ones((1, 1), np.float64)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    result: FloatArray = (matrix / np.sqrt(size)).astype(np.float32)
    result.flags.writeable = False
    return result


@lru_cache(maxsize=32)
def _parts(size: int, purpose: str) -> tuple[FloatArray, FloatArray]:
    """Return the signs ``[size]`` and the matrix of the odd rest."""
    generator = np.random.default_rng([zlib.crc32(purpose.encode()), size])
    signs: FloatArray = (2 * generator.integers(0, 2, size) - 1).astype(np.float32)
    odd = size // (size & -size)
    drawn: npt.NDArray[np.float64] = generator.standard_normal((odd, odd))
    orthogonal, triangular = np.linalg.qr(drawn)
    rest = (orthogonal * np.sign(np.diagonal(triangular))).astype(np.float32)
    return signs, rest


def _hadamard_along(rows: FloatArray, power: int, odd: int) -> FloatArray:
    """Multiply the first factor of channels ``[power, odd]`` by the Hadamard matrix, in steps of at most 64."""
    shape, before = rows.shape, 1
    while before < power:
        step = min(64, power // before)
        # H of a product of powers is the Kronecker product of the factors' own.
        view = rows.reshape(-1, before, step, power // (before * step) * odd)
        rows = np.matmul(hadamard(step), view)
        before *= step
    return rows.reshape(shape)
