"""Every tensor between nodes in integers of fixed range: the graph that NPUs run without falling back.

Before (x, y float; W is ``DequantizeLinear(codes, scales)`` already)::

    y = Op(x, W, c)

After (s, z from the ranges that calibration found; c a constant, stored as integers)::

    x' = DequantizeLinear(QuantizeLinear(x, sx, zx), sx, zx)
    y  = Op(x', W, DequantizeLinear(c'));     y' = DequantizeLinear(QuantizeLinear(y, sy, zy), sy, zy)

Second factor of a product of two activations, at 16 bits (HTP takes an unsigned one as 8 bits: the relative error of
softmax(scores) V is 1.1e-2 then, and 2.1e-4 with a signed one)::

    y = MatMul(a', b')   ->   y = MatMul(a', DequantizeLinear(QuantizeLinear(b', s, 0)))      # int16

What only moves values (Reshape, Transpose, Split ...) passes its input's scale on: accelerators do not rescale there,
and refuse other scales. Scales of MatMulNBits are its weight's, and stay float. Graph outputs stay float, behind a last
DequantizeLinear. Values that are no floats are left alone. An asymmetric range of unsigned integers contains 0, so that
0 is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from compress.errors import CompressError
from compress.graph.rules._edit import forget

Ranges = Mapping[str, tuple[float, float]]

#: Nodes whose output has the values of their first input, elsewhere.
MOVES = frozenset(
    {"Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
#: Outputs whose range is known whatever the inputs.
KNOWN_RANGES: Ranges = {
    "Softmax": (0.0, 1.0),
    "Sigmoid": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "LpNormalization": (-1.0, 1.0),
}
#: What calibrated ranges are widened by, by bits: a third of a bit of 16 for values that no calibration text had.
HEADROOM = {8: 1.0, 16: 1.25}
#: The narrowest range: below, a scale would not be a normal float32, and accelerators compute with its reciprocal.
_NARROWEST = 1e-4

#: NumPy's and ONNX's type of codes, by bits and whether they have a sign.
_TYPES: Mapping[tuple[int, bool], tuple[Any, ir.DataType]] = {
    (8, False): (np.uint8, ir.DataType.UINT8),
    (16, False): (np.uint16, ir.DataType.UINT16),
    (16, True): (np.int16, ir.DataType.INT16),
}


@dataclass(frozen=True)
class Grid:
    """The numbers that a tensor can hold: ``(code - zero_point) * scale``, codes of ``bits`` bits.

    Codes are unsigned, or ``signed`` with zero point 0.
    """

    scale: np.float32
    zero_point: int
    bits: int
    signed: bool = False

    @classmethod
    def covering(cls, low: float, high: float, bits: int) -> Grid:
        """Return the finest grid that reaches from ``low`` to ``high`` and contains 0.

        Raises:
            CompressError: An end is not finite.
        """
        if not (np.isfinite(low) and np.isfinite(high)) or low > high:
            raise CompressError(f"{low} to {high} is no range of values")
        low, high = min(low, 0.0), max(high, 0.0)
        high = max(high, low + _NARROWEST)
        levels = (1 << bits) - 1
        scale = np.float32((high - low) / levels)
        return cls(scale, int(np.clip(round(-low / float(scale)), 0, levels)), bits)

    @classmethod
    def symmetric(cls, low: float, high: float, bits: int) -> Grid:
        """Return the finest grid around 0 that reaches both ends; the least code of all stays unused."""
        reach = max(-low, high, _NARROWEST)
        return cls(np.float32(reach / ((1 << (bits - 1)) - 1)), 0, bits, signed=True)

    @property
    def types(self) -> tuple[Any, ir.DataType]:
        """Return NumPy's and ONNX's type of the codes."""
        return _TYPES[self.bits, self.signed]

    def codes(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return values as codes: rounded to even and saturated, as QuantizeLinear does."""
        rounded = np.rint(values.astype(np.float64) / np.float64(self.scale)) + self.zero_point
        kind = self.types[0]
        codes: npt.NDArray[Any] = np.clip(rounded, np.iinfo(kind).min, np.iinfo(kind).max).astype(kind)
        return codes


