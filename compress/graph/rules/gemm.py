"""Linear layers of two-dimensional inputs, in the spelling of all the others.

Before (a head on one position)::

    y = Gemm(x, weight, bias, transB=1)

After::

    y = Add(MatMul(x, Transpose(weight)), bias)
"""

from __future__ import annotations

import onnx_ir as ir

from compress.graph.rules._edit import drop, node, supersede


def apply(graph: ir.Graph) -> int:
    """Spell every Gemm of a weight as MatMul and Add; returns how many."""
    found = [candidate for candidate in graph if candidate.op_type == "Gemm" and _plain(candidate)]
    for gemm in found:
        source, weight, bias = gemm.inputs
        old = gemm.outputs[0]
        transposed, product, output = (ir.Value(name=f"{old.name}/{part}") for part in ("weight", "product", "sum"))
        output.shape, output.type = old.shape, old.type
        node(graph, gemm, "Transpose", [weight], [transposed], perm=[1, 0])
        node(graph, gemm, "MatMul", [source, transposed], [product])
        node(graph, gemm, "Add", [product, bias], [output])
        supersede(old, output)
        drop(graph, [gemm])
    return len(found)


def _plain(gemm: ir.Node) -> bool:
    values = {name: attribute.value for name, attribute in gemm.attributes.items()}
    return (
        len(gemm.inputs) == 3
        and gemm.inputs[1] is not None
        and gemm.inputs[1].is_initializer()
        and (values.get("transB"), values.get("transA", 0)) == (1, 0)
        and (values.get("alpha", 1.0), values.get("beta", 1.0)) == (1.0, 1.0)
    )
