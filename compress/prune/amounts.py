"""How much is removed: what the user asked for beside what there is, and the nearest that works.

An amount below 1 is a share of what there is, from 1 on a number of parts; what remains has to be a size that the
kernels, the config and transformers take.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from compress.contracts import Decoder, SizeKeys, Structure
from compress.errors import UsageError
from compress.profile import Profile

#: Feed-forward widths stay multiples of this where they were: blocks of weights and SIMD kernels end there.
_STEP = 64
#: Tokens that an encoder is pruned on, and numbers that its down projection reads of them, at most.
_ENCODER_TOKENS, _ENCODER_INPUTS = 32_768, 32_768 * 1536


@dataclass(frozen=True)
class Amounts:
    """Sizes of a model: neurons, query heads, key-value heads a block, and blocks."""

    inner: int
    heads: int
    kv_heads: int
    layers: int


@dataclass(frozen=True)
class Asked:
    """What is to be removed: shares below 1, numbers of parts from 1 on."""

    ffn: float = 0
    heads: float = 0
    kv_groups: float = 0
    layers: float = 0


def full(structure: Structure) -> Amounts:
    """Return the sizes of a model as it is."""
    inner = next(linear.in_features for linear in structure.linears if linear.role == "down")
    shared = structure.kv_heads if isinstance(structure, Decoder) else structure.heads
    return Amounts(inner, structure.heads, shared, structure.layers)


def text_tokens(structure: Structure, profile: Profile) -> int:
    """Return how many tokens are read for choosing and fitting.

    An encoder's are cheap: as many as leave the widest inputs at 200 MB. Four times as many cut what half of MiniLM's
    neurons cost from 3.0 to 2.1 % of reciprocal rank (docs/pruning.md).
    """
    asked = profile.prune.tokens
    if asked is not None:
        return asked
    if isinstance(structure, Decoder):
        return profile.calibration.tokens
    return max(profile.calibration.tokens, min(_ENCODER_TOKENS, _ENCODER_INPUTS // full(structure).inner))


def width_step(inner: int) -> int:
    """Return what the width of a feed-forward stays a multiple of: the largest power of two in it, 64 at most."""
    step = 1
    while step < _STEP and inner % (2 * step) == 0:
        step *= 2
    return step


def resolve(structure: Structure, sizes: SizeKeys, asked: Asked) -> Amounts:
    """Return the sizes that are nearest to what was asked for.

    Raises:
        UsageError: More is to be removed than there is, nothing would be left, or the model has no such part; with what
            would work.
    """
    have = full(structure)
    if asked.kv_groups and have.kv_heads == have.heads:
        raise UsageError(
            f"{structure.model_type} has no key-value groups: every head has keys and values of its own",
            where="prune.kv_groups",
            hint="remove heads: --set prune.heads=0.25",
        )
    if (asked.heads or asked.kv_groups) and isinstance(structure, Decoder) and structure.rope_switch is not None:
        raise UsageError(
            "transformers takes the length of LongRoPE's factors from the number of heads, so none can be removed",
            where="prune.heads",
            hint="prune other parts: --set prune.ffn=0.2, prune.layers=2",
        )
    blocks = {linear.layer for linear in structure.linears if linear.layer is not None}
    if asked.layers and 1 < len(blocks) < structure.layers:
        raise UsageError(
            f"{len(blocks)} blocks are run {structure.layers} times in all; which run to leave out has no one answer",
            where="prune.layers",
            hint="prune their width: --set prune.ffn=0.2",
        )
    step = width_step(have.inner)
    inner = _left("prune.ffn", "neurons", asked.ffn, have.inner, step)
    groups = _left("prune.kv_groups", "key-value groups", asked.kv_groups, have.kv_heads, 1)
    each = have.heads // have.kv_heads
    left = replace(have, inner=inner, kv_heads=groups, heads=groups * each)
    left = replace(left, layers=_left("prune.layers", "blocks", asked.layers, have.layers, 1))
    if asked.heads:
        left = _heads(structure, left, asked.heads, grouped=have.kv_heads != have.heads)
    return _dividing(structure, sizes, left, grouped=have.kv_heads != have.heads)


def _left(key: str, parts: str, asked: float, have: int, step: int) -> int:
    """Return how many of ``have`` parts are left, a multiple of ``step``, the nearest to what was asked for."""
    removed = have * asked if asked < 1 else asked
    if asked >= 1 and asked != int(asked):
        raise UsageError(f"{asked:g} is neither a share below 1 nor a number of {parts}", where=key)
    if removed > have:
        raise UsageError(f"{removed:g} {parts} are to be removed, the model has {have}", where=key)
    if removed >= have:
        raise UsageError(f"removing all {have} {parts} leaves nothing", where=key, hint=f"{have - step} at most")
    nearest = have - round(removed / step) * step
    return max(step, nearest)


def _heads(structure: Structure, left: Amounts, asked: float, *, grouped: bool) -> Amounts:
    """Remove query heads: equally many of every group, or any where each has keys and values of its own."""
    if not grouped:
        heads = _left("prune.heads", "heads", asked, left.heads, 1)
        return replace(left, heads=heads, kv_heads=heads)
    each = left.heads // left.kv_heads
    if asked >= 1 and asked > structure.heads:
        raise UsageError(f"{asked:g} heads are to be removed, the model has {structure.heads}", where="prune.heads")
    share = asked if asked < 1 else asked / structure.heads
    kept = each - round(each * share)
    if not kept:
        raise UsageError(
            f"that leaves no query head in a group of {each}",
            where="prune.heads",
            hint=f"{(each - 1) / each:.2f} at most, or remove whole groups: --set prune.kv_groups=1",
        )
    return replace(left, heads=left.kv_heads * kept)


def _dividing(structure: Structure, sizes: SizeKeys, left: Amounts, *, grouped: bool) -> Amounts:
    """Return the nearest numbers of heads that transformers takes."""
    if not sizes.heads_divide or structure.hidden_size % left.heads == 0:
        return left
    each = structure.heads // (structure.kv_heads if isinstance(structure, Decoder) else structure.heads)
    options = [
        (groups, groups * per)
        for groups in range(1, left.kv_heads + 1 if grouped else structure.heads + 1)
        for per in (range(1, each + 1) if grouped else (1,))
        if structure.hidden_size % (groups * per) == 0
    ]
    groups, heads = min(options, key=lambda pair: (abs(pair[1] - left.heads), abs(pair[0] - left.kv_heads), -pair[1]))
    return replace(left, heads=heads, kv_heads=groups)
