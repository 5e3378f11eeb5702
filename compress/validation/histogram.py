"""Where measures are counted: fixed edges, three to a factor of ten, so that two reports compare bin by bin.

The ends are open: what lies below the first edge, 0 among it, counts in the first bin, what lies above the last in the
last one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: KL divergences, nats: 24 bins from 1e-6 to 100.
KL_EDGES = tuple(float(f"{10 ** (step / 3):.3g}") for step in range(-18, 7))
#: 1 - cosine: 21 bins from 1e-7 to 1.
COSINE_EDGES = tuple(float(f"{10 ** (step / 3):.3g}") for step in range(-21, 1))


def counted(values: npt.NDArray[np.float64], edges: tuple[float, ...]) -> tuple[int, ...]:
    """Return how many of ``values``, of any shape, lie in each of the bins ``[edges[i], edges[i + 1])``."""
    places = np.searchsorted(np.array(edges[1:-1]), values.ravel(), side="right")
    return tuple(np.bincount(places, minlength=len(edges) - 1).tolist())
