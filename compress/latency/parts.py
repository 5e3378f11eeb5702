"""The parts that a model's time is made of: what is measured, and how often a run of the model contains it.

A block is two halves, attention and feed-forward, each with its norm and residual sum: small enough to be measured in
milliseconds, large enough to contain what the operators cost together (fused activations, buffers that stay in a cache,
an operator's start). What stands before and after the blocks is a third part; the head's product is a fourth, since it
alone may take a fifth of a small model's time. A model's time is the sum, and the time of a run that does nothing.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from compress.contracts import Scheme
from compress.errors import UsageError


@dataclass(frozen=True)
class Workload:
    """One run of the graph: ``batch`` sequences of ``tokens`` new tokens, after ``past`` tokens in the cache."""

    batch: int = 1
    tokens: int = 128
    past: int = 0


@dataclass(frozen=True)
class Stored:
    """How a linear multiplies, as far as its time goes: 32 bits are float32; how scales are stored makes no difference.

    ``dynamic``: integers times integers, with a range of the inputs found at run time; ``fixed``: with one that is
    known. ``hadamard``: inputs are rotated first, in blocks of so many channels, and every token has its own size.
    """

    bits: int = 32
    block_size: int = 0
    symmetric: bool = True
    dynamic: bool = False
    accuracy_level: int = 0
    fixed: bool = False
    hadamard: int = 0

    @classmethod
    def of(cls, scheme: Scheme | None, accuracy_level: int) -> Stored:
        """Return it for a scheme; ``None`` is float32.

        Raises:
            UsageError: Fixed input ranges, which are for other processors than this one.
        """
        if scheme is None:
            return cls()
        if scheme.activations == "static":
            raise UsageError(
                "the latency model measures this machine's processor, which runs no fixed input ranges fast",
                hint='--set quantize.activations="dynamic"',
            )
        if scheme.activations == "dynamic":
            return cls(bits=scheme.bits, dynamic=True)
        return cls(scheme.bits, scheme.block_size, scheme.symmetric, accuracy_level=accuracy_level)

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Return the bytes of weights ``[outputs, inputs]`` that a product reads, scales included."""
        if self.bits == 32:
            return 4 * outputs * inputs
        if self.dynamic:
            return outputs * (inputs + 4)
        return outputs * (inputs * self.bits // 8 + 4 * -(-inputs // (self.block_size or inputs)))


@dataclass(frozen=True)
class Style:
    """How blocks are built: a decoder's (norm first, key/value cache) or an encoder's (norm last, padding mask).

    ``rms``: norms without mean and bias. ``bias``: linears have one. ``gated``: two products before the activation,
    SiLU and a multiplication; else GELU, exact or by its ``tanh`` form. ``rotary``: positions are rotated in the
    attention. ``smoothed``: channels are rescaled around integer products. ``packed``: query, key and value are the
    attention's own product. ``shared``: all blocks have the same weights. ``materialized``: the attention holds its
    scores whole. ``int8_cache``: keys and values are kept as bytes.
    """

    decoder: bool
    rms: bool
    bias: bool
    gated: bool
    tanh: bool
    rotary: bool
    smoothed: bool = False
    packed: bool = True
    shared: bool = False
    materialized: bool = False
    int8_cache: bool = False


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward half of a block: ``hidden`` to ``inner`` neurons and back."""

    style: Style
    hidden: int
    inner: int
    up: Stored
    down: Stored

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        first = self.up.nbytes(self.inner * (2 if self.style.gated else 1), self.hidden)
        return first + self.down.nbytes(self.hidden, self.inner)


@dataclass(frozen=True)
class Attention:
    """The attention half of a block: ``kv_heads`` groups of ``group`` query heads of ``head_dim`` channels."""

    style: Style
    hidden: int
    kv_heads: int
    group: int
    head_dim: int
    qkv: Stored
    output: Stored

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    @property
    def packed_size(self) -> int:
        """Channels of queries, keys and values together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        first = self.qkv.nbytes(self.packed_size, self.hidden)
        return first + self.output.nbytes(self.hidden, self.heads * self.head_dim)


@dataclass(frozen=True)
class Product:
    """One linear alone, ``inputs`` to ``outputs``; of the last token only, or of ``every`` one.

    ``transposed``: it is stored as an embedding table has it.
    """

    outputs: int
    inputs: int
    stored: Stored
    bias: bool = False
    every: bool = True
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its weight."""
        return self.stored.nbytes(self.outputs, self.inputs)


@dataclass(frozen=True)
class Ends:
    """What stands before and after the blocks, but for a head over the vocabulary.

    Attributes:
        decoder: Whose ends.
        rms: The kind of norms.
        hidden: Width of the blocks.
        tables: Each embedding table's columns and bits.
        products: Small linears, each reading the one before it.
        pooled: Whether an embedding is made of the tokens' states.
        padding: Whether padded tokens are kept out of the ranges of integer products.
        by_columns: Whether the tables are stored as a head of integer products multiplies by them.
    """

    decoder: bool
    rms: bool
    hidden: int
    tables: tuple[tuple[int, int], ...]
    products: tuple[Product, ...] = ()
    pooled: bool = False
    padding: bool = False
    by_columns: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its weights, tables left out: few of their rows are read."""
        return sum(product.nbytes for product in self.products)


@dataclass(frozen=True)
class Empty:
    """A graph that does nothing: what it costs to start any."""

    @property
    def nbytes(self) -> int:
        """Return 0."""
        return 0


Part = FeedForward | Attention | Product | Ends | Empty
_KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in (FeedForward, Attention, Product, Ends, Empty)}


@dataclass(frozen=True)
class Point:
    """A part under a workload, ``copies`` of it in a row.

    ``others``: bytes that are read between two runs, as the rest of a model's weights would be. What the caches still
    hold of a part when its turn comes again is what they hold of it in the model.
    """

    part: Part
    workload: Workload
    copies: int
    others: int

    def as_request(self) -> dict[str, Any]:
        """Return it as the worker takes it."""
        return {
            "kind": type(self.part).__name__,
            "part": dataclasses.asdict(self.part),
            "workload": dataclasses.asdict(self.workload),
            "copies": self.copies,
            "others": self.others,
        }

    @property
    def key(self) -> str:
        """Return its name in the cache: the same for equal points, in every process."""
        return json.dumps(self.as_request(), sort_keys=True, separators=(",", ":"))


def point_from(request: dict[str, Any]) -> Point:
    """Undo :meth:`Point.as_request`."""
    part, workload = _part(request["kind"], request["part"]), Workload(**request["workload"])
    return Point(part, workload, int(request["copies"]), int(request["others"]))


def _part(kind: str, fields: dict[str, Any]) -> Part:
    given = dict(fields)
    for name, nested in (("style", Style), *((name, Stored) for name in ("up", "down", "qkv", "output", "stored"))):
        if name in given:
            given[name] = nested(**given[name])
    if kind == "Ends":
        given["tables"] = tuple((columns, bits) for columns, bits in given["tables"])
        given["products"] = tuple(_part("Product", product) for product in given["products"])
    part: Part = _KINDS[kind](**given)
    return part
