"""The bytes of block-quantized weights: codes and zero points packed low bits first, and unpacked again.

Two operators read them, both from the ``com.microsoft`` domain (ONNX Runtime, ``docs/ContribOperators.md``):

``MatMulNBits`` (``y = x W^T``, W is N x K)
    B uint8 ``[N, blocks, block_size * bits / 8]``, scales float ``[N, blocks]``, zero points uint8
    ``[N, ceil(blocks * bits / 8)]``. K is padded to whole blocks; the padding meets zeros, so its codes are free.
``GatherBlockQuantized`` (an embedding table V x H, ``gather_axis`` 0, ``quantize_axis`` 1)
    data uint8 ``[V, ceil(H * bits / 8)]``, scales float ``[V, blocks]``, zero points as above. Without padding.

Both put the first code into the lowest bits of a byte; a row starts on a byte. Where H is a whole number of blocks the
two layouts hold the same bytes, which is what lets a tied table be stored once.
"""

from __future__ import annotations

import numpy as np

from compress.contracts import ByteArray, Scheme
from compress.errors import UsageError
from compress.quantize.scheme import BITS, zero_code

# ------------------------------------------------------------------------------------------------------------ sizes


def scale_count(rows: int, columns: int, scheme: Scheme) -> int:
    """Return how many scales a ``[rows, columns]`` weight has."""
    return rows * scheme.blocks(columns)


