"""Input and output names and symbolic dimensions as the runtimes expect them.

Before: ``past_key_values.N.key [batch, H, past_sequence_len, D]`` and other names for the same lengths.
After:  ``past_key_values.N.key [batch_size, H, past_sequence_length, D]``, ``attention_mask [batch_size,
total_sequence_length]``. transformers.js wants the batch dimension of the cache to be called ``batch_size`` and takes
every other symbolic dimension of it as 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

_RENAMED = {
    "batch": "batch_size",
    "sequence_len": "sequence_length",
    "past_sequence_len": "past_sequence_length",
    "past_seq_len + seq_len": "total_sequence_length",
    "past_sequence_len + sequence_len": "total_sequence_length",
}


def normalise(model: ir.Model) -> None:
    """Rename symbolic dimensions everywhere; values inside the graph lose theirs (runtimes infer them)."""
    boundary = {*model.graph.inputs, *model.graph.outputs}
    for value in boundary:
        _rename(value, _RENAMED)
    for node in model.graph:
        for output in node.outputs:
            if output not in boundary:
                output.shape = None
                output.type = None


def _rename(value: ir.Value, renamed: Mapping[str, str]) -> None:
    if value.shape is None:
        return
    value.shape = ir.Shape(
        renamed.get(str(dim.value), str(dim.value)) if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape
    )
