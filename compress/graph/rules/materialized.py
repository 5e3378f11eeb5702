"""Attention whose scores are held whole: keep ONNX Runtime's fused attention from computing them tile by tile.

Before: ``GroupQueryAttention(qkv, ..., cos_cache, sin_cache)``.
After:  the same node with ``head_sink`` (float32 ``[heads]``) of ``NOTHING``.

A sink is one more score in a softmax's denominator (Xiao et al., arXiv 2309.17453); ``exp(NOTHING - maximum)`` is 0, so
nothing changes but the kernel: the CPU provider's tiled one knows no sinks. On x86 that one takes 1.0 to 2.4 times as
long for a prompt as two products of matrices with all scores between them (docs/performance.md has heads and lengths);
one token after others takes about the same in both. The price is memory: ``heads * new * total`` floats while one
block runs, which feeding a prompt in pieces bounds (``genai_config.json`` asks for it).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compress.graph.rules._edit import constant

_SINK_INPUT = 11
#: So far below any score that its exponential is 0, and far enough from float32's end to be subtracted from.
NOTHING = -1e30


def apply(graph: ir.Graph, heads: int) -> int:
    """Give every attention node of ``heads`` heads the sink; returns how many."""
    attention = [node for node in graph if node.op_type == "GroupQueryAttention"]
    sink = constant(graph, "attention/no_sink", np.full(heads, NOTHING, dtype=np.float32))
    for node in attention:
        node.resize_inputs(max(len(node.inputs), _SINK_INPUT + 1))
        node.replace_input_with(_SINK_INPUT, sink)
    return len(attention)
