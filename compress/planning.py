"""The plan: every tensor's fate, where its bytes will lie, and what that costs, from config and headers alone.

Requires a :class:`~compress.contracts.Structure` and a :class:`~compress.profile.Profile`; ensures that every byte of
``model.onnx.data`` has an owner before work starts, so that the writer needs no order and the predicted size is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast

from compress.contracts import (
    AttentionWay,
    CacheType,
    Checkpoint,
    Decoder,
    Encoder,
    FloatType,
    Linear,
    Role,
    ScaleFormat,
    Scheme,
    Slice,
    Structure,
    Table,
    TensorInfo,
)
from compress.errors import UsageError
from compress.profile import Profile
from compress.providers import load as load_provider
from compress.quantize.packing import table_bytes, weight_bytes, zero_point_bytes
from compress.quantize.scheme import BLOCK_SIZES, validate_scheme

#: Smaller tensors stay inside the graph file: shapes and axes in external data make sessions fail to load.
INLINE_LIMIT = 1024
#: Large tensors start on a page so that a runtime can map them; the others on a cache line.
_PAGE, _LINE, _PAGE_FROM = 4096, 64, 1 << 20
#: Where all tensors between nodes are integers, float ones up to here stay in the graph: they become integers too, and
#: of a table of positions a part is read.
_FLOATS_LIMIT = 8 << 20

#: Endings of the constants that a fixed input range is stored as.
INPUT_RANGE = ("input_range_scale", "input_range_zero_point")

#: Names of the constants that keys and values of a layer are rounded by, float32 ``[kv_heads, 1, head_dim]``.
CACHE_SCALES = ("cache.{}.key_scale", "cache.{}.value_scale")

DType = Literal["float32", "float16", "int8", "uint8"]
_ITEM_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the artifact; ``offset`` is its place in ``model.onnx.data``, ``None`` when it stays in the graph."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes without padding."""
        count = 1
        for size in self.shape:
            count *= size
        return count * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Fate:
    """What becomes of one weight.

    Attributes:
        name: The weight's name in the artifact.
        kind: ``matmul`` (weight of a linear), ``table`` (embedding) or ``vector`` (norm weight, bias).
        role: Its role, ``None`` for vectors.
        rows: Rows of the stacked weight; elements for a vector.
        columns: Columns; 1 for a vector.
        scheme: How it is quantized, ``None`` for the plan's ``float_type``.
        reads: Where the rows come from.
        stored: Codes, scales and zero points, or the float tensor.
        tied: The same bytes serve the embedding and the head.
    """

    name: str
    kind: Literal["matmul", "table", "vector"]
    role: Role | None
    rows: int
    columns: int
    scheme: Scheme | None
    reads: tuple[Slice, ...]
    stored: tuple[StoredTensor, ...]
    tied: bool = False

    def part(self, kind: str) -> StoredTensor | None:
        """Return ``codes``, ``scales``, ``row_scales`` or ``zero_points`` of a quantized weight, if it has them."""
        return next((tensor for tensor in self.stored if tensor.name == f"{self.name}.{kind}"), None)

    @property
    def nbytes(self) -> int:
        """Bytes stored, without padding."""
        return sum(tensor.nbytes for tensor in self.stored)


