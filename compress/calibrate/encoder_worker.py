"""The worker that runs an encoder on calibration texts: ``python -m compress.calibrate.encoder_worker``.

Request (see ``validate.protocol``): ``checkpoint`` {reference, adapter, revision, task}, ``texts`` (an ``.npz`` of
:class:`compress.validate.encoded.Encoded`), ``linears`` {name: parameter}, ``memory_cap``, ``threads``, ``output``
(``.npz``). Of every linear it writes, all float32:

- ``<name>/low``, ``<name>/high`` ``[K]``: the least and the greatest value of every input channel;
- ``<name>/mean`` ``[K]``, ``<name>/moments`` ``[K, K]``: mean and second moments of the inputs, over tokens;
- ``<name>/peak`` ``[K]``: the greatest magnitude of the weights that read a channel.

The whole model and the moments are in memory: encoders are small, and the plan counts both. One thread, so that sums do
not depend on how many there are.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.errors import CompressError
from compress.validate.encoded import Encoded, unpadded_batches
from compress.validate.protocol import Json, peak_rss_bytes, report_progress, serve

BATCH = 8


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


def handle(request: Json, job: Path) -> Json:
    """Load the model, run the texts, and write what its linears saw."""
    import torch

    from compress.source import open_checkpoint
    from compress.tasks import task_of
    from compress.validate.encoder_reference import Reference, load_model

    torch.set_num_threads(1)
    wanted = request["checkpoint"]
    adapter = wanted.get("adapter")
    with open_checkpoint(
        wanted["reference"],
        adapter=Path(adapter) if adapter else None,
        revision=wanted.get("revision"),
        task=wanted.get("task"),
    ) as checkpoint:
        model = load_model(checkpoint, request.get("memory_cap"))
        reference = Reference(model, task_of(checkpoint.config).name, "none", False)
    modules = dict(model.named_modules())
    observers: dict[str, Observer] = {}
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    for name, parameter in request["linears"].items():
        module = modules.get(parameter.removesuffix(".weight"))
        if module is None:
            raise CompressError("transformers' model lacks a linear layer that the family describes", where=parameter)
        observers[name] = Observer(module.in_features)
        arrays[f"{name}/peak"] = module.weight.detach().abs().amax(dim=0).numpy()
        module.register_forward_pre_hook(observers[name])
    texts = Encoded.load(request["texts"])
    batches = list(unpadded_batches(texts, BATCH))
    for index, batch in enumerate(batches):
        reference.forward(batch)
        report_progress(job, (index + 1) / len(batches))
    for name, observer in observers.items():
        found = observer.found()
        if not all(np.isfinite(array).all() for array in found.values()):
            raise CompressError("the model's hidden states are not finite on the calibration texts", where=name)
        arrays |= {f"{name}/{measure}": array for measure, array in found.items()}
    np.savez(request["output"], **arrays)  # type: ignore[arg-type]
    return {
        "results": [{"linears": len(observers), "texts": len(texts)}],
        "load_seconds": None,
        "peak_rss_bytes": peak_rss_bytes(),
        "placement": None,
    }


if __name__ == "__main__":
    sys.exit(serve(handle))
