"""Outlier channels tamed before 8-bit products, without changing what the model computes.

A few channels of an encoder's hidden states are ten times larger than the others. One scale for all of them (what a
tensor of 8-bit activations has) leaves the others a handful of codes. Scales per channel move to the weights, as in
SmoothQuant (Xiao et al., 2023), and shifts to the biases, as in Outlier Suppression+ (Wei et al., 2023); which is exact
in real numbers. What is particular here:

* Only outliers are scaled: ``s = max(1, r / (1.5 median r))`` with ``r`` half the range of a channel on the calibration
  texts. Scaling every channel to one range gives the weights the outliers instead.
* In a post-norm block the hidden state is a norm's output ``x``. The norm is made to emit ``x' = (x - z) / s``, with
  ``z`` the middle of the channel's range: linears read ``x'``; the residual sum reads ``x' s``, one product, and the
  ``z`` it lacks is in the bias of the linear it is added to.
* Inputs of the second feed-forward linear are scaled after the activation, from 2 medians on (they have no shift:
  their lower end is the activation's own). A neuron with ``s > 1.6`` is repeated ``ceil(s / 1.3)`` times, each copy
  with its share of the weight: a column scaled up as a whole would set the scale of all 8-bit weights of its output
  channels. Where that would add more than an eighth of the neurons (half of them are all but silent, and what is
  ordinary is an outlier), only greater outliers count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.adjust import Adjustment, IntArray, NormAdjustment
from compress.contracts import Checkpoint, Encoder, FloatArray, Junction, Linear
from compress.planning import Fate, Plan
from compress.reading import read_whole

#: Ranges up to this many medians are left alone: of the residual stream, and of a feed-forward's inner neurons.
STREAM_THRESHOLD, INNER_THRESHOLD = 1.5, 2.0
#: Neurons scaled by more are repeated, so that no copy's weight grows by more than ``SHARE``.
REPEAT_FROM, SHARE = 1.6, 1.3
#: Neurons that may be added, as a share of those there are; all-MiniLM-L6-v2 gets 1.7 % at most.
GROWTH = 0.125
#: No channel is scaled by more: beyond, the others are silent and not the channel large.
MOST = 1024.0


@dataclass(frozen=True)
class ChannelStatistics:
    """A linear's input channels on calibration texts, float32 ``[K]`` each.

    Attributes:
        low: Their least values.
        high: Their greatest values.
        peak: The greatest magnitude of the weights that read them.
    """

    low: FloatArray
    high: FloatArray
    peak: FloatArray


#: By linear.
Statistics = Mapping[str, ChannelStatistics]


@dataclass(frozen=True)
class Smoothing:
    """A changed model that computes the same.

    Attributes:
        structure: With the sizes that linears have afterwards.
        linears: What becomes of linears, by name.
        norms: What becomes of norms, by graph name without ``.weight``.
        constants: What the graph itself needs, by planned name: vectors to multiply and to add, fixed ranges.
    """

    structure: Encoder
    linears: Mapping[str, Adjustment] = field(default_factory=dict)
    norms: Mapping[str, NormAdjustment] = field(default_factory=dict)
    constants: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


def scale_name(name: str) -> str:
    """Return the planned name of what a linear's or a junction's value is multiplied by."""
    return f"{name}.input_scale"


def shift_name(name: str) -> str:
    """Return the planned name of what a junction's value lacks where nothing else makes up for it."""
    return f"{name}.input_shift"


def constant_shapes(encoder: Encoder) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the planned vectors' types and shapes before any neuron is repeated."""
    sizes: dict[str, int] = {}
    for junction in encoder.junctions:
        sizes[scale_name(junction.name)] = encoder.hidden_size
        if junction.last:
            sizes[shift_name(junction.name)] = encoder.hidden_size
    for linear in encoder.linears:
        if linear.role == "down":
            sizes[scale_name(linear.name)] = linear.in_features
    return {name: ("float32", (size,)) for name, size in sizes.items()}


