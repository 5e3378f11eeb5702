"""Amounts that follow an aim: so many times faster on this machine, or so near to the source.

One pass over the source predicts what removing parts costs (:mod:`compress.prune.curves`), the latency model what it
gains (:mod:`compress.latency`), and :mod:`compress.prune.search` picks the mix. A limit on KL divergence is then
searched along the frontier with models that are really pruned and measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.contracts import Checkpoint, Decoder, SizeKeys, Structure
from compress.errors import UsageError
from compress.profile import Profile
from compress.prune import texts
from compress.prune.amounts import Amounts, full, width_step
from compress.prune.search import Choice, Curves, Mix, Steps, candidates, choose, most_within
from compress.validation.protocol import run_worker

if TYPE_CHECKING:
    from compress.prune.run import PruneOptions

#: Tokens that a candidate is measured on for ``max_kl``: the pruning text's, of which a part was fitted.
_MEASURED_TOKENS = 2048
_CONTEXT = 128

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Found:
    """The sizes, and what the report says of the search."""

    amounts: Amounts
    record: Mapping[str, Any]


def find(
    checkpoint: Checkpoint,
    source: Mapping[str, Any],
    structure: Structure,
    sizes: SizeKeys,
    profile: Profile,
    options: PruneOptions,
    work: Path,
    progress: Progress,
) -> Found:
    """Return the sizes that keep the profile's aim at the least predicted loss.

    Raises:
        UsageError: An aim that the model or the profile cannot have.
        BudgetError: No sizes keep it; with the most that can be kept.
    """
    from compress.latency.geometry import geometry_of
    from compress.latency.model import LatencyModel
    from compress.latency.parts import Workload

    asked = profile.prune
    if asked.max_kl is not None and not isinstance(structure, Decoder):
        raise UsageError(
            "a limit on KL divergence is for models that write text; this one is an encoder",
            where="prune.max_kl",
            hint="--set prune.speedup=1.5",
        )
    have, geometry = full(structure), geometry_of(structure, profile)
    curves = _curves(checkpoint, source, structure, profile, options, work, lambda part: progress(0.5 * part))
    workload = Workload(1, 1, _CONTEXT) if isinstance(structure, Decoder) else Workload(1, _CONTEXT, 0)

    def fits(amounts: Amounts) -> bool:
        return not sizes.heads_divide or structure.hidden_size % amounts.heads == 0

    steps = Steps(inner=max(width_step(have.inner), 128 if have.inner % 128 == 0 else 1))
    offered = candidates(curves, have, steps, fits)
    model = LatencyModel(options.threads, progress=lambda part: progress(0.5 + 0.2 * part))
    latency = model.predictor(geometry, workload, offered)
    measured: Mapping[Amounts, float] = {}
    if asked.speedup is not None:
        choice = choose(curves, have, latency, speedup=asked.speedup, steps=steps, fits=fits)
        best = choice.best
    else:
        assert asked.max_kl is not None
        choice = choose(curves, have, latency, max_loss=float("1e30"), steps=steps, fits=fits)
        measure = _measure(checkpoint, source, profile, options, work)
        best, measured = most_within(choice.frontier, measure, asked.max_kl)
    return Found(best.amounts, _record(best, choice, measured))


def _record(best: Mix, choice: Choice, measured: Mapping[Amounts, float]) -> dict[str, Any]:
    frontier = [[float(f"{mix.speedup:.4g}"), float(f"{mix.loss:.4g}")] for mix in choice.frontier]
    return {
        "predicted_speedup": float(f"{best.speedup:.4g}"),
        "predicted_loss": float(f"{best.loss:.4g}"),
        "frontier": frontier,
        "measured_kl": [[amounts.inner, amounts.layers, float(f"{kl:.4g}")] for amounts, kl in measured.items()],
    }


def _curves(
    checkpoint: Checkpoint,
    source: Mapping[str, Any],
    structure: Structure,
    profile: Profile,
    options: PruneOptions,
    work: Path,
    progress: Progress,
) -> Curves:
    text = texts.write_texts(
        structure,
        checkpoint,
        profile,
        text_file=options.text_file,
        source=source,
        seed=options.seed,
        memory_cap=options.max_memory,
        work=work,
        progress=lambda fraction: None,
    )
    from compress.prune.run import TIMEOUT_SECONDS, request_of

    request = request_of(source, profile, full(structure), work, options, text.path) | {"job": "curves"}
    try:
        response = run_worker("prune.worker", request, timeout=TIMEOUT_SECONDS, progress=progress)
    finally:
        text.path.unlink(missing_ok=True)
    found = response["results"][0]
    return Curves(
        *({int(size): float(loss) for size, loss in found[kind].items()} for kind in ("inner", "heads", "layers"))
    )


def _measure(
    checkpoint: Checkpoint, source: Mapping[str, Any], profile: Profile, options: PruneOptions, work: Path
) -> Callable[[Amounts], float]:
    """Return what prunes to some sizes and measures the divergence from the source."""
    from compress.prune import run

    def measure(amounts: Amounts) -> float:
        with tempfile.TemporaryDirectory(prefix="candidate-", dir=work) as place:
            directory = Path(place)
            run.prune(checkpoint, source, profile, amounts, directory, options, lambda fraction: None)
            wanted = profile.model_copy(update={"prune": profile.prune.model_copy(update={"tokens": _MEASURED_TOKENS})})
            structure, _ = run.prunable(checkpoint)
            text = texts.write_texts(
                structure,
                checkpoint,
                wanted,
                text_file=options.text_file,
                source=source,
                seed=options.seed + 1,
                memory_cap=options.max_memory,
                work=directory,
                progress=lambda fraction: None,
            )
            request = {
                "job": "divergence",
                "checkpoint": dict(source),
                "smaller": str(directory),
                "texts": str(text.path),
                "threads": options.threads,
            }
            response = run_worker("prune.worker", request, timeout=run.TIMEOUT_SECONDS)
            return float(response["results"][0]["kl"])

    return measure
