"""What every graph has in common when it is finished: its weights in their places, and its bytes on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from compress.graph.rules._edit import Weights
from compress.planning import Plan


@dataclass(frozen=True)
class FinishedGraph:
    """The finished graph.

    Attributes:
        model: Initializers refer to ``model.onnx.data``, or are inline.
        constants: Arrays that the skeleton computed and the writer must store, by planned name.
        fired: How often each rule fired.
        decode: Of a static decoder: the graph for one token; ``model`` is the one for several, the prefill.
        whole: Of a static decoder: the graph for a whole text and no cache, on which ranges are observed.
    """

    model: ir.Model
    constants: Mapping[str, npt.NDArray[Any]]
    fired: Mapping[str, int]
    decode: ir.Model | None = None
    whole: ir.Model | None = None


def place_vectors(graph: ir.Graph, plan: Plan, weights: Weights) -> int:
    """Give every norm its planned values; returns how many vectors there were."""
    placed = 0
    for vector in plan.structure.vectors:
        old = weights.skeleton(vector.graph_name)
        if old is not None:
            weights.replace(old, weights.value(plan.by_name[vector.graph_name].stored[0]))
            placed += 1
    return placed


def unplaced(graph: ir.Graph) -> list[str]:
    """Return the initializers that still have no value."""
    return [
        name
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.location == "not-written"
    ]


def serialize(model: ir.Model, path: Path) -> int:
    """Write the graph file and return its bytes; the external data is not touched.

    Only what a runtime reads goes in: no comments, no traces of the builder, no types of intermediate values. Nodes
    come in topological order, which ONNX demands: a tied table's scales are widened where the head is rewritten, at the
    end, and read at the beginning. onnxruntime does not mind, others do.
    """
    model.graph.sort()
    for node in model.graph:
        node.doc_string = None
        node.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    data = proto.SerializeToString(deterministic=True)
    path.write_bytes(data)
    return len(data)
