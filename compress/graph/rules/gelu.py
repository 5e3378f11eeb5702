"""GELU in one node (Hendrycks and Gimpel, 2016), exact or in its tanh form.

Before, exact (five nodes)::

    y = Mul(x, Mul(0.5, Add(Erf(Div(x, sqrt(2))), 1)))

Before, tanh form (eight nodes)::

    y = Mul(Mul(x, 0.5), Add(Tanh(Mul(Add(x, Mul(Pow(x, 3), 0.044715)), sqrt(2 / pi))), 1))

After::

    y = com.microsoft.Gelu(x)        y = com.microsoft.FastGelu(x)

or, in standard operators (opset 20 and later)::

    y = Gelu(x)                      y = Gelu(x, approximate="tanh")
"""

from __future__ import annotations

import math

import onnx_ir as ir

from compress.graph.rules._edit import drop, node, number, producer, supersede

_CLOSE = 1e-4


def apply(graph: ir.Graph, *, tanh: bool = False, standard: bool = False) -> int:
    """Fuse every GELU; returns how many. ``tanh`` makes exact ones tanh forms: 5e-4 apart at most, and faster."""
    count = 0
    for last in list(graph):
        if last.op_type != "Mul":
            continue
        for match, op_type in ((_exact, "FastGelu" if tanh else "Gelu"), (_tanh, "FastGelu")):
            found = match(last)
            if found is None:
                continue
            source, dead = found
            old = last.outputs[0]
            fused = ir.Value(name=f"{old.name}/fused", shape=old.shape, type=old.type)
            if standard:
                form = {"approximate": "tanh"} if op_type == "FastGelu" else {}
                node(graph, last, "Gelu", [source], [fused], **form)
            else:
                node(graph, last, op_type, [source], [fused], domain="com.microsoft")
            supersede(old, fused)
            drop(graph, dead)
            count += 1
            break
    return count


def _exact(last: ir.Node) -> tuple[ir.Value, list[ir.Node]] | None:
    source, half = last.inputs
    halved = producer(half, "Mul")
    if halved is None or source is None or not _near(halved.inputs[0], 0.5):
        return None
    shifted = producer(halved.inputs[1], "Add")
    error = producer(shifted.inputs[0], "Erf") if shifted and _near(shifted.inputs[1], 1.0) else None
    divided = producer(error.inputs[0], "Div") if error else None
    if shifted is None or error is None or divided is None:
        return None
    if divided.inputs[0] is not source or not _near(divided.inputs[1], math.sqrt(2)):
        return None
    return source, [last, halved, shifted, error, divided]


def _tanh(last: ir.Node) -> tuple[ir.Value, list[ir.Node]] | None:
    halved, shifted = producer(last.inputs[0], "Mul"), producer(last.inputs[1], "Add")
    if halved is None or shifted is None or not _near(halved.inputs[1], 0.5) or not _near(shifted.inputs[1], 1.0):
        return None
    source = halved.inputs[0]
    bent = producer(shifted.inputs[0], "Tanh")
    scaled = producer(bent.inputs[0], "Mul") if bent else None
    summed = producer(scaled.inputs[0], "Add") if scaled and _near(scaled.inputs[1], math.sqrt(2 / math.pi)) else None
    weighted = producer(summed.inputs[1], "Mul") if summed else None
    cubed = producer(weighted.inputs[0], "Pow") if weighted and _near(weighted.inputs[1], 0.044715) else None
    if source is None or bent is None or scaled is None or summed is None or weighted is None or cubed is None:
        return None
    if summed.inputs[0] is not source or cubed.inputs[0] is not source or not _near(cubed.inputs[1], 3.0):
        return None
    return source, [last, halved, shifted, bent, scaled, summed, weighted, cubed]


def _near(value: ir.Value | None, wanted: float) -> bool:
    found = number(value)
    return found is not None and abs(found - wanted) < _CLOSE
