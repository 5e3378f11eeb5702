"""Calibration of an encoder: what its linears see on texts, and what follows for how they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.calibrate.encoder_texts import calibration_texts
from compress.calibrate.smoothing import ChannelStatistics, Smoothing, smooth
from compress.contracts import Checkpoint, Encoder, FloatArray
from compress.plan import Plan, make_plan
from compress.profile import Profile
from compress.validate.protocol import run_worker
from compress.validate.text import Text

TIMEOUT_SECONDS = 3600.0
STATISTICS_NAME = ".calibration.npz"


@dataclass(frozen=True)
class Calibrated:
    """A plan that knows what was found, and the changes that its weights need.

    ``statistics`` is the worker's file, for the moments that are too many to keep; who asked for it removes it.
    """

    plan: Plan
    smoothing: Smoothing
    statistics: Path


def wanted(plan: Plan, profile: Profile) -> bool:
    """Return whether a plan gains from calibration: an encoder with integer products whose profile asks for it."""
    return (
        isinstance(plan.structure, Encoder)
        and profile.quantize.smoothing == "calibrated"
        and any(fate.scheme is not None and fate.scheme.activations != "none" for fate in plan.fates)
    )


def calibrate(
    plan: Plan,
    checkpoint: Checkpoint,
    profile: Profile,
    *,
    source: Mapping[str, Any],
    content: Text,
    work: Path,
    seed: int,
    memory_cap: int | None,
    progress: Callable[[float], None],
) -> Calibrated:
    """Run the source model on calibration texts and plan again with what they show.

    Args:
        plan: Without calibration.
        checkpoint: The source.
        profile: What is asked for.
        source: The source as a worker opens it again.
        content: Running text to cut calibration texts from.
        work: Where the statistics go.
        seed: Of random sequences.
        memory_cap: The most bytes the model may take there.
        progress: Called with the fraction that is done.

    Raises:
        UsageError: The text is too short.
        CompressError: The model or its tokenizer cannot be run.
    """
    encoder = plan.structure
    assert isinstance(encoder, Encoder)
    texts, statistics = work / ".calibration-texts.npz", work / STATISTICS_NAME
    calibration_texts(encoder, checkpoint, content, seed).save(texts)
    try:
        request = {
            "checkpoint": dict(source),
            "texts": str(texts),
            "output": str(statistics),
            "linears": {item.name: item.graph_weights[0] for item in encoder.linears if item.layer is not None},
            "memory_cap": memory_cap,
            "threads": 1,
        }
        run_worker("calibrate.encoder_worker", request, timeout=TIMEOUT_SECONDS, progress=progress)
    finally:
        texts.unlink()
    smoothing = smooth(encoder, _read(statistics, encoder))
    sizes = {name: len(array) for name, array in smoothing.constants.items()}
    return Calibrated(make_plan(smoothing.structure, profile, checkpoint, constants=sizes), smoothing, statistics)


def _read(path: Path, encoder: Encoder) -> dict[str, ChannelStatistics]:
    with np.load(path) as stored:
        names = [linear.name for linear in encoder.linears if linear.layer is not None]
        return {
            name: ChannelStatistics(*(stored[f"{name}/{measure}"] for measure in ("low", "high", "peak")))
            for name in names
        }


def moments(found: Calibrated, name: str) -> FloatArray | None:
    """Return the second moments ``[K', K']`` of a linear's inputs as it is stored, ``None`` where none are known."""
    with np.load(found.statistics) as stored:
        if f"{name}/moments" not in stored:
            return None
        second, mean = stored[f"{name}/moments"], stored[f"{name}/mean"]
    change = found.smoothing.linears.get(name)
    return second if change is None else change.moments(second, mean)
