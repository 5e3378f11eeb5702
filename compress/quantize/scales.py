"""How scales are stored, and what that rounds them to.

A float32 scale for every 32 four-bit codes is a fifth of a weight's bytes. Two smaller forms lose nothing that can be
measured, because codes are chosen *after* the scale was rounded:

``float16``
    Half the bytes. In the graph: ``Cast`` to float32.
``int8``
    A quarter: an int8 a block times one float32 a row, ``scale = q * row_scale``. In the graph: ``Cast``, ``Mul``.

Both expressions have constant inputs only, so ONNX Runtime folds them when it loads the model and its kernels see
ordinary float32 scales. Row scales keep 17 significant bits, which makes every product exact and :func:`pack_scales`
the exact inverse of :func:`unpack_scales`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from compress.contracts import FloatArray
from compress.errors import CompressError, UsageError, did_you_mean

ScaleFormat = Literal["float32", "float16", "int8"]

_INT8_MAX = 127
_FLOAT16_MAX = np.float32(np.finfo(np.float16).max)
_ROW_SCALE_MASK = np.uint32(0xFFFFFF80)


def validate_scale_format(scale_format: str, *, where: str | None = None) -> None:
    """Refuse an unknown scale format.

    Raises:
        UsageError: The hint says what is near or known.
    """
    known = get_args(ScaleFormat)
    if scale_format not in known:
        raise UsageError(f"unknown scale format {scale_format!r}", where=where, hint=did_you_mean(scale_format, known))


def scale_bytes(rows: int, blocks: int, scale_format: ScaleFormat) -> int:
    """Return the bytes that the scales of ``rows`` rows of ``blocks`` blocks take in the file."""
    if scale_format == "int8":
        return rows * (blocks + 4)
    return rows * blocks * (2 if scale_format == "float16" else 4)


def round_scales(scales: FloatArray, scale_format: ScaleFormat) -> FloatArray:
    """Return the float32 scales that a format can hold, each the nearest to the one given.

    A scale that is not 0 does not become 0: it keeps the format's least magnitude.

    Args:
        scales: float32 ``[rows, blocks]``, finite, of either sign.
        scale_format: The format.

    Raises:
        CompressError: A scale is beyond float16's range.
    """
    if scale_format == "float32":
        return scales
    if scale_format == "float16":
        if scales.size and float(np.abs(scales).max()) > _FLOAT16_MAX:
            raise CompressError(
                f"a scale of {float(np.abs(scales).max()):.3g} is beyond float16",
                hint="store this weight's scales as float32",
            )
        least = np.float32(np.finfo(np.float16).smallest_subnormal)
        kept = np.where((scales != 0) & (np.abs(scales) < least), np.copysign(least, scales), scales)
        return kept.astype(np.float16).astype(np.float32)
    codes, row_scales = _split(scales)
    return codes * row_scales[:, None]


def pack_scales(scales: FloatArray, scale_format: ScaleFormat) -> tuple[npt.NDArray[Any], FloatArray | None]:
    """Return the arrays that are stored for rounded scales.

    Args:
        scales: float32 ``[rows, blocks]`` as :func:`round_scales` returned them.
        scale_format: The same format.

    Returns:
        Scales ``[rows, blocks]`` in the format's type, and float32 row scales ``[rows]`` for ``int8``, else ``None``.

    Raises:
        ValueError: The scales were not rounded to the format: storing them would change them.
    """
    if scale_format == "float32":
        return scales, None
    stored: npt.NDArray[Any]
    row_scales: FloatArray | None = None
    if scale_format == "float16":
        with np.errstate(over="ignore"):  # the comparison below reports it
            stored = scales.astype(np.float16)
    else:
        codes, row_scales = _split(scales)
        stored = codes.astype(np.int8)
    if not np.array_equal(unpack_scales(stored, row_scales), scales):
        raise ValueError(f"the scales are not multiples that {scale_format} can hold; round them first")
    return stored, row_scales


def unpack_scales(stored: npt.NDArray[Any], row_scales: FloatArray | None) -> FloatArray:
    """Undo :func:`pack_scales`, with the arithmetic of the graph: Cast, then Mul where there are row scales."""
    scales: FloatArray = stored.astype(np.float32)
    return scales if row_scales is None else scales * row_scales[:, None]


def _split(scales: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return int8 codes (as float32) ``[rows, blocks]`` and row scales ``[rows]`` with 17 significant bits."""
    greatest = np.abs(scales).max(axis=1, initial=0.0)
    row_scales = greatest / np.float32(_INT8_MAX)
    bits = row_scales.view(np.uint32)
    bits += np.uint32(0x40)  # round, do not truncate: an exact multiple must find its own row scale again
    bits &= _ROW_SCALE_MASK
    divisor = np.where(row_scales > 0, row_scales, np.float32(1))[:, None]
    codes = np.clip(np.rint(scales / divisor), -_INT8_MAX, _INT8_MAX)
    lost = (codes == 0) & (scales != 0)
    return np.where(lost, np.sign(scales), codes), row_scales
