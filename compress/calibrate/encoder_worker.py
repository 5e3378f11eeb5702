"""The worker that runs an encoder on calibration texts: ``python -m compress.calibrate.encoder_worker``.

Request (see ``validate.protocol``): ``checkpoint`` {reference, adapter, revision, task}, ``texts`` (an ``.npz`` of
:class:`compress.validation.encoded.Encoded`), ``linears`` {name: [parameters]}, ``smoothing`` (bool), ``bits`` {name:
bits, of the linears that become integer products}, ``measure_losses`` (bool), ``static`` [names whose range is fixed],
``range`` (how it is chosen), ``memory_cap``, ``output`` (``.npz``). Of every linear it writes, float32:

- ``<name>/low``, ``<name>/high`` ``[K]``: the least and the greatest value of every input channel;
- ``<name>/mean`` ``[K]``, ``<name>/moments`` ``[K, K]``: mean and second moments of the inputs, over tokens;
- ``<name>/peak`` ``[K]``: the greatest magnitude of the weights that read a channel;
- ``<name>/range`` ``[2]``, float64: the chosen range of changed inputs, of ``static`` ones.

It answers ``losses`` {name: loss} (:mod:`compress.calibrate.sensitivity`). The whole model and the moments are in
memory: encoders are small, and the plan counts both. One thread, so that sums do not depend on how many there are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.adjust import Adjustment
from compress.calibrate.ranges import BINS, choose_range
from compress.calibrate.sensitivity import losses
from compress.calibrate.smoothing import ChannelStatistics, smooth
from compress.contracts import Encoder
from compress.errors import CompressError
from compress.graph.kept_heads import narrow
from compress.validation.encoded import Batch, Encoded, unpadded_batches
from compress.validation.protocol import Json, peak_rss_bytes, report_progress, serve

BATCH = 8
#: What losses are measured on, once for every linear: texts of nearly this length, so many tokens of them.
LOSS_LENGTH, LOSS_TOKENS = 40, 768

Progress = Callable[[float], None]


class Observer:
    """Keeps range, mean and second moments of the channels that pass by."""

    def __init__(self, columns: int) -> None:
        import torch

        self.low, self.high = torch.full((columns,), torch.inf), torch.full((columns,), -torch.inf)
        self.total, self.moments = torch.zeros(columns), torch.zeros(columns, columns)
        self.tokens = 0

    def __call__(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """Take note of a linear's inputs ``[..., K]``."""
        values = inputs[0].detach().flatten(0, -2)
        self.low = self.low.minimum(values.amin(dim=0))
        self.high = self.high.maximum(values.amax(dim=0))
        self.total += values.sum(dim=0)
        self.moments.addmm_(values.T, values)
        self.tokens += len(values)

    def found(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return what was seen, by the name of the measure."""
        count = max(self.tokens, 1)
        return {
            "low": self.low.numpy(),
            "high": self.high.numpy(),
            "mean": (self.total / count).numpy(),
            "moments": (self.moments / count).numpy(),
        }


class Histogram:
    """Counts the values of a linear's changed inputs."""

    def __init__(self, found: Mapping[str, npt.NDArray[np.float32]], change: Adjustment) -> None:
        self._change = change
        ends = [change.inputs(found[end]) for end in ("low", "high")]
        self.low, self.high = float(np.minimum(*ends).min()), float(np.maximum(*ends).max())
        self.counts = np.zeros(BINS, np.int64)

    def __call__(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """Take note of a linear's inputs ``[..., K]``."""
        values = self._change.inputs(inputs[0].detach().flatten(0, -2).numpy())
        self.counts += np.histogram(values, BINS, (self.low, self.high))[0]


@dataclass(frozen=True)
class _Run:
    """The source model, its linears by planned name, and the texts."""

    reference: Any
    linears: Mapping[str, tuple[Any, ...]]
    batches: Sequence[Batch]

    def watch(self, hooks: Mapping[str, Any], progress: Progress) -> None:
        """Run all texts while each linear's hook sees its inputs."""
        handles = [self.linears[name][0].register_forward_pre_hook(hook) for name, hook in hooks.items()]
        for index, batch in enumerate(self.batches):
            self.reference.forward(batch)
            progress((index + 1) / len(self.batches))
        for handle in handles:
            handle.remove()


def handle(request: Json, job: Path) -> Json:
    """Load the model, run the texts, and write what its linears saw."""
    import torch

    torch.set_num_threads(1)
    run, encoder = _open(request)
    observers = {name: Observer(parts[0].in_features) for name, parts in run.linears.items()}
    run.watch(observers, lambda fraction: report_progress(job, 0.4 * fraction))
    arrays: dict[str, npt.NDArray[Any]] = {}
    statistics: dict[str, ChannelStatistics] = {}
    for name, observer in observers.items():
        found = observer.found()
        if not all(np.isfinite(array).all() for array in found.values()):
            raise CompressError("the model's hidden states are not finite on the calibration texts", where=name)
        peak = np.max([part.weight.detach().abs().amax(dim=0).numpy() for part in run.linears[name]], axis=0)
        statistics[name] = ChannelStatistics(found["low"], found["high"], peak)
        arrays |= {f"{name}/{measure}": array for measure, array in {**found, "peak": peak}.items()}
    changes = smooth(encoder, statistics).linears if request["smoothing"] else {}
    result: Json = {"texts": sum(len(batch.texts) for batch in run.batches), "losses": {}}
    if request["measure_losses"]:
        result["losses"] = _losses(run, changes, request["bits"], job)
    static = {name: Histogram(_of(arrays, name), changes.get(name, Adjustment())) for name in request["static"]}
    if static:
        run.watch(static, lambda fraction: report_progress(job, 0.9 + 0.1 * fraction))
        for name, seen in static.items():
            chosen = choose_range(seen.counts, seen.low, seen.high, request["range"])
            arrays[f"{name}/range"] = np.array(chosen, np.float64)
    np.savez(request["output"], **arrays)  # type: ignore[arg-type]
    return {"results": [result], "load_seconds": None, "peak_rss_bytes": peak_rss_bytes(), "placement": None}


def _open(request: Json) -> tuple[_Run, Encoder]:
    from compress.families import load_family
    from compress.source import open_checkpoint
    from compress.tasks import task_of
    from compress.validation.encoder_reference import Reference, load_model

    wanted = request["checkpoint"]
    adapter = wanted.get("adapter")
    with open_checkpoint(
        wanted["reference"],
        adapter=Path(adapter) if adapter else None,
        revision=wanted.get("revision"),
        task=wanted.get("task"),
    ) as checkpoint:
        model = load_model(checkpoint, request.get("memory_cap"))
        encoder = load_family(checkpoint.config).describe(checkpoint.config, checkpoint.tensors())
        reference = Reference(model, task_of(checkpoint.config).name, "none", False)
    assert isinstance(encoder, Encoder)
    narrow(model, encoder)
    modules = dict(model.named_modules())
    linears: dict[str, tuple[Any, ...]] = {}
    for name, parameters in request["linears"].items():
        missing = next((item for item in parameters if item.removesuffix(".weight") not in modules), None)
        if missing is not None:
            raise CompressError("transformers' model lacks a linear layer that the family describes", where=missing)
        linears[name] = tuple(modules[item.removesuffix(".weight")] for item in parameters)
    return _Run(reference, linears, list(unpadded_batches(Encoded.load(request["texts"]), BATCH))), encoder


def _losses(run: _Run, changes: Mapping[str, Adjustment], bits: Mapping[str, int], job: Path) -> dict[str, float]:
    """Measure each linear's loss on a few batches of medium length."""
    middle: list[Batch] = []
    for batch in sorted(run.batches, key=lambda batch: abs(batch.ids.shape[1] - LOSS_LENGTH)):
        if sum(taken.ids.size for taken in middle) < LOSS_TOKENS:
            middle.append(batch)

    def outputs() -> npt.NDArray[np.float32]:
        return np.concatenate([run.reference.rows(batch) for batch in middle])

    linears = {name: run.linears[name] for name in bits}
    return losses(linears, changes, bits, outputs, lambda fraction: report_progress(job, 0.4 + 0.5 * fraction))


def _of(arrays: Mapping[str, npt.NDArray[Any]], name: str) -> dict[str, npt.NDArray[np.float32]]:
    return {end: arrays[f"{name}/{end}"] for end in ("low", "high")}


if __name__ == "__main__":
    sys.exit(serve(handle))
