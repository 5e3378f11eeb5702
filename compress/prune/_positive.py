"""Symmetric positive definite matrices, factored in their own memory.

NumPy's general solver and inverse hold a matrix of 8,192 rows four times over and take three times the operations. In
float32 a factorisation can break down where a matrix is nearly singular: callers choose what to do then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.floating[Any]]
#: Runs work for every piece, by threads; results in order.
Map = Callable[[Callable[[Any], Any], Iterable[Any]], list[Any]]

#: From so many rows on products and inverses are kept in float32: 8,192 rows take 537 MB in float64, and what is added
#: to the diagonal is far above float32's rounding.
WIDE = 6000
_ROWS = 256


def kind(rows: int) -> type[np.floating[Any]]:
    """Return what products and inverses of so many rows are kept in."""
    return np.float32 if rows >= WIDE else np.float64


def invert(matrix: Floats) -> bool:
    """Overwrite a contiguous symmetric matrix ``[K, K]`` with its inverse; ``False``, and rubbish, if not definite."""
    factor = _factored(matrix)
    if factor is None:
        return False
    torch.cholesky_inverse(factor, out=factor)
    return True


def solve(matrix: Floats, rows: Floats, run: Map) -> bool:
    """Overwrite contiguous ``rows`` ``[N, K]`` with ``rows matrix^-1``; ``False``, and nothing done, if not definite.

    ``matrix`` ``[K, K]``, of the same kind, is overwritten too. Each piece of the rows is one thread's.
    """
    factor = _factored(matrix)
    if factor is None:
        return False

    def piece(some: slice) -> None:
        columns = torch.from_numpy(rows[some]).T
        torch.linalg.solve_triangular(factor, columns, upper=False, out=columns)
        torch.linalg.solve_triangular(factor.mT, columns, upper=True, out=columns)

    run(piece, pieces(len(rows)))
    return True


def selected(matrix: Floats, rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64]) -> Floats:
    """Return ``matrix[rows][:, columns]`` in the memory of ``matrix``, which is contiguous; both ascend.

    Rows move up only, so what is written never reaches what is still to be read.
    """
    result: Floats = matrix.reshape(-1)[: len(rows) * len(columns)].reshape(len(rows), len(columns))
    for piece in pieces(len(rows)):
        result[piece] = matrix[rows[piece]][:, columns]
    return result


def pieces(rows: int) -> Iterator[slice]:
    """Yield slices of so many rows that their copies are small."""
    for start in range(0, rows, _ROWS):
        yield slice(start, start + _ROWS)


def _factored(matrix: Floats) -> torch.Tensor | None:
    """Return the lower Cholesky factor in the memory of the matrix, whose rows are the columns that LAPACK wants."""
    assert matrix.flags.c_contiguous
    factor = torch.from_numpy(matrix).T
    info = torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return factor if not int(info) and bool(torch.isfinite(factor.diagonal()).all()) else None
