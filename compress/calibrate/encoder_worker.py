"""The worker that runs an encoder on calibration texts: ``python -m compress.calibrate.encoder_worker``.

Request (see ``validate.protocol``): ``checkpoint`` {reference, adapter, revision, task}, ``texts`` (an ``.npz`` of
:class:`compress.validate.encoded.Encoded`), ``linears`` {name: parameter}, ``memory_cap``, ``threads``, ``output``
(``.npz``). It writes ``<name>/low`` and ``<name>/high``, float32 ``[K]``: the least and the greatest value of every
input channel of every linear. The whole model is in memory: encoders are small, and the plan counts it.
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


class RangeObserver:
    """Keeps the least and the greatest value of every channel that passes by."""

    def __init__(self) -> None:
        self.low: npt.NDArray[np.float32] | None = None
        self.high: npt.NDArray[np.float32] | None = None

    def __call__(self, module: Any, inputs: tuple[Any, ...]) -> None:
        """Take note of a linear's inputs ``[..., K]``."""
        values = inputs[0].detach().flatten(0, -2)
        low, high = values.amin(dim=0).numpy(), values.amax(dim=0).numpy()
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)


def handle(request: Json, job: Path) -> Json:
    """Load the model, run the texts, and write what its linears saw."""
    import torch

    from compress.source import open_checkpoint
    from compress.tasks import task_of
    from compress.validate.encoder_reference import Reference, load_model

    torch.set_num_threads(int(request["threads"]))
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
    observers: dict[str, RangeObserver] = {}
    for name, parameter in request["linears"].items():
        module = modules.get(parameter.removesuffix(".weight"))
        if module is None:
            raise CompressError("transformers' model lacks a linear layer that the family describes", where=parameter)
        observers[name] = RangeObserver()
        module.register_forward_pre_hook(observers[name])
    texts = Encoded.load(request["texts"])
    batches = list(unpadded_batches(texts, BATCH))
    for index, batch in enumerate(batches):
        reference.forward(batch)
        report_progress(job, (index + 1) / len(batches))
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    for name, observer in observers.items():
        if observer.low is None or observer.high is None:
            raise CompressError("the calibration texts never reached a linear layer", where=name)
        if not (np.isfinite(observer.low).all() and np.isfinite(observer.high).all()):
            raise CompressError("the model's hidden states are not finite on the calibration texts", where=name)
        arrays[f"{name}/low"], arrays[f"{name}/high"] = observer.low, observer.high
    np.savez(request["output"], **arrays)  # type: ignore[arg-type]
    return {
        "results": [{"linears": len(observers), "texts": len(texts)}],
        "load_seconds": None,
        "peak_rss_bytes": peak_rss_bytes(),
        "placement": None,
    }


if __name__ == "__main__":
    sys.exit(serve(handle))
