"""What pruning takes: peak memory of its worker, from sizes alone.

The worker holds one block of a decoder in float32 (an encoder whole), the hidden states of all calibration tokens of
both streams, and for one linear at a time its inputs with their second moments: as read and inverted while units are
chosen (very wide ones in their own memory), as summed and factored while weights are fitted.
"""

from __future__ import annotations

from compress.contracts import Encoder, Structure
from compress.profile import Profile
from compress.prune._positive import WIDE
from compress.prune.amounts import Amounts, full, text_tokens

#: torch and transformers, imported; encoders' classes and optimum's tasks too.
_LIBRARIES = 480_000_000
_FLOAT, _DOUBLE = 4, 8
#: Hidden states that are alive at once: inputs, outputs and the pruned stream of both, and what is wanted.
_STATES = 7
#: Positions for every token of an encoder's text: as many random ones, and texts of some forty tokens padded to 64.
_ENCODER_POSITIONS = 3.2
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
        tokens = int(_ENCODER_POSITIONS * tokens)
    hidden = structure.hidden_size
    widest = max(amounts.inner, amounts.heads * structure.head_dim)
    source = max(have.inner, have.heads * structure.head_dim)
    states = _STATES * tokens * hidden * _FLOAT
    # The surgeon's second moments and weights beside those that it is given: very wide moments are overwritten.
    own = (0, _FLOAT) if source >= WIDE else (_DOUBLE, _DOUBLE)
    choosing = tokens * source * _FLOAT + source * (source * (_FLOAT + own[0]) + hidden * (_FLOAT + own[1]))
    kept = _FLOAT if widest >= WIDE else _DOUBLE
    fitting = tokens * widest * _FLOAT + 2 * kept * widest * (widest + hidden) + 2 * _FLOAT * hidden * source
    linear_bytes = max(choosing, fitting)
    if amounts.layers < have.layers:
        states += (have.layers + 1) * STATE_TOKENS * hidden * _FLOAT
    return _LIBRARIES + weights + max(states + linear_bytes, 2 * tables)
