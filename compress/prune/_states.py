"""Cosines between hidden states."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from compress.contracts import FloatArray


def cosines(first: FloatArray, second: FloatArray) -> npt.NDArray[np.float64]:
    """Return the cosine of every token's two states, float64 ``[tokens]``, of two float32 ``[tokens, hidden]``."""
    one, other = first.astype(np.float64), second.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    found: npt.NDArray[np.float64] = (one * other).sum(axis=1) / np.maximum(lengths, 1e-30)
    return found
