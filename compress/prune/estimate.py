"""What pruning takes: peak memory of its worker, from sizes alone.

The worker holds one block of a decoder in float32 (an encoder whole), the hidden states of all calibration tokens of
both streams, and for one linear at a time its inputs, the second moments in float64 and the copies that solving makes.
"""

from __future__ import annotations

from compress.contracts import Encoder, Structure
from compress.profile import Profile
from compress.prune.amounts import Amounts, full, text_tokens
from compress.prune.surgeon import WIDE

#: torch and transformers, imported; encoders' classes and optimum's tasks too.
_LIBRARIES = 480_000_000
_FLOAT, _DOUBLE = 4, 8
#: Hidden states that are alive at once: inputs, outputs and the pruned stream of both, and what is wanted.
_STATES = 7
#: Arrays of the second moments' size that are alive at once while units are chosen (moments, their inverse, what LAPACK
#: and the steps after it copy), as measured at Phi-3's geometry (4.74 GB in all), and while weights are fitted.
_CHOOSING, _FITTING = 10, 4
#: Tokens whose hidden states are kept of every block, to choose the blocks that go.
STATE_TOKENS = 512


def prune_bytes(structure: Structure, profile: Profile, amounts: Amounts, *, text: bool) -> int:
    """Return the predicted peak of the worker in bytes."""
    have = full(structure)
    blocks: dict[int, int] = {}
    for linear in structure.linears:
        if linear.layer is not None:
            blocks[linear.layer] = blocks.get(linear.layer, 0) + linear.out_features * linear.in_features
    tables = max(table.rows * table.columns for table in structure.tables) * _FLOAT
    weights = max(blocks.values()) * _FLOAT
    if isinstance(structure, Encoder):
        weights = 2 * (sum(blocks.values()) * _FLOAT + tables)
    if not text:
        return _LIBRARIES + weights + 2 * tables
    tokens = text_tokens(structure, profile)
    if isinstance(structure, Encoder):
        tokens *= 2  # padded to the longest text
    hidden = structure.hidden_size
    widest = max(amounts.inner, amounts.heads * structure.head_dim)
    source = max(have.inner, have.heads * structure.head_dim)
    states = _STATES * tokens * hidden * _FLOAT
    choosing = _CHOOSING * source * source * (_FLOAT if source >= WIDE else _DOUBLE)
    fitting = _FITTING * widest * widest * _DOUBLE
    linear_bytes = tokens * (source + widest) * _FLOAT + max(choosing, fitting)
    if amounts.layers < have.layers:
        states += (have.layers + 1) * STATE_TOKENS * hidden * _FLOAT
    return _LIBRARIES + weights + max(states + linear_bytes, 2 * tables)
