"""SparseGPT: what a weight's removal costs is made up for by the weights to its right.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023, arXiv 2301.00774.
With H the second moments of the inputs and ``F`` the columns from c on, weight ``w_c`` costs ``w_c^2 / [H_F^-1]_cc``,
and its removal changes the others by ``-w_c / [H_F^-1]_cc * [H_F^-1]_c``. Which weights go is decided for
:data:`BLOCK` columns at a time, from the weights as they are by then; a pattern decides at each of its groups.

The paper walks along a Cholesky factor of the inverse. Here as in :mod:`compress.quantize.gptq`: ``H = R R^T``, R upper
triangular, needs one factorization and no inverse. ``[H_F^-1]_cc`` is ``1 / R[c, c]^2``. With ``G[j, c]`` standing for
``R[j, c] / R[c, c]`` and ``e_j`` for what column j has lost, the columns of a block b, all of its weights still there,
are ``w_b + (sum over j before it of  e_j G[j, b]) G_b^-1``; removing ``x`` at k takes ``x G_b^-1[k]`` off them.
"""

from __future__ import annotations

import numpy as np

from compress.contracts import FloatArray
from compress.prune.masks import Mask, Pattern, check, lowest
from compress.quantize.gptq import feedback

DAMPING = 0.01
"""Part of the mean moment that is added to every channel's, as in the paper."""
BLOCK = 128
"""Columns whose weights compete with each other, the paper's best."""


class SparseGpt:
    """See the module.

    Unstructured, the rows of a block of columns compete as well: a row may lose more than another, and a weight must be
    passed whole. With a pattern rows are independent of each other.
    """

    name = "sparsegpt"

    def sparsify(self, weight: FloatArray, sparsity: float, pattern: Pattern | None, moments: FloatArray) -> FloatArray:
        """Return ``weight`` float32 ``[N, K]``, sparse and changed; see :class:`compress.contracts.Sparsifier`.

        Exactly ``round(sparsity * N * K)`` weights become zero. A channel without any input goes first, and makes up
        for nothing. Takes three times the weight's memory and ``[K, K]`` in float64.
        """
        check(weight, sparsity, pattern, moments)
        rows, columns = weight.shape
        if not weight.size:
            return weight.copy()
        known = feedback(moments, DAMPING, np.arange(columns, dtype=np.intp))
        costs = np.where(np.diagonal(moments) > 0, known.pivots, np.float32(0))
        result = np.array(weight.T, order="C")  # a copy even of one row; a column is a contiguous row here
        errors = np.empty((columns, rows), np.float32)
        # A block of whole groups, whatever the pattern.
        width = BLOCK if pattern is None else max(1, BLOCK // pattern[1]) * pattern[1]
        for start in range(0, columns, width):
            stop = min(start + width, columns)
            block = result[start:stop]
            inverse = np.linalg.inv(np.triu(known.gains[start:stop, start:stop]).astype(np.float64)).astype(np.float32)
            errors[start:stop] = block
            block += inverse.T @ (known.gains[:start, start:stop].T @ errors[:start])
            if pattern is None:
                count = round(sparsity * rows * stop) - round(sparsity * rows * start)
                _remove(block, inverse, _cheapest(block, costs[start:stop], count))
            else:
                _remove_groups(block, inverse, costs[start:stop], pattern)
            errors[start:stop] -= block
        return np.ascontiguousarray(result.T)


def _cheapest(block: FloatArray, costs: FloatArray, count: int) -> Mask:
    """Return a mask ``[B, N]`` of the ``count`` weights of ``block`` ``[B, N]`` whose removal costs least."""
    scores = np.ascontiguousarray((np.abs(block) * costs[:, None]).T)
    return lowest(scores.reshape(-1), count).reshape(scores.shape).T


def _remove_groups(block: FloatArray, inverse: FloatArray, costs: FloatArray, pattern: Pattern) -> None:
    """Remove the cheapest weights of each group, which is looked at when the groups before it are done, in place."""
    kept, of = pattern
    for start in range(0, len(block), of):
        group = slice(start, start + of)
        scores = np.ascontiguousarray((np.abs(block[group]) * costs[group, None]).T)
        _remove(block[start:], inverse[start:, start:], lowest(scores, of - kept).T)


def _remove(block: FloatArray, inverse: FloatArray, mask: Mask) -> None:
    """Remove weights of the first columns of a block, in place.

    Args:
        block: float32 ``[B, N]``, a column of the weight in each row; changed.
        inverse: float32 ``[B, B]``, upper triangular with ones on its diagonal.
        mask: ``[C, N]``, C at most B: what to remove.
    """
    for column, gone in enumerate(mask):
        removed = np.where(gone, block[column], np.float32(0))
        block[column:] -= inverse[column, column:, None] * removed
        block[column][gone] = 0


SPARSIFIER = SparseGpt()
