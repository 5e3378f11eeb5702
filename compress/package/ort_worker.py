"""The worker that writes ONNX Runtime's own format: ``python -m compress.package.ort_worker``.

Request (see ``validation.protocol``): ``model``, a graph file, and ``folder``, where ``model.ort`` and its list of
operators go. Both are then run on the same short input; the answer says how far their outputs are apart (``worst``), in
which one (``output``), and how large outputs are (``largest``).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import CompressError
from compress.package.ort import NAME, OPERATORS_NAME
from compress.validation.protocol import Json, peak_rss_bytes, serve
from compress.validation.worker import versions

#: Tokens of the input that both are run on.
_LENGTH = 8
_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
}


def handle(request: Json, job: Path) -> Json:
    """Convert and compare."""
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    model, folder = Path(request["model"]), Path(request["folder"])
    start = time.perf_counter()
    try:
        convert_onnx_models_to_ort(
            model, folder, [OptimizationStyle.Fixed], target_platform="arm", enable_type_reduction=True
        )
    except Exception as error:  # onnxruntime raises a dozen classes that share only Exception, the tool two more
        raise CompressError(
            f"onnxruntime cannot write the graph in its own format: {str(error).splitlines()[0]}", where=model.name
        ) from error
    (folder / f"{model.stem}.{OPERATORS_NAME}").rename(folder / OPERATORS_NAME)
    seconds = time.perf_counter() - start
    own, given = _run(folder / NAME), _run(model)
    if own.keys() != given.keys():
        raise CompressError("the graph in onnxruntime's own format has other outputs", where=model.name)
    worst = {name: float(np.abs(own[name].astype(np.float64) - given[name]).max()) for name in given}
    name = max(worst, key=lambda key: worst[key])
    largest = float(max(np.abs(value).max() for value in given.values()))
    return {
        "results": [{"worst": worst[name], "output": name, "largest": largest}],
        "load_seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
        "placement": None,
        "versions": versions(),
    }


def _run(model: Path) -> dict[str, NDArray[Any]]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    feeds = {value.name: _input(value) for value in session.get_inputs()}
    return dict(zip(names, session.run(names, feeds), strict=True))


def _input(value: Any) -> NDArray[Any]:  # noqa: ANN401 - onnxruntime's NodeArg
    """Return an input of one sequence: tokens in a row, nothing masked, an empty cache."""
    past = value.name.startswith("past_key_values")
    shape = [size if isinstance(size, int) else 1 for size in value.shape]
    shape[2 if past else 1] = 0 if past else _LENGTH
    made = np.zeros(shape, _TYPES[value.type])
    if value.name in ("input_ids", "position_ids"):
        made[:] = np.arange(_LENGTH)
    elif value.name == "attention_mask":
        made[:] = 1
    return made


if __name__ == "__main__":
    sys.exit(serve(handle))
