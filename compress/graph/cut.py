"""A decoder's graph cut into pieces that can be run one after the other: what comes out is what the whole computes.

Before -> after, for a graph of L blocks::

    inputs -> embedding -> block 0 -> ... -> block L-1 -> norm, head -> logits

    inputs -> embedding -> x_0 | x_0, inputs -> block 0 -> x_1 | ... | x_L, inputs -> head -> logits

Nothing is known of families or operators: only which nodes read which cache inputs (``past_key_values.N.*``), and what
reads what. Nodes are of three kinds:

1. *constant*: they read only constants (scales that are widened). Every piece that needs them has a copy.
2. *shared*: they read graph inputs (but no cache), constants of at most one dimension, and each other: sequence
   lengths, positions. Every piece that needs them has a copy as well.
3. *own*: all others. Each is in exactly one piece.

A cut lies between the attention of two blocks, directly before a node that reads a matrix, where the fewest values go
across; among equals at the last place: behind the norm that the next block begins with. So no two nodes are parted that
ONNX Runtime fuses (a sum and its norm, a product and its bias), and the numbers stay what they are in the whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.errors import CompressError

if TYPE_CHECKING:
    import onnx

_PAST = re.compile(r"past_key_values\.(\d+)\..+")


@dataclass(frozen=True)
class Piece:
    """A part of a graph.

    Attributes:
        nodes: Indices into the graph's nodes, in their order: its own and its copies of constant and shared ones.
        copies: Those of them that an earlier piece has already.
        inputs: The graph's inputs that it reads.
        given: Values that earlier pieces hand to it.
        outputs: The graph's outputs that it makes.
        handed: Values that it makes for later pieces.
        passed: Values of earlier pieces that later ones read.
    """

    nodes: tuple[int, ...]
    copies: tuple[int, ...]
    inputs: tuple[str, ...]
    given: tuple[str, ...]
    outputs: tuple[str, ...]
    handed: tuple[str, ...]
    passed: tuple[str, ...]


def cut(model: onnx.ModelProto) -> list[Piece]:
    """Cut a decoder's graph at its blocks: the embedding, a piece a block, and the head.

    Args:
        model: Nodes in topological order; external data need not be there.

    Raises:
        CompressError: It has no cache inputs, its blocks overlap, or there is no place between two of them.
    """
    return _Cutter(model.graph).pieces()


def extract(model: onnx.ModelProto, piece: Piece, types: Mapping[str, int]) -> onnx.ModelProto:
    """Return a piece as a model of its own, whose initializers refer to the same external data.

    Args:
        model: The whole.
        piece: One of :func:`cut`.
        types: ONNX element types of the values that are ``given``: a session of the piece that makes them tells.
    """
    import onnx

    graph = model.graph
    nodes = [graph.node[index] for index in piece.nodes]
    read = {name for node in nodes for name in _reads(node)}
    made = onnx.ModelProto(ir_version=model.ir_version)
    made.opset_import.extend(model.opset_import)
    made.functions.extend(model.functions)
    made.graph.name = graph.name or "piece"
    made.graph.node.extend(nodes)
    made.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
    made.graph.input.extend(value for value in graph.input if value.name in piece.inputs)
    made.graph.input.extend(onnx.helper.make_tensor_value_info(name, types[name], None) for name in piece.given)
    made.graph.output.extend(value for value in graph.output if value.name in piece.outputs)
    # ONNX Runtime infers the types of the others.
    made.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in piece.handed)
    return made


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Yield what a node reads: its inputs, and what its subgraphs take from outside."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            inside = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            inside |= {name for own in graph.node for name in own.output}
            needed = [name for own in graph.node for name in _reads(own)] + [value.name for value in graph.output]
            yield from (name for name in needed if name not in inside)


class _Cutter:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.inputs = {value.name: index for index, value in enumerate(graph.input)}
        self.outputs = [value.name for value in graph.output]
        self.ranks = {tensor.name: len(tensor.dims) for tensor in graph.initializer if tensor.name not in self.inputs}
        self.reads = [list(dict.fromkeys(_reads(node))) for node in graph.node]
        self.maker = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
        self.constant, self.shared = self._kinds()
        self.own = [index for index in range(len(graph.node)) if index not in self.constant | self.shared]
        self.place = {index: position for position, index in enumerate(self.own)}

    def pieces(self) -> list[Piece]:
        """Return the pieces, each cut told apart from the one before."""
        starts = [0, *self._cuts(), len(self.own)]
        found: list[Piece] = []
        seen: set[int] = set()
        for start, stop in zip(starts, starts[1:], strict=False):
            own = self.own[start:stop]
            extra = [self.maker[name] for name in self.outputs if self.maker.get(name) in self.shared | self.constant]
            nodes = sorted({*own, *self._copied([*own, *([] if found else extra)])})
            found.append(self._piece(nodes, set(own), start, stop, seen))
            seen.update(nodes)
        return found

    def _piece(self, nodes: list[int], own: set[int], start: int, stop: int, seen: set[int]) -> Piece:
        made = {name for index in nodes for name in self.graph.node[index].output}
        read = {name for index in nodes for name in self.reads[index]}
        before, behind = self._across(start), self._across(stop)
        first = not seen
        outputs = [
            name
            for name in self.outputs
            if name in made and (self.maker[name] in own or (first and self.maker[name] not in self.place))
        ]
        return Piece(
            nodes=tuple(nodes),
            copies=tuple(index for index in nodes if index in seen),
            inputs=tuple(name for name in self.inputs if name in read),
            given=tuple(name for name in before if name in read),
            outputs=tuple(outputs),
            handed=tuple(name for name in behind if name in made),
            passed=tuple(name for name in behind if name not in made),
        )

    def _kinds(self) -> tuple[set[int], set[int]]:
        """Return which nodes are constant and which are shared."""
        constant: set[int] = set()
        shared: set[int] = set()
        for index, reads in enumerate(self.reads):
            makers = [self.maker[name] for name in reads if name in self.maker]
            asked = [name for name in reads if name in self.inputs]
            if not asked and constant.issuperset(makers):
                constant.add(index)
            elif (
                not any(_PAST.fullmatch(name) for name in asked)
                and not self._reads_matrix(index, constant)
                and (constant | shared).issuperset(makers)
            ):
                shared.add(index)
        return constant, shared

    def _reads_matrix(self, index: int, constant: set[int]) -> bool:
        """Return whether a node reads a constant of two dimensions or more, or what is made of one."""
        pending = [index]
        while pending:
            for name in self.reads[pending.pop()]:
                if self.ranks.get(name, 0) >= 2:
                    return True
                if self.maker.get(name) in constant:
                    pending.append(self.maker[name])
        return False

    def _copied(self, nodes: Iterable[int]) -> set[int]:
        """Return the constant and shared nodes that some nodes need, directly or by each other."""
        found: set[int] = set()
        pending = list(nodes)
        while pending:
            index = pending.pop()
            if index not in self.place:
                found.add(index)
            makers = {self.maker[name] for name in self.reads[index] if name in self.maker}
            pending += [maker for maker in makers if maker not in self.place and maker not in found]
        return found

    def _cuts(self) -> list[int]:
        """Return the places of the cuts among the graph's own nodes."""
        attention = self._attention()
        bounds = [0, *(position for span in attention for position in span), len(self.own)]
        heavy = [position for position, index in enumerate(self.own) if self._reads_matrix(index, self.constant)]
        cuts = []
        for before, behind in zip(bounds[::2], bounds[1::2], strict=True):
            places = [position for position in heavy if before < position < behind]
            if not places:
                raise CompressError(
                    "the graph cannot be cut into pieces: nothing between two blocks reads a matrix",
                    where=f"behind {self._name(before)}",
                )
            cuts.append(min(reversed(places), key=lambda position: len(self._across(position))))
        return cuts

    def _attention(self) -> list[tuple[int, int]]:
        """Return the first and the last of the graph's own nodes that read each block's cache, in order."""
        spans: dict[str, list[int]] = {}
        for position, index in enumerate(self.own):
            for name in self.reads[index]:
                if name in self.inputs and (match := _PAST.fullmatch(name)):
                    spans.setdefault(match[1], []).append(position)
        found = sorted((min(positions), max(positions)) for positions in spans.values())
        if not found:
            raise CompressError("the graph cannot be cut into pieces: it reads no key/value cache")
        for (_, last), (first, _) in zip(found, found[1:], strict=False):
            if first <= last:
                raise CompressError(
                    "the graph cannot be cut into pieces: two blocks read their caches in turn",
                    where=f"{self._name(first)} and {self._name(last)}",
                )
        return found

    def _across(self, place: int) -> Sequence[str]:
        """Return the values that the graph's own nodes before a place make and those from it on read."""
        behind = self._read_from(place)
        return [name for index in self.own[:place] for name in self.graph.node[index].output if name and name in behind]

    def _read_from(self, place: int) -> set[str]:
        return {name for index in self.own[place:] for name in self.reads[index]}

    def _name(self, position: int) -> str:
        node = self.graph.node[self.own[position]]
        return f"{node.name or node.output[0]} ({node.op_type})"
