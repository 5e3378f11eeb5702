"""An encoder's graph: transformers' own model as torch.onnx writes it goes in, fused nodes over planned bytes come out.

Requires a skeleton (names, no values) and a :class:`~compress.planning.Plan`; runs the rules of ``graph/rules`` in
order; ensures that every initializer is either inline with its value or a reference into ``model.onnx.data``, and that
each rule fired as often as the profile expects.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from compress.contracts import Encoder
from compress.errors import CompressError
from compress.graph.finished import FinishedGraph, place_vectors, unplaced
from compress.graph.rules import (
    attention,
    gelu,
    gemm,
    linear,
    packed_attention,
    padding,
    pooling,
    skip_norm,
    smooth,
    table,
)
from compress.graph.rules._edit import Weights
from compress.graph.static_encoder import make_static
from compress.planning import Plan
from compress.profile import Profile
from compress.source.sentence_transformers import Pooling


def build_encoder(
    skeleton: Path,
    plan: Plan,
    profile: Profile,
    inline: Mapping[str, npt.NDArray[Any]],
    *,
    data_name: str,
    pool: Pooling,
) -> FinishedGraph:
    """Rewrite the skeleton for the plan.

    Args:
        skeleton: File that :mod:`compress.graph.encoder_skeleton` wrote.
        plan: Fates and places of every weight.
        profile: Accuracy level of block-quantized products, and the fusions it expects.
        inline: Values of the planned tensors that are too small for the data file, by planned name.
        data_name: File name of the external data, as the graph refers to it.
        pool: How an embedding is made of its tokens' states; ignored for other tasks.

    Raises:
        CompressError: A rule fired less often than the profile asks for.
    """
    encoder = plan.structure
    assert isinstance(encoder, Encoder)
    model = ir.load(skeleton)
    graph = model.graph
    weights = Weights(graph, plan, inline, data_name)
    static = profile.graph.static_length is not None
    gemm.apply(graph)
    fired = dict.fromkeys(("attention", "gelu", "packed_attention"), 0)
    if "attention" in profile.graph.fusions:
        fired["attention"] = attention.apply(graph, encoder.heads)
    if "gelu" in profile.graph.fusions:
        fired["gelu"] = gelu.apply(graph, tanh=profile.graph.gelu == "tanh", standard=static)
    fired["smooth"] = smooth.apply(graph, plan, weights)
    if any(fate.scheme is not None and fate.scheme.activations == "dynamic" for fate in plan.fates):
        fired["padding"] = padding.apply(graph, weights, encoder.vectors[0].graph_name.removesuffix(".weight"))
    fired["linear"] = linear.apply(graph, plan, weights, accuracy_level=profile.quantize.accuracy_level)
    if "packed_attention" in profile.graph.fusions:
        fired["packed_attention"] = packed_attention.apply(graph, encoder.head_dim)
    fired["skip_norm"] = skip_norm.apply(graph) if "skip_norm" in profile.graph.fusions else 0
    fired["table"] = table.apply(graph, plan, weights, "integers" if static else profile.graph.tables)
    fired["vector"] = place_vectors(graph, plan, weights)
    if encoder.task == "embedding":
        fired["pooling"] = pooling.apply(graph, pool.mode, normalize=pool.normalize, static=static)
    weights.restore_names()
    _check(graph, plan, profile, fired)
    if profile.graph.static_length is not None:
        fired |= make_static(model, profile.graph.static_length)
    else:
        model.opset_imports["com.microsoft"] = 1
    model.producer_name = "compress"
    model.producer_version = None
    graph.name = plan.model_type
    return FinishedGraph(model, {}, fired)


def _check(graph: ir.Graph, plan: Plan, profile: Profile, fired: Mapping[str, int]) -> None:
    layers = plan.structure.layers
    short = []
    for rule, count in profile.graph.minimum_fusions.items():
        if fired[rule] < count * layers:
            short.append(f"{rule} fired {fired[rule]} times, {count} a layer make {count * layers}")
    structure = plan.structure
    for kind, wanted in (("linear", len(structure.linears)), ("vector", len(structure.vectors))):
        if fired[kind] < wanted:
            short.append(f"{kind} {fired[kind]} of {wanted}")
    short += [f"{name} has no value" for name in unplaced(graph)]
    if short:
        raise CompressError(
            "the graph is not what the profile expects: " + ", ".join(short),
            hint="install the versions of torch and transformers that pyproject.toml pins, or report the model; "
            "--set graph.minimum_fusions={} takes the graph as it is",
        )
