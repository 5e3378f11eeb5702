"""Which ways to store a weight an allocation may choose from, what each takes, and how long each decodes.

Bytes are the plan's own arithmetic (:mod:`compress.planning`). Decode time is a table of ratios, because a kernel's
time depends on bits and block size far more than on which processor of a kind it runs on.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal

from compress.contracts import Role, ScaleFormat, Scheme
from compress.profile import Profile
from compress.providers import load as load_provider
from compress.quantize.packing import table_bytes, weight_bytes, zero_point_bytes
from compress.quantize.scales import scale_bytes

BITS = (2, 4, 8)
BLOCK_SIZES = (16, 32, 64, 128)
#: Tables are looked up; a tied one is also the head, whose blocks have to be whole for the bytes to be shared.
_TABLES: tuple[Role, ...] = ("embedding", "position")
#: KleidiAI's 4-bit kernels take blocks of a multiple of this that fill the rows, without zero points for choice.
_KLEIDI_BLOCK = 32

#: Time of MatMulNBits at M = 1 and accuracy level 4, by bits and block size, relative to 4 bits in blocks of 32.
#: Measured with onnxruntime 1.31.1, K = N = 2048, one thread, x86-64 with AVX2, 20th percentile of 200 alternating
#: runs; symmetric and not differ by less than a tenth but for 4 bits in blocks of 32 (1.12). With AVX512-VNNI, 8 bits
#: took 1.2 to 2 times as long as 4 bits.
_DECODE_TIME: Mapping[tuple[int, int], float] = {
    (2, 32): 0.87,
    (2, 64): 0.69,
    (2, 128): 0.62,
    (4, 16): 2.3,
    (4, 32): 1.0,
    (4, 64): 0.97,
    (4, 128): 0.93,
    (8, 16): 1.85,
    (8, 32): 1.66,
    (8, 64): 1.59,
    (8, 128): 1.52,
}
#: What a zero point a block adds to 4 bits in blocks of 32.
_ZERO_POINT_TIME = 1.12


def schemes_for(profile: Profile, role: Role, columns: int) -> tuple[Scheme, ...]:
    """Return the schemes that a weight of a model that writes text may be stored in, fewest bits first.

    Empty where the profile keeps the role in float32 or multiplies it as integers: nothing is chosen there. Linears of
    a profile whose blocks are symmetric stay symmetric, in whole blocks of a multiple of 32 (what ARM's fast kernels
    take), as far as their width allows it.

    Args:
        profile: Says which provider has to run it, and which roles are open.
        role: The weight's role; a tied table counts as the embedding.
        columns: Its columns K; a table is only offered blocks that divide them.
    """
    quantize = profile.quantize.for_decoders()
    own = quantize.scheme(role)
    if own is None or own.activations != "none":
        return ()
    provider = load_provider(profile.provider)
    table = role in _TABLES
    kleidi = not table and quantize.symmetric and columns % _KLEIDI_BLOCK == 0
    found = []
    for bits, block_size, symmetric in itertools.product(BITS, BLOCK_SIZES, (True, False)):
        scheme = Scheme(bits, block_size, symmetric)
        if not table and quantize.symmetric and not symmetric:
            continue
        if (kleidi and block_size % _KLEIDI_BLOCK) or ((kleidi or table) and columns % block_size):
            continue
        if provider.supports(scheme) is None:
            found.append(scheme)
    return tuple(found)


def tensor_bytes(
    scheme: Scheme, rows: int, columns: int, scale_format: ScaleFormat, kind: Literal["matmul", "table"]
) -> int:
    """Return the bytes of codes, scales and zero points of a ``[rows, columns]`` weight, as the plan lays them out.

    Without the padding between tensors: :func:`compress.assign.fixed_bytes` allows for that.
    """
    codes = table_bytes if kind == "table" else weight_bytes
    size = codes(rows, columns, scheme) + scale_bytes(rows, scheme.blocks(columns), scale_format)
    return size + zero_point_bytes(rows, columns, scheme)


def decode_cost(scheme: Scheme, rows: int, columns: int, *, looked_up: bool = False) -> float:
    """Return how long a weight keeps a decode step, in the time that a byte of 4-bit codes in blocks of 32 takes.

    Args:
        scheme: One of :func:`schemes_for`'s.
        rows: Rows N.
        columns: Columns K.
        looked_up: The weight is a table that no product reads: a row is looked up in no time.

    Raises:
        KeyError: No time is known of such a scheme.
    """
    if looked_up:
        return 0.0
    time = _DECODE_TIME[scheme.bits, scheme.block_size]
    if (scheme.bits, scheme.block_size) == (4, 32) and not scheme.symmetric:
        time = _ZERO_POINT_TIME
    return time * rows * columns / 2
