"""The worker that compiles for Qualcomm's NPU: ``python -m compress.package.qnn_context_worker``.

Request (see ``validate.protocol``): ``action``, ``model``, ``soc`` (a chip's name), ``output``;

- ``compile``: writes the EPContext graph ``output`` and its binary beside it; answers the ``seconds`` it took;
- ``run``: runs ``samples`` (``.npz``, a sample a row by input name) and writes the outputs, ``.npz`` by output name;
  on the CPU where ``provider`` is ``cpu``, to compare with.

Nothing may fall back to the CPU. This runs in the Python that has QNN: NumPy and onnxruntime only.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from compress.errors import ProviderError
from compress.package.qnn_metadata import add_metadata
from compress.providers import cpu
from compress.providers._base import first_line
from compress.providers._session import session_options
from compress.providers.qnn import PROVIDER, SOC_KEY, soc_model
from compress.validation.protocol import Json, peak_rss_bytes, serve
from compress.validation.worker import versions

_OPTIONS = {"session.disable_cpu_ep_fallback": "1"}


def handle(request: Json, job: Path) -> Json:
    """Compile or run."""
    usable, reason = PROVIDER.available()
    if not usable:
        raise ProviderError("the qnn provider does not work here", hint=reason)
    action = {"compile": _compile, "run": _run}[request["action"]]
    result, load_seconds = action(request)
    return {
        "results": [result],
        "load_seconds": load_seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "placement": None,
        "versions": {**versions(), "provider": reason},
    }


def _compile(request: Json) -> tuple[Json, float | None]:
    import onnxruntime as ort

    options = session_options(_OPTIONS, 1)
    options.add_provider_for_devices(
        PROVIDER.devices(), {**PROVIDER.defaults(), "soc_model": soc_model(request["soc"])}
    )
    output = Path(request["output"])
    start = time.perf_counter()
    try:
        ort.ModelCompiler(options, request["model"], embed_compiled_data_into_model=False).compile_to_file(str(output))
    except Exception as error:  # onnxruntime raises a dozen classes that share only Exception
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise ProviderError(f"HTP cannot compile the graph: {first_line(error)}", where=request["model"]) from error
    seconds = time.perf_counter() - start
    add_metadata(output, SOC_KEY, request["soc"])
    return {"seconds": seconds, "files": sorted(path.name for path in output.parent.iterdir())}, None


def _run(request: Json) -> tuple[Json, float | None]:
    start = time.perf_counter()
    model = Path(request["model"])
    if request.get("provider") == cpu.PROVIDER.name:
        session = cpu.PROVIDER.session(model, {}, 1)
    else:
        session = PROVIDER.session(model, _OPTIONS, 1, {"soc_model": request["soc"]})
    load_seconds = time.perf_counter() - start
    names = [output.name for output in session.get_outputs()]
    with np.load(request["samples"]) as stored:
        samples = {name: stored[name] for name in stored.files}
    count = len(next(iter(samples.values())))
    rows = [session.run(names, {name: array[row] for name, array in samples.items()}) for row in range(count)]
    outputs = {name: np.stack(parts) for name, parts in zip(names, zip(*rows, strict=True), strict=True)}
    np.savez(request["output"], **outputs)  # type: ignore[arg-type]
    return {"samples": count}, load_seconds


if __name__ == "__main__":
    sys.exit(serve(handle))
