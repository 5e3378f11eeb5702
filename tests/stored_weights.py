"""Planned arrays read back from the data file, or from the graph, by plain arithmetic."""

from __future__ import annotations

import numpy as np

from compress.planning import Fate, Plan

Arrays = dict[str, np.ndarray]


def unpack_slowly(row: bytes, bits: int, count: int) -> list[int]:
    """Return ``count`` codes, the first in the lowest bits: the row is one little-endian number."""
    number = int.from_bytes(row, "little")
    return [(number >> (bits * index)) & ((1 << bits) - 1) for index in range(count)]


class Stored:
    """The arrays of a plan as they lie in the file, or in the graph."""

    def __init__(self, plan: Plan, data: bytes, inline: Arrays) -> None:
        self.plan, self._data, self._inline = plan, data, inline

    def __getitem__(self, name: str) -> np.ndarray:
        stored = next(item for fate in self.plan.fates for item in fate.stored if item.name == name)
        if stored.offset is None:
            return np.asarray(self._inline[name])
        count = stored.nbytes // np.dtype(stored.dtype).itemsize
        return np.frombuffer(self._data, stored.dtype, count, stored.offset).reshape(stored.shape)

    def scales(self, fate: Fate) -> np.ndarray:
        scales = self[f"{fate.name}.scales"].astype(np.float64)
        return scales * self[f"{fate.name}.row_scales"] if scales_are_int8(self.plan) else scales

    def codes(self, fate: Fate) -> np.ndarray:
        assert fate.scheme is not None
        packed = self[f"{fate.name}.codes"]
        bits = fate.scheme.bits
        rows = [unpack_slowly(row.tobytes(), bits, fate.columns) for row in packed.reshape(fate.rows, -1)]
        return np.array(rows)

    def zero_points(self, fate: Fate) -> np.ndarray:
        assert fate.scheme is not None
        scheme = fate.scheme
        blocks = scheme.blocks(fate.columns)
        if scheme.symmetric:
            return np.full((fate.rows, blocks), 1 << (scheme.bits - 1))
        rows = self[f"{fate.name}.zero_points"].reshape(fate.rows, -1)
        return np.array([unpack_slowly(row.tobytes(), scheme.bits, blocks) for row in rows])


def scales_are_int8(plan: Plan) -> bool:
    return plan.scale_format == "int8"