@dataclass(frozen=True)
class Plan:
    """Fates in file order and the predictions that follow from them; sizes in bytes.

    ``static_length``, ``cache_length`` and ``activation_bits`` are the profile's: they decide how large the graph file
    is. ``float_type`` is that of every float tensor. ``attention`` and ``cache_type`` are what a decoder's graph has.
    """

    model_type: str
    profile: str
    structure: Structure
    scale_format: ScaleFormat
    fates: tuple[Fate, ...]
    data_bytes: int
    source_bytes: int
    static_length: int | None = None
    cache_length: int | None = None
    activation_bits: int | None = None
    float_type: FloatType = "float32"
    attention: AttentionWay = "runtime"
    cache_type: CacheType = "float"

    @property
    def decoder(self) -> Decoder:
        """Return the structure of a model that writes text."""
        assert isinstance(self.structure, Decoder), f"{self.model_type} is not a decoder"
        return self.structure

    @cached_property
    def by_name(self) -> Mapping[str, Fate]:
        """Return the fates by name."""
        return {fate.name: fate for fate in self.fates}

    @cached_property
    def graph_bytes(self) -> int:
        """Predicted bytes of ``model.onnx``."""
        from compress.graph.size import predict_graph_bytes

        return predict_graph_bytes(self)

    @property
    def predicted_bytes(self) -> int:
        """Predicted bytes of ``model.onnx`` and ``model.onnx.data`` together."""
        return self.data_bytes + self.graph_bytes

    @property
    def cache_bytes(self) -> int | None:
        """Bytes that keys and values of a token take, ``None`` without a cache, or with one of a fixed size."""
        if not isinstance(self.structure, Decoder) or self.static_length is not None:
            return None
        numbers = 2 * self.structure.layers * self.structure.kv_heads * self.structure.head_dim
        return numbers * _ITEM_BYTES[self.float_type if self.cache_type == "float" else self.cache_type]

    @property
    def weight_count(self) -> int:
        """Parameters, each counted once; tables that the graph computes itself (rotary) are none."""
        return sum(fate.rows * fate.columns for fate in self.fates if fate.reads)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits a parameter takes in ``model.onnx.data``, scales included."""
        return 8 * sum(fate.nbytes for fate in self.fates if fate.reads) / self.weight_count


def make_plan(
    structure: Structure,
    profile: Profile,
    checkpoint: Checkpoint,
    *,
    constants: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    keep_float: Collection[str] = (),
    schemes: Mapping[str, Scheme] | None = None,
) -> Plan:
    """Assign a scheme and a place in the file to every tensor.

    Args:
        structure: What there is.
        profile: What is asked for.
        checkpoint: Its headers say how large the source is.
        constants: Types and shapes of arrays that are no parameter of the model: calibration finds them. Default: those
            that it will find, where the profile asks for it.
        keep_float: Linears, by name, that stay floats whatever the profile says.
        schemes: Schemes of weights, by name, that go before the profile's (a tied table counts as the embedding).

    Raises:
        UsageError: A scheme that cannot be, or that the profile's provider cannot run.
    """
    floats = profile.graph.float_type
    if isinstance(structure, Decoder):
        profile = profile.model_copy(update={"quantize": profile.quantize.for_decoders()})
    _check_half(structure, profile)
    _check_cache(structure, profile)
    layout = _Layout(_FLOATS_LIMIT if profile.quantize.activation_bits is not None else INLINE_LIMIT)
    given = schemes or {}
    fates = [_plan_table(table, structure, profile, layout, given) for table in structure.tables]
    tied = any(fate.tied for fate in fates)
    for linear in structure.linears:
        if not (linear.role == "head" and tied):
            scheme = None if linear.name in keep_float else _checked(profile, linear.role, given.get(linear.name))
            fates.append(_plan_linear(linear, scheme, profile, layout))
        if linear.bias:
            fates.append(_plan_vector(f"{linear.name}.bias", linear.out_features, linear.bias, layout, floats))
    for vector in structure.vectors:
        fates.append(_plan_vector(vector.graph_name, vector.size, (vector.source,), layout, floats))
    if constants is None:
        constants = _expected_constants(structure, profile, fates)
    for name, (dtype, shape) in constants.items():
        stored = layout.place((name, cast(DType, dtype), shape))
        fates.append(Fate(name, "vector", None, math.prod(shape), 1, None, (), stored))
    if isinstance(structure, Decoder) and structure.rope_shape is not None and profile.graph.static_length is None:
        # The skeleton computes the rotary tables; here they only need a place. Static graphs keep a few rows inline.
        for name in ("cos_cache", "sin_cache"):
            fates.append(
                Fate(
                    name,
                    "vector",
                    None,
                    *structure.rope_shape,
                    None,
                    (),
                    layout.place((name, floats, structure.rope_shape)),
                )
            )
    return Plan(
        model_type=structure.model_type,
        profile=profile.name,
        structure=structure,
        scale_format=profile.quantize.scale_format,
        fates=tuple(fates),
        data_bytes=layout.end,
        source_bytes=_source_bytes(structure, checkpoint.tensors()),
        static_length=profile.graph.static_length,
        cache_length=min(profile.graph.cache_length, structure.context_length),
        activation_bits=profile.quantize.activation_bits,
        float_type=floats,
        attention=attention_way(structure, profile),
        cache_type=cache_type(structure, profile),
    )


def attention_way(structure: Structure, profile: Profile) -> AttentionWay:
    """Return how the graph has attention computed.

    Scores that are held whole are affordable where a long prompt is fed in pieces. Under LongRoPE that would change the
    model: early pieces would be turned by the short factors, which a prompt read at once does not use.
    """
    plain = isinstance(structure, Decoder) and structure.rope_switch is None
    return profile.graph.attention if plain else "runtime"


def cache_type(structure: Structure, profile: Profile) -> CacheType:
    """Return how the graph keeps keys and values."""
    return profile.graph.cache_type if isinstance(structure, Decoder) else "float"


def _check_cache(structure: Structure, profile: Profile) -> None:
    """Refuse a cache that the provider cannot keep.

    Raises:
        UsageError: Why.
    """
    reason = load_provider(profile.provider).supports_cache(cache_type(structure, profile))
    if reason is not None:
        where = f"profile {profile.name}, graph.cache_type"
        raise UsageError(reason, where=where, hint="--set graph.cache_type=float")


def _check_half(structure: Structure, profile: Profile) -> None:
    """Refuse float16 where there is no such graph.

    Raises:
        UsageError: The model is an encoder, or scales of another format would stand beside float16 activations.
    """
    if profile.graph.float_type != "float16":
        return
    where = f"profile {profile.name}"
    if not isinstance(structure, Decoder):
        raise UsageError(
            "float16 graphs are made of models that write text; this one is an encoder",
            where=where,
            hint="--set graph.float_type=float32",
        )
    weights = [*structure.linears, *(table for table in structure.tables if table.role == "token")]
    roles: set[Role] = {item.role if isinstance(item, Linear) else "embedding" for item in weights}
    if profile.quantize.scale_format != "float16" and any(profile.quantize.scheme(role) for role in roles):
        raise UsageError(
            f"kernels that multiply float16 read float16 scales, not {profile.quantize.scale_format}",
            where=where,
            hint="--set quantize.scale_format=float16",
        )


def _expected_constants(
    structure: Structure, profile: Profile, fates: Sequence[Fate]
) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Return what calibration will add, as far as it is known before: not how many neurons it repeats."""
    if isinstance(structure, Decoder):
        shape = (structure.kv_heads, 1, structure.head_dim)
        layers = range(structure.layers) if cache_type(structure, profile) == "int8" else ()
        return {name.format(layer): ("float32", shape) for layer in layers for name in CACHE_SCALES}
    integers = any(fate.scheme is not None and fate.scheme.activations != "none" for fate in fates)
    if not isinstance(structure, Encoder) or profile.quantize.smoothing != "calibrated" or not integers:
        return {}
    from compress.calibrate.smoothing import constant_shapes  # it needs plans itself

    return constant_shapes(structure)


