"""Calibration of an encoder: what its linears see on texts, and what follows for how they are stored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.calibrate.encoder_texts import calibration_texts
from compress.calibrate.ranges import scale_and_zero_point
from compress.calibrate.smoothing import ChannelStatistics, Smoothing, smooth
from compress.contracts import Checkpoint, Encoder, FloatArray
from compress.planning import INPUT_RANGE as RANGE
from compress.planning import Plan, make_plan
from compress.profile import Profile
from compress.validation.protocol import run_worker
from compress.validation.text import Text

TIMEOUT_SECONDS = 3600.0
STATISTICS_NAME = ".calibration.npz"


@dataclass(frozen=True)
class Calibrated:
    """A plan that knows what was found, and the changes that its weights need.

    ``statistics`` is the worker's file, for the moments that are too many to keep; who asked for it removes it.
    ``record`` is for the manifest: texts, the losses of linears, and which stay in float32.
    """

    plan: Plan
    smoothing: Smoothing
    statistics: Path
    record: Mapping[str, Any]


def wanted(plan: Plan, profile: Profile) -> bool:
    """Return whether a plan gains from calibration: an encoder with integer products whose profile asks for it."""
    asked = profile.quantize
    # Where every tensor gets a range, they are found later, on the artifact's own graph.
    products = bool(_integers(plan, "static")) and (asked.activation_bits is None or asked.quantizer == "gptq")
    return (
        isinstance(plan.structure, Encoder)
        and bool(_integers(plan))
        and (asked.smoothing == "calibrated" or asked.max_layer_loss is not None or products)
    )


def _integers(plan: Plan, *kinds: str) -> dict[str, int]:
    """Return the bits of the linears that become integer products, by name."""
    return {
        fate.name: fate.scheme.bits
        for fate in plan.fates
        if fate.scheme is not None and fate.scheme.activations in (kinds or ("dynamic", "static"))
    }


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
    encoder, asked = plan.structure, profile.quantize
    assert isinstance(encoder, Encoder)
    # A tied head has no module of its own to watch: the model keeps an embedding there.
    heads = {item.name for item in encoder.linears if encoder.tied and item.role == "head"}
    bits = {name: count for name, count in _integers(plan).items() if name not in heads}
    static = {} if asked.activation_bits is not None else _integers(plan, "static")
    texts, statistics = work / ".calibration-texts.npz", work / STATISTICS_NAME
    calibration_texts(encoder, checkpoint, content, seed).save(texts)
    try:
        request = {
            "checkpoint": dict(source),
            "texts": str(texts),
            "output": str(statistics),
            "linears": {
                item.name: list(item.graph_weights)
                for item in encoder.linears
                if item.layer is not None or item.name in bits
            },
            "smoothing": asked.smoothing == "calibrated",
            "bits": bits,
            "measure_losses": asked.max_layer_loss is not None,
            "static": list(static),
            "range": asked.input_range,
            "memory_cap": memory_cap,
            "threads": 1,
        }
        response = run_worker("calibrate.encoder_worker", request, timeout=TIMEOUT_SECONDS, progress=progress)
    finally:
        texts.unlink()
    losses: dict[str, float] = response["results"][0]["losses"]
    kept = sorted(name for name, loss in losses.items() if not loss <= (asked.max_layer_loss or 0))
    smoothing = _changes(encoder, statistics, asked.smoothing == "calibrated", static.keys() - set(kept))
    arrays = {name: (str(array.dtype), array.shape) for name, array in smoothing.constants.items()}
    final = make_plan(smoothing.structure, profile, checkpoint, constants=arrays, keep_float=kept)
    record = {
        "text": {"name": content.name, "sha256": content.sha256},
        "texts": response["results"][0]["texts"],
        "losses": {name: float(f"{loss:.3g}") for name, loss in losses.items()},
        "kept_float": kept,
    }
    return Calibrated(final, smoothing, statistics, record)


def _changes(encoder: Encoder, path: Path, smoothed: bool, static: Collection[str]) -> Smoothing:
    """Return what is changed, and the constants that fixed ranges need."""
    found = smooth(encoder, _read(path, encoder)) if smoothed else Smoothing(encoder)
    ranges: dict[str, npt.NDArray[Any]] = {}
    with np.load(path) as stored:
        for name in sorted(static):
            scale, zero_point = scale_and_zero_point(*map(float, stored[f"{name}/range"]))
            ranges[f"{name}.{RANGE[0]}"], ranges[f"{name}.{RANGE[1]}"] = np.array(scale), np.array(zero_point)
    return replace(found, constants={**found.constants, **ranges})


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
