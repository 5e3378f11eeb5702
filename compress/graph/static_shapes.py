"""Static shapes: what accelerators without dynamic shapes need.

Before: inputs ``[batch_size, sequence_length]``, and nodes that compute with shapes (Shape, Range, Expand ...).
After: every input has numbers for dimensions, and what depends on nothing but shapes is a constant.

Weights are never read: nodes that read one are left alone, however small it is. Every value between nodes has a type
and a shape afterwards, as far as ONNX knows how to infer them.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants

from compress.errors import CompressError

#: Elements of the largest constant that is made: a mask or a row of positions, never a weight.
_LARGEST = 1 << 20


def fix(model: ir.Model, dimensions: Mapping[str, int]) -> None:
    """Give every free dimension of the inputs its number, and fold what becomes constant.

    Args:
        model: Changed in place; its external data need not exist yet.
        dimensions: Numbers by the dimension's name.

    Raises:
        CompressError: An input keeps a free dimension, or a node's output has no known type.
    """
    graph = model.graph
    for value in graph.inputs:
        if value.shape is not None:
            value.shape = ir.Shape(_number(dimension, dimensions, value.name or "") for dimension in value.shape)
    _forget_shapes(graph)
    fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=_LARGEST,
        output_size_limit=_LARGEST,
        should_fold=_should_fold,
    )
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.RemoveUnusedNodesPass()(model)
    infer_shapes(model)


def infer_shapes(model: ir.Model) -> None:
    """Infer types and shapes of all values.

    Raises:
        CompressError: Some node's output stays unknown: an operator outside the standard, or a contradiction.
    """
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    for node in model.graph:
        for output in node.outputs:
            if output.uses() and (output.type is None or output.shape is None):
                raise CompressError(
                    f"the shape of what {node.op_type} makes is not known", where=node.name or output.name
                )


def _number(dimension: int | ir.SymbolicDim, dimensions: Mapping[str, int], name: str) -> int:
    if isinstance(dimension, int):
        return dimension
    found = dimensions.get(str(dimension.value))
    if found is None:
        raise CompressError(f"the dimension {dimension.value} has no number", where=f"input {name}")
    return found


def _forget_shapes(graph: ir.Graph) -> None:
    """Drop what was inferred with free dimensions: it would be kept as it is."""
    for node in graph:
        for output in node.outputs:
            output.shape = None


def _should_fold(node: ir.Node) -> bool | None:
    if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        return False
    if any(value is not None and isinstance(value.const_value, ir.ExternalTensor) for value in node.inputs):
        return False
    return None