class _Layout:
    """Hands out aligned places in the data file, in the order they are asked for.

    ``floats_from``: the bytes from which on a float tensor has its place there.
    """

    def __init__(self, floats_from: int = INLINE_LIMIT) -> None:
        self.end = 0
        self._floats_from = floats_from

    def place(
        self, *tensors: tuple[str, DType, tuple[int, ...]], stay_floats: bool = False
    ) -> tuple[StoredTensor, ...]:
        placed = []
        for name, dtype, shape in tensors:
            tensor = StoredTensor(name, dtype, shape)
            if tensor.nbytes >= (self._floats_from if dtype == "float32" and not stay_floats else INLINE_LIMIT):
                align = _PAGE if tensor.nbytes >= _PAGE_FROM else _LINE
                offset = -(-self.end // align) * align
                self.end = offset + tensor.nbytes
                tensor = StoredTensor(name, dtype, shape, offset)
            placed.append(tensor)
        return tuple(placed)


def _checked(profile: Profile, role: Role, given: Scheme | None = None) -> Scheme | None:
    scheme = given or profile.quantize.scheme(role)
    if scheme is not None:
        where = f"profile {profile.name}, role {role}"
        if scheme.block_size == 0 and role in ("embedding", "position"):
            # A row is looked up with its one scale: any width will do.
            validate_scheme(scheme, where=where, whole_rows=True)
            return scheme
        validate_scheme(scheme, where=where)
        reason = load_provider(profile.provider).supports(scheme)
        if reason is not None:
            raise UsageError(reason, where=f"profile {profile.name}, role {role}", hint="change quantize.* with --set")
    return scheme


def _plan_table(
    table: Table, structure: Structure, profile: Profile, layout: _Layout, given: Mapping[str, Scheme]
) -> Fate:
    role: Role = "embedding" if table.role == "token" else "position"
    # Two rows of segments cost nothing.
    scheme = _checked(profile, role, given.get(table.name)) if table.role != "type" else None
    # A table of standard operators has a scale a row; a head there has the bytes of a linear.
    tied = structure.tied and table.role == "token" and profile.quantize.activation_bits is None
    if tied and scheme is not None and scheme.block_size == 0:
        # The head multiplies by the same bytes, in whole blocks; a width that no block divides is stored twice.
        whole = [size for size in BLOCK_SIZES if table.columns % size == 0]
        tied = bool(whole)
        scheme = replace(scheme, block_size=whole[-1]) if whole else scheme
    head = profile.quantize.scheme("head") if tied else None
    if head is not None and head.activations != "none" and table.name not in given:
        # Stored as the head multiplies by it, [columns, rows]; a lookup gathers columns.
        scheme = _checked(profile, "head")
        stored = layout.place(
            (f"{table.name}.codes", "int8", (table.columns, table.rows)),
            (f"{table.name}.scales", "float32", (table.rows,)),
        )
    elif scheme is None:
        stored = layout.place((f"{table.name}.weight", profile.graph.float_type, (table.rows, table.columns)))
    else:
        if tied and table.columns % scheme.block_size:
            # A head pads its rows to whole blocks, an embedding does not: only then are they the same bytes.
            fitting = [str(size) for size in BLOCK_SIZES if table.columns % size == 0]
            raise UsageError(
                f"a tied table of {table.columns} columns cannot be stored once in blocks of {scheme.block_size}",
                where=f"profile {profile.name}, role {role}",
                hint=f"--set quantize.roles.embedding.block_size={fitting[-1]}"
                if fitting
                else "--set quantize.roles.embedding.bits=32",
            )
        stored = layout.place(*_quantized(table.name, table.rows, table.columns, scheme, profile, table_bytes))
    return Fate(
        table.name,
        "table",
        role,
        table.rows,
        table.columns,
        scheme,
        (table.source,),
        stored,
        tied=tied,
    )


def _plan_linear(linear: Linear, scheme: Scheme | None, profile: Profile, layout: _Layout) -> Fate:
    if scheme is None:
        # [K, N]: what MatMul reads without a transposed copy at load time.
        shape = (linear.in_features, linear.out_features)
        stored = layout.place((f"{linear.name}.weight", profile.graph.float_type, shape))
    elif scheme.activations != "none":
        # [K, N]: what the integer products read.
        stored = layout.place(
            (f"{linear.name}.codes", "int8", (linear.in_features, linear.out_features)),
            (f"{linear.name}.scales", "float32", (linear.out_features,)),
        )
    else:
        parts = _quantized(linear.name, linear.out_features, linear.in_features, scheme, profile, weight_bytes)
        stored = layout.place(*parts, stay_floats=True)
    return Fate(
        linear.name,
        "matmul",
        linear.role,
        linear.out_features,
        linear.in_features,
        scheme,
        linear.weight,
        stored,
    )


def _plan_vector(name: str, size: int, reads: tuple[Slice, ...], layout: _Layout, floats: FloatType) -> Fate:
    return Fate(name, "vector", None, size, 1, None, reads, layout.place((name, floats, (size,))))


def _quantized(
    name: str,
    rows: int,
    columns: int,
    scheme: Scheme,
    profile: Profile,
    code_bytes: Callable[[int, int, Scheme], int],
) -> list[tuple[str, DType, tuple[int, ...]]]:
    tensors: list[tuple[str, DType, tuple[int, ...]]] = [
        (f"{name}.codes", "uint8", (rows, code_bytes(1, columns, scheme))),
        (f"{name}.scales", profile.quantize.scale_format, (rows, scheme.blocks(columns))),
    ]
    if profile.quantize.scale_format == "int8":
        tensors.append((f"{name}.row_scales", "float32", (rows, 1)))
    if not scheme.symmetric:
        tensors.append((f"{name}.zero_points", "uint8", (rows, zero_point_bytes(1, columns, scheme))))
    return tensors


def _source_bytes(structure: Structure, tensors: Mapping[str, TensorInfo]) -> int:
    """Return what the tensors take in the source; without headers, at the two bytes of a published checkpoint."""
    names = {piece.tensor for linear in structure.linears for piece in (*linear.weight, *linear.bias)}
    names |= {table.source.tensor for table in structure.tables}
    names |= {vector.source.tensor for vector in structure.vectors}
    if tensors:
        return sum(tensors[name].nbytes for name in names)
    count = sum(table.rows * table.columns for table in structure.tables)
    count += sum(vector.size for vector in structure.vectors)
    for linear in structure.linears:
        own = 0 if linear.role == "head" and structure.tied else linear.in_features
        count += linear.out_features * (own + bool(linear.bias))
    return 2 * count
