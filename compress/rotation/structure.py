"""What is rotated in a decoder, told from its structure alone.

1. The residual stream ``x``, by R: ``x R`` flows instead. What reads it (query, key, value; gate, up; head) is
   multiplied by R from the right, what adds to it (token table, attention output, down projection) from the left. An
   RMS norm does not see a rotation if its weight is 1 throughout, so the weights of norms move into what reads them.
2. Values, by V a head: rows of the value projection and columns of the attention output.
3. Inputs of the down projection: what makes them is not linear, so they are rotated when the model runs, in blocks of
   up to 128 channels (``Linear.hadamard``), and the weight's columns beforehand.

A tied table is stored once although the head reads another basis, with the last norm's weight in it: a linear of its
own (role ``rotation``, ``[hidden, hidden]``) turns the head's inputs instead, ``R^T diag(g) R``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from compress.contracts import Decoder, Linear, Slice, Structure, Vector
from compress.errors import UsageError
from compress.rotation.matrices import block_of

#: The linear that turns a tied head's inputs, and the checkpoint's view's tensor for it.
HEAD_ROTATION = "head_rotation"
HEAD_TENSOR = f"{HEAD_ROTATION}.weight"
#: What an RMS norm of weight 1 gives has unit size, and is normally distributed after a rotation. Eight bits round a
#: normal distribution best in a range of about four standard deviations: 3.7 to 4.3 measured the same.
INPUT_RANGE = 4.0


@dataclass(frozen=True)
class Reader:
    """A linear that reads the residual stream behind a norm."""

    linear: Linear
    norm: str


@dataclass(frozen=True)
class Values:
    """Rows of a linear that are value heads, from ``start`` on, and the linear that reads them."""

    producer: Linear
    start: int
    reader: Linear


@dataclass(frozen=True)
class Places:
    """Everything in a decoder that a rotation changes; ``norms`` are graph names of all norm weights."""

    readers: tuple[Reader, ...]
    writers: tuple[Linear, ...]
    values: tuple[Values, ...]
    head: Reader
    norms: tuple[Vector, ...]


def places(decoder: Decoder) -> Places:
    """Return what a rotation changes.

    Raises:
        UsageError: The model's norms are not RMS norms, or something of it is in a form that has no rotation.
    """
    linears = {linear.name: linear for linear in decoder.linears}
    readers = [Reader(linears[fold.reader], fold.vectors[0]) for fold in decoder.folds if len(fold.vectors) == 1]
    values = [
        Values(linears[fold.producer], fold.start, linears[fold.reader])
        for fold in decoder.folds
        if fold.producer and linears[fold.reader].role == "attention_output"
    ]
    writers = [linear for linear in decoder.linears if linear.role in ("attention_output", "down")]
    last = [vector for vector in decoder.vectors if vector.graph_name not in {reader.norm for reader in readers}]
    pieces = [piece for linear in decoder.linears for piece in linear.weight]
    complete = len(readers) == len(writers) == 2 * len(values) == 2 * decoder.layers and len(last) == 1
    if not complete or any(piece.transposed or piece.columns or piece.spare for piece in pieces):
        raise UsageError(
            f"a {decoder.model_type} model like this has no rotation of its residual stream: "
            "its norms must be RMS norms, its weights stored as [out, in] and no head removed",
            hint="--set quantize.rotation=none, or a profile without it (x86-int4)",
        )
    head = next(linear for linear in decoder.linears if linear.role == "head")
    return Places(tuple(readers), tuple(writers), tuple(values), Reader(head, last[0].graph_name), decoder.vectors)


def rotates(structure: Structure) -> bool:
    """Return whether a model has a rotation of its residual stream."""
    if not isinstance(structure, Decoder):
        return False
    try:
        places(structure)
    except UsageError:
        return False
    return True


def rotated(structure: Structure) -> Decoder:
    """Return the structure of a rotated model, whose tensors are a :class:`compress.rotation.view.RotatedCheckpoint`'s.

    Raises:
        UsageError: An encoder, or a decoder that has no rotation.
    """
    if not isinstance(structure, Decoder):
        raise UsageError(
            "rotations are for models that write text; this one reads",
            hint="x86-int8 and arm-int8 are the 8-bit profiles for it",
        )
    found = places(structure)
    writers = {linear.name for linear in found.writers}
    # A tied head's inputs are turned once more, by a matrix that is not orthogonal.
    readers = {reader.linear.name for reader in (*found.readers, *(() if structure.tied else (found.head,)))}
    linears = [
        _writer(linear)
        if linear.name in writers
        else replace(linear, input_range=INPUT_RANGE)
        if linear.name in readers
        else linear
        for linear in structure.linears
    ]
    if structure.tied:
        size = structure.hidden_size
        turn = Linear(
            HEAD_ROTATION, "rotation", None, size, size, (Slice(HEAD_TENSOR, mixed=True),), graph_weights=(HEAD_TENSOR,)
        )
        at = next(index for index, linear in enumerate(linears) if linear.role == "head")
        linears.insert(at, turn)
    return replace(structure, linears=tuple(linears))


def _writer(linear: Linear) -> Linear:
    """Return a linear that adds to the residual stream: every row is made of all the source's rows."""
    weight = tuple(replace(piece, mixed=True) for piece in linear.weight)
    return replace(linear, weight=weight, hadamard=block_of(linear.in_features) if linear.role == "down" else 0)
