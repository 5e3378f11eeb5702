"""Wanda: weights go by their size times that of their inputs; nothing makes up for them.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, arXiv 2306.11695: the score is
``|W[i, j]| * |X[j]|``, with the root mean square of input channel j, and scores are compared within a row.
"""

from __future__ import annotations

import numpy as np

from compress.contracts import FloatArray
from compress.errors import CompressError
from compress.prune.masks import Pattern, check, per_group, per_row


class Wanda:
    """See the module; rows are independent of each other."""

    name = "wanda"

    def sparsify(self, weight: FloatArray, sparsity: float, pattern: Pattern | None, moments: FloatArray) -> FloatArray:
        """Return ``weight`` float32 ``[N, K]`` with zeros; see :class:`compress.contracts.Sparsifier`.

        Only the diagonal of the moments is read. A channel without any input (0 there) goes first.
        """
        check(weight, sparsity, pattern, moments)
        diagonal = np.diagonal(moments)
        if not (np.isfinite(diagonal) & (diagonal >= 0)).all():
            worst = int(np.argmin(np.where(np.isfinite(diagonal), diagonal, -np.inf)))
            raise CompressError(f"moments[{worst}, {worst}] is {diagonal[worst]}, which no mean of squares is")
        scores = np.abs(weight) * np.sqrt(diagonal)
        mask = per_row(scores, sparsity) if pattern is None else per_group(scores, pattern)
        return np.where(mask, np.float32(0), weight)


SPARSIFIER = Wanda()
