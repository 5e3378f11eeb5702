"""Quantized rows become stored bytes: packed as the plan says, written to their places, small tensors kept aside."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.contracts import FloatArray, QuantizedRows, Scheme
from compress.errors import SourceError
from compress.package.writer import DataFile
from compress.planning import Fate, Plan, StoredTensor
from compress.quantize.packing import (
    pack_matmul_weight,
    pack_table,
    pack_zero_points,
    unpack_matmul_weight,
    unpack_table,
    unpack_zero_points,
)
from compress.quantize.scales import pack_scales, unpack_scales
from compress.quantize.scheme import zero_code
from compress.stored_errors import StoredErrors, sampled

AnyArray = npt.NDArray[Any]


class Store:
    """Writes weights to where the plan puts them; safe from several threads.

    Attributes:
        inline: The tensors that are too small for the data file, by planned name.
        errors: How far what was stored is from what it was made of.
    """

    def __init__(self, plan: Plan, data: DataFile, errors: StoredErrors | None = None) -> None:
        self.plan, self.data = plan, data
        self.errors = errors or StoredErrors()
        self.inline: dict[str, AnyArray] = {}
        self._lock = threading.Lock()

    def quantized(self, fate: Fate, start: int, result: QuantizedRows, given: FloatArray) -> None:
        """Store rows of a quantized weight, from row ``start`` on.

        Args:
            fate: The weight's.
            start: The first row's place.
            result: The rows.
            given: What those among them were that are compared (:func:`compared`), before they were quantized.
        """
        scheme = fate.scheme
        assert scheme is not None
        some = sampled(fate.rows, start, start + len(result.scales))
        if scheme.activations != "none":
            self._integer(fate, start, result, given, some)
            return
        packed = (
            pack_table(result.codes, scheme, fate.columns)
            if fate.kind == "table"
            else pack_matmul_weight(result.codes, scheme)
        )
        scales, row_scales = pack_scales(result.scales, self.plan.scale_format)
        parts: dict[str, AnyArray] = {"codes": packed, "scales": scales}
        if row_scales is not None:
            parts["row_scales"] = row_scales[:, None]
        if result.zero_points is not None:
            parts["zero_points"] = pack_zero_points(result.zero_points, scheme)
        for kind, array in parts.items():
            stored = fate.part(kind)
            assert stored is not None, f"{fate.name}: the plan has no place for {kind}"
            self.rows(stored, start, array)
        if len(some):
            again = _unpacked({kind: array[some] for kind, array in parts.items()}, fate)
            self.errors.note(fate.name, start + some, given, again)

    def floats(self, fate: Fate, start: int, rows: FloatArray) -> None:
        """Note how far rows of a weight that is not quantized, from row ``start`` on, are from what is stored."""
        some = sampled(fate.rows, start, start + len(rows))
        if len(some):
            kept = _as_planned(fate.stored[0], rows[some]).astype(np.float32)
            self.errors.note(fate.name, start + some, rows[some], kept)

    def _integer(
        self, fate: Fate, start: int, result: QuantizedRows, given: FloatArray, some: npt.NDArray[np.int64]
    ) -> None:
        """Store signed codes as [K, N], a column for every row that is quantized here."""
        scheme = fate.scheme
        codes, scales = fate.part("codes"), fate.part("scales")
        assert scheme is not None and codes is not None and scales is not None
        signed = (result.codes.T.astype(np.int16) - zero_code(scheme.bits)).astype(np.int8)
        if codes.offset is None:
            with self._lock:
                whole = self.inline.setdefault(codes.name, np.zeros(codes.shape, codes.dtype))
                whole[:, start : start + signed.shape[1]] = signed
        else:
            for row, values in enumerate(signed):
                self.data.write(codes.offset + row * fate.rows + start, values)
        self.rows(scales, start, result.scales[:, 0])
        if len(some):
            again = signed[:, some].T.astype(np.float32) * result.scales[some]
            self.errors.note(fate.name, start + some, given, again[:, : fate.columns])

    def constant(self, stored: StoredTensor, array: AnyArray) -> None:
        """Write a whole array, of any shape, in the type that was planned."""
        array = _as_planned(stored, array)
        if stored.offset is None:
            with self._lock:
                self.inline[stored.name] = array
        else:
            self.data.write(stored.offset, array)

    def rows(self, stored: StoredTensor, row: int, array: AnyArray) -> None:
        """Write rows of a stored tensor, from row ``row`` on, in the type that was planned.

        Raises:
            SourceError: A value is beyond float16's range.
        """
        array = _as_planned(stored, array)
        if stored.offset is None:
            with self._lock:
                target = self.inline.setdefault(stored.name, np.zeros(stored.shape, stored.dtype))
                target[row : row + len(array)] = array.reshape(-1, *stored.shape[1:])
            return
        row_bytes = stored.nbytes // stored.shape[0]
        self.data.write(stored.offset + row * row_bytes, array)


def compared(fate: Fate, start: int, rows: FloatArray) -> FloatArray:
    """Return a copy of those rows, of ``rows`` from row ``start`` on, that stand for the weight when it is stored."""
    return rows[sampled(fate.rows, start, start + len(rows))]


def _unpacked(parts: dict[str, AnyArray], fate: Fate) -> FloatArray:
    """Return rows as a runtime reads them from what is stored, float32 ``[rows, columns]``."""
    scheme, columns = fate.scheme, fate.columns
    assert scheme is not None
    codes = (
        unpack_table(parts["codes"], scheme, columns)
        if fate.kind == "table"
        else unpack_matmul_weight(parts["codes"], scheme)
    )
    row_scales, zeros = parts.get("row_scales"), parts.get("zero_points")
    scales = unpack_scales(parts["scales"], None if row_scales is None else row_scales[:, 0])
    points = None if zeros is None else unpack_zero_points(zeros, scheme, columns)
    return restored(QuantizedRows(codes, scales, points), scheme, columns)


def _as_planned(stored: StoredTensor, array: AnyArray) -> AnyArray:
    """Return float32 values in float16 where that is planned: rounded to nearest, values below 6e-8 to 0.

    Raises:
        SourceError: A value is beyond float16's range.
    """
    if stored.dtype != "float16" or array.dtype == np.float16:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise SourceError(
            f"a weight of {float(np.abs(array).max()):.3g} is beyond float16, which ends at 65504",
            where=stored.name,
            hint="--set graph.float_type=float32",
        )
    return narrow


def restored(result: QuantizedRows, scheme: Scheme, columns: int) -> FloatArray:
    """Return what rows of a weight are once they were quantized, float32 ``[rows, columns]``."""
    rows, blocks = result.scales.shape
    codes = result.codes.reshape(rows, blocks, -1).astype(np.float32)
    codes -= np.float32(zero_code(scheme.bits)) if result.zero_points is None else result.zero_points[..., None]
    codes *= result.scales[..., None]
    return np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns])
