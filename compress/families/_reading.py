"""Reading a config and checking it against tensor headers: what every family needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from compress.contracts import KEPT_HEADS, Linear, Slice, Structure, Table, TensorInfo, Vector
from compress.errors import SourceError, UnsupportedModelError

_MAX_DIMENSION = 1 << 24
_MAX_LAYERS = 1024
_MAX_NUMBER = 1e12
#: Four million positions of a head of 128: 1 GiB in float32.
_MAX_POSITION_VALUES = 1 << 28
_Structure = TypeVar("_Structure", bound=Structure)


def dimension(config: Mapping[str, Any], key: str, default: int | None = None, *, most: int = _MAX_DIMENSION) -> int:
    """Return a positive integer of the config, ``most`` at the most.

    Raises:
        SourceError: It is missing, not an integer, or out of any plausible range.
    """
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise SourceError(
            f"config.json: {key} is {value!r:.80}, a positive integer up to {most} was expected",
            hint="restore the model's config.json",
        )
    return value


def number(config: Mapping[str, Any], key: str, default: float, *, most: float = _MAX_NUMBER) -> float:
    """Return a positive number of the config, ``most`` at the most.

    Raises:
        SourceError: It is not a number, or out of any plausible range.
    """
    value = config.get(key)
    value = default if value is None else value
    # Written so that NaN is refused too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        raise SourceError(
            f"config.json: {key} is {value!r:.80}, a positive number up to {most:g} was expected",
            hint="restore the model's config.json",
        )
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """Return a truth value of the config; ``"false"``, a text, is none.

    Raises:
        SourceError: It is something else.
    """
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise SourceError(
            f"config.json: {key} is {value!r:.80}, true or false was expected", hint="restore the model's config.json"
        )
    return value


def position_count(config: Mapping[str, Any], key: str, width: int, default: int | None = None) -> int:
    """Return how many positions the model has, each a row of ``width`` values in a table that the graph holds."""
    positions = dimension(config, key, default)
    if positions * width > _MAX_POSITION_VALUES:
        raise SourceError(
            f"config.json: {key} is {positions}: a table of as many positions would have {positions * width:,} values",
            hint="restore the model's config.json",
        )
    return positions


def layer_count(config: Mapping[str, Any], key: str) -> int:
    """Return the number of blocks; a damaged config must not make a plan of millions of them."""
    return dimension(config, key, most=_MAX_LAYERS)


def kept_heads(config: Mapping[str, Any], heads: int) -> int:
    """Return how many of ``heads`` a pruned checkpoint has left in a block, all of them in an ordinary one."""
    return dimension(config, KEPT_HEADS, heads, most=heads)


def expect(config: Mapping[str, Any], key: str, allowed: Iterable[Any], default: Any) -> None:
    """Refuse a config whose ``key`` asks for something without an implementation."""
    value = config.get(key, default)
    options = tuple(allowed)
    if value not in options:
        raise UnsupportedModelError(
            f"config.json: {key} = {value!r:.80} is not supported",
            hint=f"supported: {', '.join(map(repr, options))}",
        )


def rope_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the rotary embedding's settings; transformers 4 says ``rope_scaling``, 5 ``rope_parameters``.

    Raises:
        SourceError: They are not an object.
    """
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, Mapping):
        raise SourceError("config.json: rope_scaling is not an object", hint="restore the model's config.json")
    return settings


def check_rope(config: Mapping[str, Any], head: int) -> None:
    """Check every number of the rotary embedding's settings; ``head`` is a head's width.

    Raises:
        SourceError: One is none, or lists of factors are not one for every rotated pair.
    """
    number(config, "rope_theta", 1.0)
    settings = rope_settings(config)
    for key, value in settings.items():
        if isinstance(value, list):
            if len(value) != head // 2:
                raise SourceError(
                    f"config.json: {key} has {len(value)} factors, {head // 2} were expected",
                    hint="restore the model's config.json",
                )
            for factor in value:
                number({key: factor}, key, 0.0)
        elif value is not None and not isinstance(value, str | bool):
            number(settings, key, 0.0)


def rope_kind(config: Mapping[str, Any]) -> str:
    """Return the rotary embedding's scaling type."""
    scaling = rope_settings(config)
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (query heads, key-value heads, head dimension) and check that they divide.

    Raises:
        SourceError: They contradict each other.
    """
    hidden, query = dimension(config, "hidden_size"), dimension(config, "num_attention_heads")
    key_value = dimension(config, "num_key_value_heads", query)
    if query % key_value:
        raise SourceError(f"config.json: {query} attention heads are not a multiple of {key_value} key-value heads")
    if config.get("head_dim") is None and hidden % query:
        raise SourceError(f"config.json: hidden_size {hidden} is not a multiple of {query} attention heads")
    return query, key_value, dimension(config, "head_dim", hidden // query)


def check_shapes(structure: _Structure, tensors: Mapping[str, TensorInfo]) -> _Structure:
    """Check every source slice against the checkpoint's headers; with no headers (config only) nothing is checked.

    Raises:
        SourceError: A tensor is missing or has another shape than the config says.
    """
    if not tensors:
        return structure
    for linear in structure.linears:
        _check_stack(linear, linear.weight, tensors, columns=linear.in_features)
        if linear.bias:
            _check_stack(linear, linear.bias, tensors, columns=None)
    for table in structure.tables:
        _check_one(table.source, (table.rows, table.columns), tensors, table)
    for vector in structure.vectors:
        _check_one(vector.source, (vector.size,), tensors, vector)
    return structure


def _lookup(piece: Slice, tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    info = tensors.get(piece.tensor)
    if info is None:
        raise SourceError(
            "the checkpoint lacks a tensor that its config promises",
            where=piece.tensor,
            hint="check that all shards are there and that config.json belongs to these weights",
        )
    return info


def _check_stack(
    linear: Linear, pieces: tuple[Slice, ...], tensors: Mapping[str, TensorInfo], columns: int | None
) -> None:
    rows = 0
    for piece in pieces:
        info = _lookup(piece, tensors)
        shape = tuple(reversed(info.shape)) if piece.transposed else info.shape
        stop = shape[0] if piece.stop is None else piece.stop
        expected_rank = 1 if columns is None else 2
        wide = (
            columns is not None and len(shape) == 2 and (shape[1] < columns if piece.columns else shape[1] != columns)
        )
        if len(shape) != expected_rank or stop > shape[0] or wide:
            wanted = f"[{stop}+, {columns}]" if columns is not None else f"[{stop}+]"
            raise _disagree(piece.tensor, info.shape, f"{wanted}{' transposed' if piece.transposed else ''}")
        # A tensor that is longer than its last slice would be cut off without a word.
        last = max((other.stop or shape[0]) + other.spare for other in pieces if other.tensor == piece.tensor)
        if last != shape[0]:
            raise _disagree(piece.tensor, info.shape, f"{last} rows")
        rows += stop - piece.start
    if rows != linear.out_features:
        where = pieces[0].tensor if len(pieces) == 1 else linear.name
        raise _disagree(where, (rows,), f"{linear.out_features} rows")


def _check_one(piece: Slice, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo], item: Table | Vector) -> None:
    info = _lookup(piece, tensors)
    if info.shape != shape:
        raise _disagree(piece.tensor, info.shape, str(list(shape)))


def _disagree(name: str, got: tuple[int, ...], wanted: str) -> SourceError:
    return SourceError(
        f"config and weights disagree: shape {list(got)}, expected {wanted}",
        where=name,
        hint="restore the config.json that belongs to these weights",
    )
