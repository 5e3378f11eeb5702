"""All that building a graph takes: a tiny model's skeleton, plan and small weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import onnx_ir as ir

from compress import pipeline, pooling, weights
from compress.contracts import Encoder
from compress.graph.build import build_graph
from compress.graph.finished import FinishedGraph
from compress.package.writer import DataFile
from compress.planning import Plan, make_plan
from compress.profile import Profile, load_profile
from compress.quantize import load_quantizer
from compress.source import open_checkpoint
from compress.source.sentence_transformers import Pooling
from tiny_models import Skeletons


@dataclass(frozen=True)
class Prepared:
    """What :func:`build_graph` takes."""

    skeleton: Path
    plan: Plan
    profile: Profile
    inline: Mapping[str, Any]
    pool: Pooling | None

    def build(self) -> FinishedGraph:
        return build_graph(
            self.skeleton, self.plan, self.profile, self.inline, data_name="model.onnx.data", pool=self.pool
        )

    def edited(self, edit: Callable[[ir.Graph], object]) -> Prepared:
        """Return the same with a changed skeleton."""
        model = ir.load(self.skeleton)
        edit(model.graph)
        path = self.skeleton.with_name(f"{uuid4()}.onnx")
        ir.save(model, path)
        return replace(self, skeleton=path)


Prepare = Callable[..., Prepared]


def prepared(directory: Path, skeletons: Skeletons, work: Path, profile: str, *overrides: str) -> Prepared:
    """Plan a saved model and quantize its weights without calibration."""
    recipe = load_profile(profile, overrides)
    with open_checkpoint(str(directory)) as checkpoint:
        structure = pipeline.describe(checkpoint)
        pool = pooling.resolve(structure, recipe, checkpoint)
        plan = make_plan(structure, recipe, checkpoint)
        with DataFile(work / f"{uuid4()}.data", plan.data_bytes) as data:
            inline = weights.write_weights(plan, checkpoint, load_quantizer("rtn"), data, calibrate=None, threads=1)
    skeleton = work / f"{uuid4()}.onnx"
    skeletons.build(directory, skeleton, structure.task if isinstance(structure, Encoder) else "")
    return Prepared(skeleton, plan, recipe, inline, pool)


def operators(graph: ir.Graph) -> Counter[str]:
    """Return how many nodes of each type there are."""
    return Counter(node.op_type for node in graph)