def float_values(graph: ir.Graph) -> list[ir.Value]:
    """Return the values whose range has to be known: float inputs, and what nodes compute from them.

    What is moved only, or has a known range, is left out.
    """
    found = [value for value in graph.inputs if _is_float(value)]
    for node in graph:
        if node.op_type not in MOVES and node.op_type not in KNOWN_RANGES and node.op_type != "DequantizeLinear":
            found += [output for output in node.outputs if _is_float(output)]
    seen = set(found)
    return found + [value for value in dict.fromkeys(map(_computed_operand, graph)) if value and value not in seen]


def _computed_operand(node: ir.Node) -> ir.Value | None:
    """Return the second factor of a product of two activations, ``None`` of other nodes."""
    value = node.inputs[1] if node.op_type == "MatMul" else None
    made = value.producer() if value is not None else None
    return value if made is not None and made.op_type != "DequantizeLinear" else None


def insert(graph: ir.Graph, ranges: Ranges, *, bits: int = 16, keep: Collection[ir.Value] = ()) -> int:
    """Insert the pairs; returns how many tensors got one.

    Args:
        graph: Shapes and types known; opset 21 or later for 16 bits. Weights are behind DequantizeLinear already.
        ranges: Least and greatest value of every tensor in :func:`float_values`, by name.
        bits: Of activations and constants, 8 or 16.
        keep: Tensors that stay in floats, as do the constants of nodes that read or make one.

    Raises:
        CompressError: A tensor has no range, or a float constant is too large to be one of the graph's own: a weight
            that nobody quantized.
    """
    return _Pass(graph, ranges, bits, frozenset(keep)).run()


