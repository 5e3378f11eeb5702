"""Channel scales folded into a block: ``W x = (W diag(s)) (x / s)``, with ``1 / s`` in what produces ``x``.

A norm's weight (and bias) is divided, or the rows of the linear before: exact by construction, and no operator is
added. Which producers there are is the family's to say (:class:`compress.contracts.Fold`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from compress.calibrate.blocks import Block, BlockLinear, Workers, statistics
from compress.contracts import ChannelScaler, Decoder, FloatArray, Fold
from compress.planning import Plan


def fold_channels(block: Block, plan: Plan, scaler: ChannelScaler, workers: Workers) -> dict[str, FloatArray]:
    """Rescale the inputs of every linear of a block that can be, in the order of the block.

    Returns:
        The vectors that changed (norms, biases), float32, by planned name: they are stored instead of the source's.
    """
    linears = {linear.name: linear for linear in block.linears}
    changed: dict[str, FloatArray] = {}
    assert isinstance(plan.structure, Decoder)
    for fold in plan.structure.folds:
        reader = linears.get(fold.reader)
        if reader is None:
            continue
        scheme = plan.by_name[reader.name].scheme
        if scheme is None or scheme.activations != "none":
            continue
        if fold.producer and plan.by_name[fold.producer].scheme is None:
            continue  # its weight is not stored from here, but as the source has it
        found = statistics(reader.name, block.inputs(reader), workers)
        shared = sharing(fold, reader.linear.in_features)
        scales = scaler.channel_scales(reader.weight(), scheme, found, shared=shared, scale_format=plan.scale_format)
        if (scales == 1).all():
            continue
        reader.set_weight(reader.weight() * scales)
        if fold.vectors:
            for name in fold.vectors:
                vector = next(vector for vector in plan.structure.vectors if vector.graph_name == name)
                values = block.parameter(vector.source.tensor)
                values.div_(torch.from_numpy(scales))
                changed[name] = values.numpy().copy()
        else:
            _divide_producer(linears[fold.producer], fold, scales, shared, changed)
    return changed


def _divide_producer(
    producer: BlockLinear,
    fold: Fold,
    scales: FloatArray,
    shared: npt.NDArray[np.int64] | None,
    changed: dict[str, FloatArray],
) -> None:
    rows = scales
    if shared is not None:  # each row is read by several channels, all with its scale
        rows = np.empty(int(shared.max()) + 1, np.float32)
        rows[shared] = scales
    producer.divide_rows(fold.start, rows)
    bias = producer.bias()
    if bias is not None:
        changed[f"{producer.name}.bias"] = bias


def sharing(fold: Fold, channels: int) -> npt.NDArray[np.int64] | None:
    """Return the producer's row (from ``start`` on) of every channel ``[K]``, ``None`` where each has its own."""
    if fold.group == 1:
        return None
    channel = np.arange(channels, dtype=np.int64)
    return channel // (fold.group * fold.head_dim) * fold.head_dim + channel % fold.head_dim
