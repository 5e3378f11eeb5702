"""Rotary tables: the skeleton's cosine and sine constants move into the data file.

Before: ``GroupQueryAttention(..., cos_cache, sin_cache)`` with inline constants ``[positions, head_dim / 2]``.
After:  the same node over planned bytes; the values are handed to the writer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from compress.errors import CompressError
from compress.graph.rules._edit import Weights
from compress.planning import Plan


def apply(graph: ir.Graph, plan: Plan, weights: Weights) -> dict[str, npt.NDArray[Any]]:
    """Place both tables; returns their values by planned name."""
    values: dict[str, npt.NDArray[Any]] = {}
    for planned in ("cos_cache", "sin_cache"):
        found = [value for name, value in graph.initializers.items() if name.endswith(planned)]
        if len(found) != 1:
            raise CompressError(f"the graph skeleton has {len(found)} rotary tables named {planned}, one was expected")
        old = found[0]
        assert old.const_value is not None
        stored = plan.by_name[planned].stored[0]
        array = np.ascontiguousarray(old.const_value.numpy(), dtype=stored.dtype)
        if array.shape != stored.shape:
            raise CompressError(
                f"the rotary table is {list(array.shape)}, planned was {list(stored.shape)}", where=planned
            )
        values[planned] = array
        weights.replace(old, weights.value(stored))
    return values
