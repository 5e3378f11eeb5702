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
from compress.quantize.packing import pack_matmul_weight, pack_table, pack_zero_points
from compress.quantize.scales import pack_scales
from compress.quantize.scheme import zero_code

AnyArray = npt.NDArray[Any]


class Store:
    """Writes weights to where the plan puts them; safe from several threads.

    Attributes:
        inline: The tensors that are too small for the data file, by planned name.
    """

    def __init__(self, plan: Plan, data: DataFile) -> None:
        self.plan, self.data = plan, data
        self.inline: dict[str, AnyArray] = {}
        self._lock = threading.Lock()

    def quantized(self, fate: Fate, start: int, result: QuantizedRows) -> None:
        """Store rows of a quantized weight, from row ``start`` on."""
        scheme = fate.scheme
        assert scheme is not None
        if scheme.activations != "none":
            self._integer(fate, start, result)
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

    def _integer(self, fate: Fate, start: int, result: QuantizedRows) -> None:
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
