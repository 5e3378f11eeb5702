"""Small edits that every rule needs: making initializers for planned bytes, replacing values, dropping dead nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from compress.planning import Fate, Plan, StoredTensor

_DTYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
}


class Weights:
    """Makes graph values for planned tensors: a reference into the data file, or the value itself when it is small."""

    def __init__(self, graph: ir.Graph, plan: Plan, inline: Mapping[str, npt.NDArray[Any]], data_name: str) -> None:
        self.graph = graph
        self.plan = plan
        self._inline = inline
        self._data_name = data_name
        self._widened: dict[str, ir.Value] = {}
        self._made: dict[str, ir.Value] = {}
        self._skeleton = dict(graph.initializers)
        # Planned tensors keep the checkpoint's names, so the skeleton's own values step aside.
        for name, value in self._skeleton.items():
            value.name = f"skeleton/{name}"

    def skeleton(self, name: str) -> ir.Value | None:
        """Return the skeleton's initializer of that name."""
        return self._skeleton.get(name)

    def restore_names(self) -> None:
        """Give the skeleton's remaining constants their names back."""
        for name, value in self._skeleton.items():
            if value.is_initializer() and name not in self.graph.initializers:
                value.name = name

    def value(self, stored: StoredTensor, *, name: str | None = None, shape: tuple[int, ...] | None = None) -> ir.Value:
        """Return an initializer over ``stored``'s bytes; another ``shape`` of the same size is another view of them."""
        name, shape = name or stored.name, shape or stored.shape
        if name in self._made:
            return self._made[name]
        dtype = _DTYPES[stored.dtype]
        tensor: ir.TensorProtocol
        if stored.offset is None:
            tensor = ir.tensor(np.asarray(self._inline[stored.name]).reshape(shape), name=name)
        else:
            tensor = ir.ExternalTensor(
                self._data_name, stored.offset, stored.nbytes, dtype, shape=ir.Shape(shape), name=name
            )
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
        self.graph.register_initializer(value)
        self._made[name] = value
        return value

    def part(self, fate: Fate, kind: str) -> ir.Value | None:
        """Return a part of a quantized weight, ``None`` if its scheme has no such part."""
        stored = fate.part(kind)
        return self.value(stored) if stored is not None else None

    def scales(self, fate: Fate, before: ir.Node) -> ir.Value:
        """Return scales of the graph's float type: smaller ones get a Cast (and a Mul), which runtimes fold at load."""
        stored = fate.part("scales")
        assert stored is not None
        value = self.value(stored)
        if stored.dtype == self.plan.float_type:
            return value
        if fate.name not in self._widened:
            wide = ir.Value(name=f"{stored.name}.float32", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
            node(self.graph, before, "Cast", [value], [wide], to=int(ir.DataType.FLOAT))
            row_scales = self.part(fate, "row_scales")
            if row_scales is not None:
                product = ir.Value(name=f"{stored.name}.product", shape=value.shape, type=wide.type)
                node(self.graph, before, "Mul", [wide, row_scales], [product])
                wide = product
            self._widened[fate.name] = wide
        return self._widened[fate.name]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every user of ``old`` read ``new``, and drop ``old``."""
        ir.convenience.replace_all_uses_with(old, new)
        forget(self.graph, old)


def node(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Iterable[ir.Value | None],
    outputs: Iterable[ir.Value],
    *,
    domain: str = "",
    **attributes: Any,
) -> ir.Node:
    """Insert a node before another one; attributes are integers, floats, strings or lists of them."""
    outputs = list(outputs)
    made = ir.node(
        op_type,
        inputs=list(inputs),
        outputs=outputs,
        domain=domain,
        attributes=attributes,
        name=f"{outputs[0].name}/{op_type}",
    )
    graph.insert_before(before, made)
    return made


def drop(graph: ir.Graph, nodes: Iterable[ir.Node]) -> None:
    """Remove nodes whose outputs nobody reads any more, and initializers that only they read."""
    for dead in nodes:
        if dead.graph is None or any(output.uses() or output.is_graph_output() for output in dead.outputs):
            continue
        inputs = [value for value in dead.inputs if value is not None]
        graph.remove(dead, safe=True)
        for value in inputs:
            forget(graph, value)


def forget(graph: ir.Graph, value: ir.Value) -> None:
    """Drop an initializer that nobody reads any more."""
    if value.name is not None and graph.initializers.get(value.name) is value and not value.uses():
        del graph.initializers[value.name]


def only_user(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads a value, ``None`` if there are several or none."""
    users = {user for user, _ in value.uses()}
    return next(iter(users)) if len(users) == 1 else None


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node of that type that makes a value, ``None`` if another one does."""
    made = value.producer() if value is not None else None
    return made if made is not None and made.op_type == op_type else None


def number(value: ir.Value | None) -> float | None:
    """Return a constant scalar's value, ``None`` if it is none."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(()))


def append(graph: ir.Graph, op_type: str, inputs: Iterable[ir.Value], name: str, **attributes: Any) -> ir.Value:
    """Append a standard node and return its output."""
    output = ir.Value(name=name)
    made = ir.node(op_type, inputs=list(inputs), outputs=[output], attributes=attributes, name=f"{name}/{op_type}")
    graph.append(made)
    return output


def constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Return an inline initializer; one name is one value."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def supersede(old: ir.Value, new: ir.Value) -> None:
    """Let every user of ``old``, the graph's output included, read ``new``; an output keeps its name."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}/superseded"
        new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def products(graph: ir.Graph, weight: ir.Value, passed: list[ir.Node]) -> list[ir.Node]:
    """Follow a weight through Concat and Transpose to its MatMuls, in the graph's order; notes the nodes passed."""
    value = weight
    for _ in range(3):
        found = [user for user, _ in value.uses() if user.op_type == "MatMul"]
        if len(found) > 1:
            users = set(found)
            return [user for user in graph if user in users]
        if found:
            return found
        step = next((user for user, _ in value.uses() if user.op_type in ("Concat", "Transpose")), None)
        if step is None:
            return []
        if step not in passed:
            passed.insert(0, step)
        value = step.outputs[0]
    return []