def smooth(encoder: Encoder, statistics: Statistics) -> Smoothing:
    """Choose scales, shifts, repetitions and the order of neurons from what calibration texts gave."""
    linears: dict[str, Adjustment] = {}
    norms: dict[str, NormAdjustment] = {}
    constants: dict[str, FloatArray] = {}
    for junction in encoder.junctions:
        scale, shift = _channels(junction, statistics)
        constants[scale_name(junction.name)] = scale
        if junction.last:  # whoever reads the model's output knows nothing of a shift
            constants[shift_name(junction.name)] = shift
        norms |= dict.fromkeys(junction.norms, NormAdjustment(scale, shift))
        for name in junction.readers:
            linears[name] = replace(linears.get(name, Adjustment()), column_scale=scale, shift=shift)
        for name in junction.producers:
            linears[name] = replace(
                linears.get(name, Adjustment()), row_scale=np.float32(1) / scale, offset=-shift / scale
            )
        for name in junction.added:
            linears[name] = replace(linears.get(name, Adjustment()), offset=shift)
    sizes: dict[str, Linear] = {linear.name: linear for linear in encoder.linears}
    for up, down in _feed_forwards(encoder):
        columns, share, inverse = repeat_outliers(statistics[down.name])
        constants[scale_name(down.name)] = inverse
        linears[up.name] = replace(linears.get(up.name, Adjustment()), rows=columns)
        linears[down.name] = replace(linears.get(down.name, Adjustment()), columns=columns, column_scale=share)
        sizes[up.name] = replace(up, out_features=len(columns))
        sizes[down.name] = replace(down, in_features=len(columns))
    structure = replace(encoder, linears=tuple(sizes[linear.name] for linear in encoder.linears))
    return Smoothing(structure, linears, norms, constants)


def changes(smoothing: Smoothing, name: str) -> bool:
    """Return whether a planned weight is not what the checkpoint has."""
    stem = name.removesuffix(".bias").removesuffix(".weight")
    changed = smoothing.linears.keys() | smoothing.norms.keys()
    return name in changed or stem in changed


def changed_rows(smoothing: Smoothing, plan: Plan, checkpoint: Checkpoint, fate: Fate) -> FloatArray:
    """Return all rows of a changed weight, bias or norm as they are stored.

    Raises:
        SourceError: A value of the source is NaN or infinite.
    """
    name = fate.name
    if name in smoothing.linears:
        return smoothing.linears[name].weight(read_whole(checkpoint, fate.reads))
    stem, _, kind = name.rpartition(".")
    source = read_whole(checkpoint, fate.reads)
    if stem in smoothing.norms:
        norm = smoothing.norms[stem]
        return norm.weight(source) if kind == "weight" else norm.bias(source)
    return smoothing.linears[stem].bias(source, read_whole(checkpoint, plan.by_name[stem].reads))


def outlier_scale(extent: FloatArray, threshold: float) -> FloatArray:
    """Return float32 ``[K]``: 1 up to ``threshold`` medians, what brings a channel down to that beyond."""
    usual = threshold * float(np.median(extent))
    if usual <= 0:
        return np.ones_like(extent)
    scale: FloatArray = np.clip(extent.astype(np.float64) / usual, 1, MOST).astype(np.float32)
    return scale


def repeat_outliers(inner: ChannelStatistics) -> tuple[IntArray, FloatArray, FloatArray]:
    """Return how a feed-forward's inner neurons are stored.

    Their order is free, and chosen so that of two neighbours one has small weights: the sum of both then leaves every
    weight its 8 bits (:mod:`compress.quantize.integer`).

    Returns:
        Which neuron every stored one is, int64 ``[K']``; the factor of its column in the second linear; the factor of
        its value before that, both float32 ``[K']``.
    """
    extent = np.maximum(np.abs(inner.low), np.abs(inner.high))
    threshold = INNER_THRESHOLD
    scale, copies = _copies(extent, threshold)
    while copies.sum() > (1 + GROWTH) * len(extent):
        threshold *= 1.25
        scale, copies = _copies(extent, threshold)
    own = np.arange(len(scale), dtype=np.int64)
    columns = np.concatenate([own, np.repeat(own, copies - 1)])
    by_weight = np.argsort(-(inner.peak * scale / copies)[columns], kind="stable")
    half = len(columns) // 2
    order = np.empty_like(by_weight)
    order[0::2], order[1::2] = by_weight[: len(columns) - half], by_weight[::-1][:half]
    columns = columns[order]
    share = (scale / copies)[columns].astype(np.float32)
    return columns, share, (1 / scale)[columns].astype(np.float32)


def _copies(extent: FloatArray, threshold: float) -> tuple[FloatArray, IntArray]:
    scale = outlier_scale(extent, threshold)
    return scale, np.where(scale > REPEAT_FROM, np.ceil(scale / SHARE), 1).astype(np.int64)


def _channels(junction: Junction, statistics: Statistics) -> tuple[FloatArray, FloatArray]:
    found = statistics[junction.readers[0]]
    low, high = found.low, found.high
    half = np.float32(0.5)
    return outlier_scale((high - low) * half, STREAM_THRESHOLD), (high + low) * half


def _feed_forwards(encoder: Encoder) -> list[tuple[Linear, Linear]]:
    ups = {linear.layer: linear for linear in encoder.linears if linear.role == "up"}
    return [(ups[linear.layer], linear) for linear in encoder.linears if linear.role == "down"]
