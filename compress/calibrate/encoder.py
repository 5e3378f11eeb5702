"""Calibration of an encoder: what its linears see on texts, and what follows for how they are stored."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.calibrate.encoder_texts import calibration_texts
from compress.calibrate.smoothing import Ranges, Smoothing, smooth
from compress.contracts import Checkpoint, Encoder
from compress.plan import Plan, make_plan
from compress.profile import Profile
from compress.validate.protocol import run_worker
from compress.validate.text import Text

TIMEOUT_SECONDS = 3600.0


@dataclass(frozen=True)
class Calibrated:
    """A plan that knows what was found, and the changes that its weights need."""

    plan: Plan
    smoothing: Smoothing | None


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
    threads: int,
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
        work: Where temporary files may go.
        threads: Of the worker; they change no bytes.
        seed: Of random sequences.
        memory_cap: The most bytes the model may take there.
        progress: Called with the fraction that is done.

    Raises:
        UsageError: The text is too short.
        CompressError: The model or its tokenizer cannot be run.
    """
    encoder = plan.structure
    assert isinstance(encoder, Encoder)
    texts = calibration_texts(encoder, checkpoint, content, seed)
    with tempfile.TemporaryDirectory(prefix=".calibrate-", dir=work) as name:
        place = Path(name)
        texts.save(place / "texts.npz")
        request = {
            "checkpoint": dict(source),
            "texts": str(place / "texts.npz"),
            "output": str(place / "ranges.npz"),
            "linears": {item.name: item.graph_weights[0] for item in encoder.linears if item.layer is not None},
            "memory_cap": memory_cap,
            "threads": threads,
        }
        run_worker("calibrate.encoder_worker", request, timeout=TIMEOUT_SECONDS, progress=progress)
        ranges = _read_ranges(place / "ranges.npz", encoder)
    smoothing = smooth(encoder, ranges)
    sizes = {name: len(array) for name, array in smoothing.constants.items()}
    return Calibrated(make_plan(smoothing.structure, profile, checkpoint, constants=sizes), smoothing)


def _read_ranges(path: Path, encoder: Encoder) -> Ranges:
    with np.load(path) as stored:
        names = [linear.name for linear in encoder.linears if linear.layer is not None]
        return {name: (stored[f"{name}/low"], stored[f"{name}/high"]) for name in names}