def zero_point_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    """Return the bytes of the packed zero points; 0 for a symmetric scheme, which stores none."""
    return 0 if scheme.symmetric else rows * -(-scheme.blocks(columns) * scheme.bits // 8)


def weight_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    """Return the bytes of the packed codes in the MatMulNBits layout, whose rows are padded to whole blocks."""
    return rows * scheme.blocks(columns) * (scheme.block_size * scheme.bits // 8)


def table_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    """Return the bytes of the packed codes in the GatherBlockQuantized layout, whose rows are not padded."""
    return rows * -(-columns * scheme.bits // 8)


# ------------------------------------------------------------------------------------------------------- any codes


def pack_codes(codes: ByteArray, bits: int) -> ByteArray:
    """Pack codes along the last axis, first code in the lowest bits, every row ending on a byte.

    Args:
        codes: uint8 ``[..., n]``, each below ``2**bits``.
        bits: 2, 4 or 8.

    Returns:
        uint8 ``[..., ceil(n * bits / 8)]``, C-contiguous; unused high bits of the last byte are 0.

    Raises:
        UsageError: ``bits`` is none of 2, 4, 8.
        ValueError: A code needs more than ``bits`` bits.
    """
    _check_bits(bits)
    if bits == 8:
        return np.ascontiguousarray(codes)
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    per_byte = 8 // bits
    ragged = codes.shape[-1] % per_byte
    if ragged:
        padded = np.zeros((*codes.shape[:-1], codes.shape[-1] + per_byte - ragged), np.uint8)
        padded[..., : codes.shape[-1]] = codes
        codes = padded
    # A wide little-endian view folds neighbours together, 0x0b0a -> 0xba, a whole word at a time.
    wide = np.ascontiguousarray(codes).view(np.dtype(f"<u{per_byte}"))
    folded = wide | (wide >> (8 - bits))
    if bits == 2:
        folded |= folded >> 12
    packed: ByteArray = folded.astype(np.uint8)
    return packed


def unpack_codes(packed: ByteArray, bits: int, count: int) -> ByteArray:
    """Undo :func:`pack_codes`.

    Args:
        packed: uint8 ``[..., ceil(count * bits / 8)]``.
        bits: 2, 4 or 8.
        count: Codes in each row.

    Returns:
        uint8 ``[..., count]``.

    Raises:
        UsageError: ``bits`` is none of 2, 4, 8.
        ValueError: The rows are not as long as ``count`` codes need.
    """
    _check_bits(bits)
    if packed.shape[-1] != -(-count * bits // 8):
        raise ValueError(f"{count} codes of {bits} bits need {-(-count * bits // 8)} bytes, not {packed.shape[-1]}")
    if bits == 8:
        return np.ascontiguousarray(packed)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    flat: ByteArray = codes.reshape(*packed.shape[:-1], -1)
    return np.ascontiguousarray(flat[..., :count])


# ----------------------------------------------------------------------------------------------------- MatMulNBits


def pack_matmul_weight(codes: ByteArray, scheme: Scheme) -> ByteArray:
    """Return B of MatMulNBits.

    Args:
        codes: uint8 ``[N, blocks * block_size]``, padding included (as :class:`QuantizedRows` has it).
        scheme: Bits and block size.

    Returns:
        uint8 ``[N, blocks, block_size * bits / 8]``.

    Raises:
        ValueError: The row length is not a whole number of blocks, or a code does not fit.
    """
    rows, width = codes.shape
    if width % scheme.block_size:
        raise ValueError(f"{width} codes a row are not whole blocks of {scheme.block_size}")
    packed = pack_codes(codes, scheme.bits)
    return packed.reshape(rows, width // scheme.block_size, scheme.block_size * scheme.bits // 8)


def unpack_matmul_weight(packed: ByteArray, scheme: Scheme) -> ByteArray:
    """Undo :func:`pack_matmul_weight`: uint8 ``[N, blocks, bytes]`` to ``[N, blocks * block_size]``."""
    rows, blocks, _ = packed.shape
    return unpack_codes(packed, scheme.bits, scheme.block_size).reshape(rows, blocks * scheme.block_size)


def pack_zero_points(zero_points: ByteArray, scheme: Scheme) -> ByteArray:
    """Pack zero points uint8 ``[rows, blocks]`` row by row to uint8 ``[rows, ceil(blocks * bits / 8)]``.

    The spare bits at a row's end hold the symmetric zero point, as ONNX Runtime's own quantizer leaves them.
    """
    rows, blocks = zero_points.shape
    spare = -blocks % (8 // scheme.bits)
    filled = np.full((rows, blocks + spare), zero_code(scheme.bits), np.uint8)
    filled[:, :blocks] = zero_points
    return pack_codes(filled, scheme.bits)


def unpack_zero_points(packed: ByteArray, scheme: Scheme, columns: int) -> ByteArray:
    """Undo :func:`pack_zero_points` for a weight of ``columns`` columns: uint8 ``[rows, blocks]``."""
    return unpack_codes(packed, scheme.bits, scheme.blocks(columns))


# -------------------------------------------------------------------------------------------- GatherBlockQuantized


def pack_table(codes: ByteArray, scheme: Scheme, columns: int) -> ByteArray:
    """Return the data of GatherBlockQuantized.

    Args:
        codes: uint8 ``[V, blocks * block_size]``, padding included.
        scheme: Bits and block size.
        columns: H, the table's width without padding.

    Returns:
        uint8 ``[V, ceil(H * bits / 8)]``.

    Raises:
        ValueError: ``codes`` is not as wide as ``columns`` need, or a code does not fit.
    """
    size = scheme.block_size or columns
    if codes.shape[1] != scheme.blocks(columns) * size:
        raise ValueError(f"{codes.shape[1]} codes a row do not match {columns} columns in blocks of {size}")
    return pack_codes(codes[:, :columns], scheme.bits)


def unpack_table(packed: ByteArray, scheme: Scheme, columns: int) -> ByteArray:
    """Undo :func:`pack_table`: uint8 ``[V, blocks * block_size]``; padding comes back as the symmetric zero point."""
    width = scheme.blocks(columns) * (scheme.block_size or columns)
    codes = np.full((packed.shape[0], width), zero_code(scheme.bits), np.uint8)
    codes[:, :columns] = unpack_codes(packed, scheme.bits, columns)
    return codes


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise UsageError(f"{bits}-bit codes cannot be packed", hint="use 2, 4 or 8 bits")
