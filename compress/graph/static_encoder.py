"""An encoder's graph for one text of a fixed length, in standard operators, its mask finite.

The order matters: shapes first (the mask's spelling depends on them), then the mask, then what it leaves behind.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes

from compress.errors import CompressError
from compress.graph import npu_mask, static_shapes

#: QuantizeLinear and DequantizeLinear of 16 bits begin with opset 21. From 18, where the exporter writes, to there the
#: standard only added types, but for these operators.
OPSET = 21
_CHANGED = frozenset({"AveragePool", "DFT", "GridSample", "GroupNormalization", "Resize"})


def make_static(model: ir.Model, length: int) -> dict[str, int]:
    """Rewrite in place; returns how often each rule fired.

    Raises:
        CompressError: A node is not of the standard, or the mask is not that of padding.
    """
    foreign = sorted({f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph if not _known(node)})
    if foreign:
        raise CompressError(
            "the graph has operators whose meaning in the static form is not known: " + ", ".join(foreign),
            hint="--set 'graph.fusions=[\"gelu\"]' leaves out fused ones",
        )
    model.opset_imports[""] = OPSET
    model.opset_imports.pop("com.microsoft", None)
    static_shapes.fix(model, {"batch_size": 1, "sequence_length": length})
    masks = npu_mask.apply(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    static_shapes.infer_shapes(model)
    return {"finite_mask": masks}


def _known(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type not in _CHANGED
