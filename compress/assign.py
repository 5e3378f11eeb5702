"""From measured losses to a plan: which tensors are open to choice, and an assignment that the plan's bytes confirm.

Requires a plan and every open tensor's losses; ensures a plan that keeps the budget byte by byte, padding and graph
included. What is chosen is :mod:`compress.quantize.allocate`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from compress.contracts import Scheme
from compress.graph.size import predict_graph_bytes
from compress.planning import INLINE_LIMIT, Fate, Plan, StoredTensor
from compress.profile import Profile
from compress.quantize.allocate import TIME_WEIGHT, Allocation, Candidate, Option, allocate
from compress.quantize.options import BLOCK_SIZES, decode_cost, schemes_for, tensor_bytes
from compress.quantize.packing import zero_point_bytes

#: The graph's size is predicted to this share (tests/test_plan.py holds it to that).
_GRAPH_ERROR = 0.03
#: A tensor from 1 MiB on starts on a page, others on a cache line: at most this many bytes before it are lost.
_PAGE_PADDING, _LINE_PADDING, _PAGE_FROM = 4095, 63, 1 << 20
_ROUNDS = 4


def open_tensors(plan: Plan, profile: Profile) -> dict[str, tuple[Scheme, ...]]:
    """Return the schemes that each tensor may be stored in, by name, in the plan's order; others are not open.

    Args:
        plan: A plan without an assignment: what it keeps in float32 stays so.
        profile: The profile it was made from.
    """
    found = {}
    for fate in plan.fates:
        if fate.scheme is None or fate.role is None:
            continue
        schemes = schemes_for(profile, fate.role, fate.columns)
        if schemes:
            found[fate.name] = schemes
    return found


def candidate(plan: Plan, name: str, losses: Mapping[Scheme, float]) -> Candidate:
    """Return a tensor as :func:`compress.quantize.allocate.allocate` takes it.

    Args:
        plan: Knows its shape and how scales are stored.
        name: The tensor's.
        losses: What the model loses when this tensor alone is stored so, nats a token; at least one scheme.
    """
    fate = plan.by_name[name]
    assert fate.role is not None and fate.kind != "vector", f"{name} is not quantized"
    options = tuple(
        Option(
            scheme,
            tensor_bytes(scheme, fate.rows, fate.columns, plan.scale_format, fate.kind),
            loss,
            decode_cost(scheme, fate.rows, fate.columns, looked_up=fate.kind == "table" and not fate.tied),
        )
        for scheme, loss in losses.items()
    )
    return Candidate(name, fate.role, options)


def fixed_bytes(plan: Plan, names: Sequence[str] | None = None) -> int:
    """Return the bytes of everything but the named tensors' own, padding and graph at their worst.

    Whatever schemes the named tensors get: this and their :func:`~compress.quantize.options.tensor_bytes` are no less
    than the new plan's ``predicted_bytes``, and than the artifact's files.

    Args:
        plan: Any plan of the model.
        names: Tensors that are open to choice; default: all that are quantized by blocks.
    """
    if names is None:
        names = [f.name for f in plan.fates if f.scheme is not None and f.scheme.activations == "none"]
    chosen = set(names)
    fates = [_worst(fate, plan) if fate.name in chosen else fate for fate in plan.fates]
    total = predict_graph_bytes(replace(plan, fates=tuple(fates)))
    total += int(total * _GRAPH_ERROR)
    for fate in fates:
        for stored in fate.stored:
            if stored.offset is None:
                continue  # counted with the graph
            total += _PAGE_PADDING if stored.nbytes >= _PAGE_FROM else _LINE_PADDING
            total += 0 if fate.name in chosen else stored.nbytes
    return total


def _worst(fate: Fate, plan: Plan) -> Fate:
    """Return a weight with every part it can have, each as large as it can be and at the end of the file."""
    assert fate.kind != "vector", f"{fate.name} is not quantized"
    finest = Scheme(8, BLOCK_SIZES[0], symmetric=False)
    blocks = finest.blocks(fate.columns)
    width = -(-fate.columns // BLOCK_SIZES[-1]) * BLOCK_SIZES[-1]
    end = 10 * max(plan.data_bytes, INLINE_LIMIT)
    parts = [
        StoredTensor(f"{fate.name}.codes", "uint8", (fate.rows, width), end),
        StoredTensor(f"{fate.name}.scales", plan.scale_format, (fate.rows, blocks), end),
        StoredTensor(f"{fate.name}.zero_points", "uint8", (fate.rows, zero_point_bytes(1, fate.columns, finest)), end),
    ]
    if plan.scale_format == "int8":
        parts.append(StoredTensor(f"{fate.name}.row_scales", "float32", (fate.rows, 1), end))
    return replace(fate, scheme=finest, stored=tuple(parts))


def assign(
    candidates: Sequence[Candidate],
    replan: Callable[[Mapping[str, Scheme]], Plan],
    *,
    max_bytes: int | None,
    max_loss: float | None,
    time_weight: float = TIME_WEIGHT,
) -> tuple[Allocation, Plan]:
    """Choose an option for every candidate and return the plan that says so.

    The first choice allows for padding at its worst, the ones after it for the padding that the last one had. The best
    of those is taken of which the plan confirms that the budget is kept.

    Args:
        candidates: The tensors that are open, with their losses.
        replan: Makes a plan with these schemes by name (:func:`compress.planning.make_plan`).
        max_bytes: The most bytes of graph and weights.
        max_loss: The most predicted loss, nats a token.
        time_weight: Nats that being as slow again is worth.

    Returns:
        The allocation, whose ``nbytes`` are the plan's, and the plan.

    Raises:
        BudgetError: No assignment keeps the budget.
        CompressError: A loss cannot be.
    """
    fixed = fixed_bytes(replan({}), [item.name for item in candidates])
    best: tuple[Allocation, Plan] | None = None
    for _ in range(_ROUNDS):
        made = allocate(candidates, fixed_bytes=fixed, max_bytes=max_bytes, max_loss=max_loss, time_weight=time_weight)
        plan = replan(made.schemes)
        certain = plan.predicted_bytes + int(plan.graph_bytes * _GRAPH_ERROR)
        over = max_bytes is not None and certain > max_bytes
        if best is None or (not over and made.loss < best[0].loss):
            best = made, plan
        # Another choice has other padding: where it was too much, so much more is left for it the next time.
        allowed = fixed
        fixed = certain - sum(choice.option.nbytes for choice in made.choices)
        if max_bytes is None or (fixed >= allowed and not over):
            break
    assert best is not None
    return replace(best[0], nbytes=best[1].predicted_bytes), best[1]
