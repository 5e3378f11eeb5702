"""The decoder's graph: a skeleton goes in, a graph whose weights lie where the plan says comes out.

Requires a skeleton (names, no values) and a :class:`~compress.planning.Plan`; runs the rules of ``graph/rules`` in
order; ensures that every initializer is either inline with its value or a reference into ``model.onnx.data``, and that
each rule fired as often as the decoder has places for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from compress.errors import CompressError
from compress.graph.finished import FinishedGraph, place_vectors, unplaced
from compress.graph.rules import (
    half,
    integer_cache,
    linear,
    logits_to_keep,
    long_rope,
    materialized,
    names,
    rotary,
    rotation,
    table,
)
from compress.graph.rules._edit import Weights
from compress.graph.static_decoder import make_static
from compress.planning import Plan
from compress.profile import Profile

#: RMSNormalization is standard from here on; what is older loads in more runtimes.
OPSET = 23
#: Tokens of a text on which the ranges of a static decoder are observed, at most.
LONGEST_OBSERVED = 256


def build_decoder(
    skeleton: Path, plan: Plan, profile: Profile, inline: Mapping[str, npt.NDArray[Any]], *, data_name: str
) -> FinishedGraph:
    """Rewrite the skeleton for the plan.

    Args:
        skeleton: File that :func:`compress.graph.skeleton.build_skeleton` wrote.
        plan: Fates and places of every weight.
        profile: Accuracy level and the default of ``logits_to_keep``.
        inline: Values of the planned tensors that are too small for the data file, by planned name.
        data_name: File name of the external data, as the graph refers to it.

    Raises:
        CompressError: A rule fired less often than the decoder has places for it.
    """
    model = ir.load(skeleton)
    turned = rotation.insert_head_turn(model.graph, plan)
    weights = Weights(model.graph, plan, inline, data_name)
    fired: dict[str, int] = {}
    constants: dict[str, npt.NDArray[Any]] = {}
    names.normalise(model)
    fired |= {"head_rotation": turned} if turned else {}
    fired["linear"] = linear.apply(model.graph, plan, weights, accuracy_level=profile.quantize.accuracy_level)
    static = profile.graph.static_length
    fired["table"] = table.apply(model.graph, plan, weights, "fused" if static is None else "integers")
    fired["vector"] = place_vectors(model.graph, plan, weights)
    if plan.decoder.rope_shape is not None and static is None:
        constants = rotary.apply(model.graph, plan, weights)
    if plan.decoder.rope_switch is not None:
        fired["long_rope"] = long_rope.apply(model.graph, plan.decoder.rope_switch)
    if plan.attention == "materialized":
        fired["materialized"] = materialized.apply(model.graph, plan.decoder.heads)
    if static is None:
        fired["logits_to_keep"] = logits_to_keep.apply(model.graph, profile.graph.logits_to_keep)
    weights.restore_names()
    if plan.float_type == "float16":
        fired["half"] = half.apply(model.graph)
    if plan.cache_type == "int8":  # after that: its scales are float32 whatever the graph's floats are
        fired["integer_cache"] = integer_cache.apply(model.graph, plan, weights)
    _check(model.graph, plan, fired)
    model.functions.clear()  # fallback bodies of fused operators, which every supported provider has kernels for
    model.opset_imports[""] = OPSET
    model.producer_name = "compress"
    model.producer_version = None
    model.graph.name = plan.model_type
    if static is None:
        return FinishedGraph(model, constants, fired)
    decode, whole = model.clone(), model.clone()
    cache = min(profile.graph.cache_length, plan.decoder.context_length)
    fired |= make_static(model, static, cache)
    make_static(decode, 1, cache)
    make_static(whole, min(cache, LONGEST_OBSERVED), 0)
    return FinishedGraph(model, constants, fired, decode=decode, whole=whole)


def _check(graph: ir.Graph, plan: Plan, fired: Mapping[str, int]) -> None:
    decoder = plan.decoder
    expected = {
        "linear": len(decoder.linears),
        "table": len(decoder.tables),
        "vector": len(decoder.vectors),
        **({"logits_to_keep": 1} if "logits_to_keep" in fired else {}),
        **({name: decoder.layers for name in ("long_rope", "materialized", "integer_cache") if name in fired}),
        # Keys and values, in and out, and the logits.
        **({"half": 4 * decoder.layers + 1} if plan.float_type == "float16" else {}),
    }
    short = [f"{rule} {fired[rule]} of {count}" for rule, count in expected.items() if fired[rule] != count]
    attention = sum(node.op_type == "GroupQueryAttention" for node in graph)
    if attention != decoder.layers:
        short.append(f"fused attention {attention} of {decoder.layers}")
    skipped = sum(node.op_type.startswith("Skip") for node in graph)
    # Every norm but the first follows a residual sum, two a block; GPT-2's first one follows the position sum.
    if skipped < 2 * decoder.layers:
        short.append(f"fused residual norms {skipped} of {2 * decoder.layers}")
    missing = unplaced(graph)
    if short or missing:
        raise CompressError(
            "the graph is not what the plan expects: "
            + ", ".join(short + [f"{name} has no value" for name in missing]),
            hint="mobius-onnx may have changed: install the version that pyproject.toml pins, or report the model",
        )
