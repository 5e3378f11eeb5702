"""From a skeleton to the finished graph, for any structure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from compress.contracts import Encoder
from compress.graph.decoder import build_decoder
from compress.graph.encoder import build_encoder
from compress.graph.finished import FinishedGraph
from compress.planning import Plan
from compress.profile import Profile
from compress.source.sentence_transformers import Pooling


def build_graph(
    skeleton: Path,
    plan: Plan,
    profile: Profile,
    inline: Mapping[str, npt.NDArray[Any]],
    *,
    data_name: str,
    pool: Pooling | None,
) -> FinishedGraph:
    """Rewrite a skeleton for the plan; see :func:`build_decoder` and :func:`build_encoder`."""
    if isinstance(plan.structure, Encoder):
        assert pool is not None, "an encoder has a pooling, if only none"
        return build_encoder(skeleton, plan, profile, inline, data_name=data_name, pool=pool)
    return build_decoder(skeleton, plan, profile, inline, data_name=data_name)