class _Pass:
    def __init__(self, graph: ir.Graph, ranges: Ranges, bits: int, keep: frozenset[ir.Value]) -> None:
        self.graph, self.ranges, self.bits, self.keep = graph, ranges, bits, keep
        self.grids: dict[ir.Value, Grid] = {}
        self._names: dict[ir.Value, str] = {}
        self._signed: dict[tuple[ir.Value, Grid], ir.Value] = {}
        self._constants: dict[ir.Value, ir.Value] = {}
        self._parameters: dict[Grid, tuple[ir.Value, ir.Value]] = {}

    def run(self) -> int:
        nodes = list(self.graph)
        for node in nodes:
            if node.op_type == "DequantizeLinear":
                self._stored(node)
        for value in list(self.graph.inputs):
            if _is_float(value):
                self._pair(value, self._found(value), before=nodes[0])
        operands: dict[ir.Node, ir.Value | None] = {}
        if self.bits == 16:
            operands = {node: _computed_operand(node) for node in nodes}
        for node in nodes:
            if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
                continue
            operand = operands.get(node)
            if operand is not None:
                self._sign(node, operand)
            if self.keep.isdisjoint([*node.inputs, *node.outputs]):
                self._fold_constants(node)
            for output in node.outputs:
                if _is_float(output) and output not in self.keep:
                    self._pair(output, self._grid(node, output), after=node)
        return len(self.grids)

    def _stored(self, node: ir.Node) -> None:
        """Take note of the grid of a weight that has one for all its values: what moves them passes it on."""
        parts = [ir.convenience.get_const_tensor(value) for value in node.inputs[1:] if value is not None]
        codes = node.inputs[0]
        assert codes is not None
        bits = next((bits for (bits, signed), kinds in _TYPES.items() if kinds[1] == codes.dtype and not signed), None)
        if bits is not None and all(part is not None and part.size == 1 for part in parts):
            numbers = [part.numpy().reshape(()) for part in parts if part is not None]
            self.grids[node.outputs[0]] = Grid(np.float32(numbers[0]), int(numbers[1]) if numbers[1:] else 0, bits)

    def _grid(self, node: ir.Node, output: ir.Value) -> Grid:
        if node.op_type in MOVES:
            source = node.inputs[0]
            assert source is not None
            if source in self.grids:
                return self.grids[source]
        if node.op_type in KNOWN_RANGES:
            return Grid.covering(*KNOWN_RANGES[node.op_type], self.bits)
        return self._found(output)

    def _found(self, value: ir.Value) -> Grid:
        return Grid.covering(*self._range(value), self.bits)

    def _range(self, value: ir.Value) -> tuple[float, float]:
        name = self._names.get(value, value.name or "")
        found = self.ranges.get(name)
        if found is None:
            raise CompressError("calibration found no range for a tensor", where=name)
        low, high = found
        return low * HEADROOM[self.bits], high * HEADROOM[self.bits]

    def _sign(self, product: ir.Node, operand: ir.Value) -> None:
        """Let a product read its second factor in signed codes."""
        low, high = self._range(operand)
        grid = Grid.symmetric(low, high, self.bits)
        read = product.inputs[1]
        assert read is not None
        if (read, grid) not in self._signed:
            self._signed[read, grid] = self._nodes(read, grid, f"{operand.name}/signed", before=product)
        product.replace_input_with(1, self._signed[read, grid])

    def _fold_constants(self, node: ir.Node) -> None:
        """Let a node read its float constants as integers."""
        if node.op_type == "MatMulNBits":
            return  # all it reads but its first input is its weight
        for index, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and _is_float(value):
                node.replace_input_with(index, self._constant(value, node))
                forget(self.graph, value)

    def _constant(self, value: ir.Value, before: ir.Node) -> ir.Value:
        if value in self._constants:
            return self._constants[value]
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor):
            raise CompressError(
                "a weight is still in floats, which an integer graph does not have",
                where=value.name,
                hint="give its role 8 bits: no --set quantize.roles.*.bits=32 with this profile",
            )
        array = tensor.numpy()
        grid = Grid.covering(float(array.min()), float(array.max()), self.bits)
        codes = self._initializer(f"{value.name}/codes", grid.codes(array))
        made = ir.Value(name=f"{value.name}/constant", shape=value.shape, type=value.type)
        self.graph.insert_before(
            before,
            ir.node("DequantizeLinear", [codes, *self._of(grid)], outputs=[made], name=f"{made.name}/DequantizeLinear"),
        )
        self.grids[made] = grid
        self._constants[value] = made
        return made

    def _pair(
        self, value: ir.Value, grid: Grid, *, after: ir.Node | None = None, before: ir.Node | None = None
    ) -> None:
        """Let everybody read a value through its grid; a graph output keeps its name."""
        was_output = value.is_graph_output()
        users = list(value.uses())
        rounded = self._nodes(value, grid, f"{value.name}/rounded", after=after, before=before)
        for user, index in users:
            user.replace_input_with(index, rounded)
        if was_output:
            outputs = self.graph.outputs
            outputs[list(outputs).index(value)] = rounded
            self._names[value] = value.name or ""
            rounded.name, value.name = value.name, f"{value.name}/exact"

    def _nodes(
        self,
        value: ir.Value,
        grid: Grid,
        name: str,
        *,
        after: ir.Node | None = None,
        before: ir.Node | None = None,
    ) -> ir.Value:
        """Insert a pair and return what comes out of it."""
        codes = ir.Value(name=f"{name}/codes", shape=value.shape, type=ir.TensorType(grid.types[1]))
        rounded = ir.Value(name=name, shape=value.shape, type=value.type)
        made = (
            ir.node("QuantizeLinear", [value, *self._of(grid)], outputs=[codes], name=f"{codes.name}/QuantizeLinear"),
            ir.node(
                "DequantizeLinear", [codes, *self._of(grid)], outputs=[rounded], name=f"{rounded.name}/DequantizeLinear"
            ),
        )
        if after is not None:
            self.graph.insert_after(after, made)
        else:
            assert before is not None
            self.graph.insert_before(before, made)
        self.grids[rounded] = grid
        return rounded

    def _of(self, grid: Grid) -> tuple[ir.Value, ir.Value]:
        """Return scale and zero point as graph values; equal grids share theirs."""
        if grid not in self._parameters:
            number = len(self._parameters)
            self._parameters[grid] = (
                self._initializer(f"scale_{number}", np.array(grid.scale)),
                self._initializer(f"zero_point_{number}", np.array(grid.zero_point, grid.types[0])),
            )
        return self._parameters[grid]

    def _initializer(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value


def _is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT
