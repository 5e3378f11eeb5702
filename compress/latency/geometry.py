"""From a structure and a profile to the parts that a run is made of, and how often each occurs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from compress.contracts import Decoder, Encoder, Linear, Role, Scheme, Structure
from compress.errors import UsageError
from compress.latency.parts import Attention, Ends, FeedForward, Part, Product, Stored, Style
from compress.planning import attention_way, cache_type
from compress.profile import Profile, Quantize
from compress.quantize.scheme import BLOCK_SIZES
from compress.rotation.structure import rotated

#: A head is measured in pieces of at most so many bytes: twice as many rows of what no cache holds take twice the time.
MAX_PIECE_BYTES = 192 << 20
_ENDS: tuple[Role, ...] = ("projection", "pooler", "classifier", "rotation")

_StoredOf = Callable[[Linear], Stored]


@dataclass(frozen=True)
class BlockStorage:
    """How the linears of a block are stored."""

    qkv: Stored
    output: Stored
    up: Stored
    down: Stored


@dataclass(frozen=True)
class Geometry:
    """All of a model that its time depends on.

    Attributes:
        style: How its blocks are built.
        hidden: Width of the residual stream.
        inner: FFN neurons of a block.
        kv_heads: Key/value heads of a block.
        group: Query heads that share one of them.
        head_dim: Channels of a head.
        storage: How blocks are stored, and how many of them so; their number is the model's depth.
        ends: What is around the blocks.
        head: The product over the vocabulary, in pieces, and how many pieces.
        footprint: Bytes of weights that a run reads, of the model that it is pruned from: how far caches reach.
    """

    style: Style
    hidden: int
    inner: int
    kv_heads: int
    group: int
    head_dim: int
    storage: tuple[tuple[BlockStorage, int], ...]
    ends: Ends
    head: Product | None
    pieces: int
    footprint: int

    @property
    def layers(self) -> int:
        """Blocks that are run."""
        return sum(count for _, count in self.storage)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.group

    def resized(
        self,
        *,
        inner: int | None = None,
        heads: int | None = None,
        kv_heads: int | None = None,
        layers: int | None = None,
        vocabulary: int | None = None,
    ) -> Geometry:
        """Return the geometry after pruning; an absent size stays.

        Raises:
            UsageError: Query heads that are not whole groups, or a size that leaves nothing.
        """
        kept_kv = kv_heads if kv_heads is not None else self.kv_heads if heads is None else heads // self.group
        kept_inner, kept_layers = (self.inner if inner is None else inner), (self.layers if layers is None else layers)
        if min(kept_kv, kept_inner, kept_layers) < 1:
            raise UsageError("pruning must leave a neuron, a head and a layer at least")
        wanted = kept_kv * self.group if heads is None else heads
        if wanted % kept_kv:
            raise UsageError(f"{wanted} query heads are not shared evenly by {kept_kv} key/value heads")
        head, pieces = self.head, self.pieces
        if vocabulary is not None and head is not None:
            head, pieces = _pieces(replace(head, outputs=vocabulary))
        return replace(
            self,
            inner=kept_inner,
            kv_heads=kept_kv,
            group=wanted // kept_kv,
            storage=_shares(self.storage, kept_layers),
            head=head,
            pieces=pieces,
        )

    def parts(self) -> Counter[Part]:
        """Return every part of a run with how often it occurs."""
        found: Counter[Part] = Counter({self.ends: 1})
        for kind, count in self.storage:
            found[FeedForward(self.style, self.hidden, self.inner, kind.up, kind.down)] += count
            sizes = (self.hidden, self.kv_heads, self.group, self.head_dim)
            found[Attention(self.style, *sizes, kind.qkv, kind.output)] += count
        if self.head is not None:
            found[self.head] += self.pieces
        return found


def geometry_of(
    structure: Structure,
    profile: Profile,
    *,
    schemes: Mapping[str, Scheme] | None = None,
    keep_float: Collection[str] = (),
) -> Geometry:
    """Return what the time of a model under a profile depends on.

    Args:
        structure: The model's.
        profile: How its linears are stored.
        schemes: Schemes of linears and tables, by name, that go before the profile's.
        keep_float: Linears, by name, that stay float32.

    Raises:
        UsageError: The profile is for another processor, or its graph is of fixed shapes or float16.
    """
    require_local(profile)
    quantize = profile.quantize.for_decoders() if isinstance(structure, Decoder) else profile.quantize
    given = schemes or {}
    if quantize.rotation != "none" and not any(linear.input_range for linear in structure.linears):
        structure = rotated(structure)

    def stored(linear: Linear) -> Stored:
        scheme = None if linear.name in keep_float else given.get(linear.name) or quantize.scheme(linear.role)
        way = Stored.of(scheme, quantize.accuracy_level)
        return replace(way, fixed=way.dynamic and bool(linear.input_range), hadamard=linear.hadamard)

    blocks = [(linear, stored(linear)) for linear in structure.linears if linear.layer is not None]
    storage = _storage(structure, blocks)
    kv_heads = structure.kv_heads if isinstance(structure, Decoder) else structure.heads
    head, pieces = _head(structure, quantize, stored, given)
    first = Geometry(
        style=_style(structure, profile, blocks),
        hidden=structure.hidden_size,
        inner=next(linear.in_features for linear, _ in blocks if linear.role == "down"),
        kv_heads=kv_heads,
        group=structure.heads // kv_heads,
        head_dim=structure.head_dim,
        storage=storage,
        ends=_ends(structure, quantize, stored, given, padding=any(kind.qkv.dynamic for kind, _ in storage)),
        head=head,
        pieces=pieces,
        footprint=0,
    )
    return replace(first, footprint=sum(part.nbytes * count for part, count in first.parts().items()))


def require_local(profile: Profile) -> None:
    """Refuse a profile of whose graphs this machine's processor has no parts to measure.

    Raises:
        UsageError: It is for another processor, or its graph is of fixed shapes or float16.
    """
    graph = profile.graph
    if profile.provider != "cpu" or graph.static_length is not None or graph.float_type != "float32":
        raise UsageError(
            f"profile {profile.name} is not for this machine's processor: its time cannot be predicted here",
            hint="choose a profile whose provider is cpu, of float32 between its products: compress profiles",
        )


def _style(structure: Structure, profile: Profile, blocks: list[tuple[Linear, Stored]]) -> Style:
    decoder = isinstance(structure, Decoder)
    gated = any(linear.role == "gate_up" for linear, _ in blocks)
    dynamic = any(way.dynamic for _, way in blocks)
    return Style(
        decoder=decoder,
        rms=_rms(structure),
        bias=any(linear.bias for linear, _ in blocks),
        gated=gated,
        tanh=not gated and (not isinstance(structure, Encoder) or structure.tanh or profile.graph.gelu == "tanh"),
        rotary=isinstance(structure, Decoder) and structure.rope_shape is not None,
        smoothed=not decoder and dynamic and profile.quantize.smoothing == "calibrated",
        packed=not decoder and "packed_attention" in profile.graph.fusions,
        shared=not decoder and len({linear.layer for linear, _ in blocks}) < structure.layers,
        materialized=attention_way(structure, profile) == "materialized",
        int8_cache=cache_type(structure, profile) == "int8",
    )


def _rms(structure: Structure) -> bool:
    return not any(vector.graph_name.endswith(".bias") for vector in structure.vectors)


def _storage(structure: Structure, blocks: list[tuple[Linear, Stored]]) -> tuple[tuple[BlockStorage, int], ...]:
    """Return how blocks are stored with how often each is run, commonest first."""
    names = {"attention_output": "output", "gate_up": "up"}
    by_layer: dict[int | None, dict[str, Stored]] = {}
    for linear, way in blocks:
        by_layer.setdefault(linear.layer, {})[names.get(linear.role, linear.role)] = way
    counts = Counter(BlockStorage(**ways) for ways in by_layer.values())
    # A model of fewer blocks than layers runs each of them as often.
    return tuple((kind, count * structure.layers // len(by_layer)) for kind, count in counts.most_common())


def _shares(storage: tuple[tuple[BlockStorage, int], ...], layers: int) -> tuple[tuple[BlockStorage, int], ...]:
    """Return the ways of storage with their shares of other layers: the largest remainders are rounded up."""
    total = sum(count for _, count in storage)
    exact = [count * layers / total for _, count in storage]
    kept = [int(share) for share in exact]
    for index in sorted(range(len(exact)), key=lambda i: (kept[i] - exact[i], i))[: layers - sum(kept)]:
        kept[index] += 1
    return tuple((kind, count) for (kind, _), count in zip(storage, kept, strict=True) if count)


def _head(
    structure: Structure, quantize: Quantize, stored: _StoredOf, given: Mapping[str, Scheme]
) -> tuple[Product | None, int]:
    linear = next((linear for linear in structure.linears if linear.role == "head"), None)
    if linear is None:
        return None, 0
    way = stored(linear)
    if structure.tied and not way.dynamic:  # it multiplies by the table's own bytes, in whole blocks
        table = next(table for table in structure.tables if table.role == "token")
        scheme = given.get(table.name) or quantize.scheme("embedding")
        if scheme is not None and scheme.block_size == 0:
            whole = [size for size in BLOCK_SIZES if linear.in_features % size == 0]
            scheme = replace(scheme, block_size=whole[-1]) if whole else quantize.scheme("head")
        way = Stored.of(scheme, quantize.accuracy_level)
    return _pieces(
        Product(
            linear.out_features,
            linear.in_features,
            way,
            bias=bool(linear.bias),
            every=not isinstance(structure, Decoder),
            transposed=structure.tied and way.bits == 32,
        )
    )


def _head_of(structure: Structure, stored: _StoredOf) -> Stored:
    return next(stored(linear) for linear in structure.linears if linear.role == "head")


def _pieces(head: Product) -> tuple[Product, int]:
    count = max(1, -(-head.nbytes // MAX_PIECE_BYTES))
    return replace(head, outputs=-(-head.outputs // count)), count


def _ends(
    structure: Structure, quantize: Quantize, stored: _StoredOf, given: Mapping[str, Scheme], *, padding: bool
) -> Ends:
    roles: Mapping[str, Role] = {"token": "embedding", "position": "position"}
    schemes = [
        given.get(table.name) or (quantize.scheme(roles[table.role]) if table.role in roles else None)
        for table in structure.tables
    ]
    task = structure.task if isinstance(structure, Encoder) else ""
    products = tuple(
        Product(
            linear.out_features,
            linear.in_features,
            stored(linear),
            bias=bool(linear.bias),
            every=linear.role == "projection" or (linear.role != "rotation" and task != "text-classification"),
        )
        for linear in structure.linears
        if linear.role in _ENDS
    )
    return Ends(
        decoder=isinstance(structure, Decoder),
        rms=_rms(structure),
        hidden=structure.hidden_size,
        tables=tuple(
            (table.columns, 32 if scheme is None else scheme.bits)
            for table, scheme in zip(structure.tables, schemes, strict=True)
        ),
        products=products,
        pooled=task == "embedding",
        padding=padding,
        by_columns=structure.tied and isinstance(structure, Decoder) and _head_of(structure, stored).dynamic,
    )
