"""Apple's CoreML: sessions on macOS, whose ordinary onnxruntime has it; elsewhere a check of the graph's operators.

The check reads the operator list of ML programs that onnxruntime ships for mobile developers. It is a forecast by
operator types: limits on shapes and attributes are not in it, so a device may still put nodes elsewhere.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.contracts import Scheme
from compress.providers._base import OrtProvider

_LIST = "coreml_supported_mlprogram_ops.md"


class CoreMlProvider(OrtProvider):
    """The CoreML provider, ML programs (iOS 15, macOS 12 and later)."""

    name = "coreml"
    onnxruntime_name = "CoreMLExecutionProvider"

    def missing(self) -> str | None:
        """Return that this is not macOS."""
        return None if sys.platform == "darwin" else "CoreML runs on macOS and iOS only"

    def remedy(self) -> str | None:
        """Return what can be had here."""
        return "run it on a Mac; here, `compress validate ARTIFACT --on coreml` checks the operators statically"

    def device(self) -> str:
        """Return what CoreML chooses from."""
        return "CoreML (CPU, GPU or Neural Engine, as it decides)"

    def defaults(self) -> dict[str, str]:
        """Return the format whose operator list the static check reads."""
        return {"ModelFormat": "MLProgram"}

    def supports(self, scheme: Scheme) -> str | None:
        """Return why CoreML cannot run a scheme: it knows no ``MatMulNBits`` and no integer products."""
        kind = "weight-only products (MatMulNBits)" if scheme.activations == "none" else "integer products"
        return f"{kind} have no operator in CoreML; use float weights"

    def static_placement(self, model: Path) -> Mapping[str, Any]:
        """Return which nodes of a graph CoreML's operator list has, as a placement."""
        import onnx
        from onnxruntime.tools.mobile_helpers import usability_checker

        logging.getLogger().setLevel(logging.ERROR)
        graph = onnx.load(model, load_external_data=False)
        found = usability_checker.check_coreml_partitions(graph, False, _LIST)
        unknown = {item.rpartition(":")[2] for item in found.unsupported_ops}
        nodes = [
            f"{node.name} ({node.op_type}) has no operator in CoreML"
            for node in graph.graph.node
            if node.op_type in unknown
        ]
        return {
            "provider": self.name,
            "nodes_total": found.num_nodes,
            "nodes_on_provider": found.num_supported_nodes,
            "fallback_nodes": sorted(nodes),
        }


PROVIDER = CoreMlProvider()
