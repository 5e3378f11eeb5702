"""The worker that watches a static graph's tensors: ``python -m compress.calibrate.activation_worker``.

Request (see ``validate.protocol``): ``model`` (a graph whose outputs are three numbers a watched value: its least, its
greatest, and 0 or NaN if it is not finite), ``values`` [name], ``samples`` (``.npz``, a row a sample, by input name),
``count`` (rows). It answers ``ranges`` {name: [least, greatest]}, float32 numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from compress.errors import CompressError
from compress.validation.protocol import Json, peak_rss_bytes, report_progress, serve


def handle(request: Json, job: Path) -> Json:
    """Run every sample."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # Memory is what is in use: by default the numbers of all tensors are computed last, which keeps all tensors, an
    # arena grows by powers of two, and beside it a pattern reserves all that a run takes.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    # Nothing may be fused: every value between nodes is one that the integer graph has.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(request["model"], options, providers=["CPUExecutionProvider"])
    names, count = request["values"], int(request["count"])
    least, greatest = np.full(len(names), np.inf, np.float32), np.full(len(names), -np.inf, np.float32)
    with np.load(request["samples"]) as stored:
        samples = {name: stored[name] for name in stored.files}
    for index in range(count):
        found = session.run(None, {name: rows[index] for name, rows in samples.items()})
        numbers = np.array(found, np.float32).reshape(len(names), 3)
        wrong = np.flatnonzero(~np.isfinite(numbers).all(axis=1))
        if len(wrong):
            raise CompressError("a tensor is not finite on a calibration sample", where=names[wrong[0]])
        np.minimum(least, numbers[:, 0], out=least)
        np.maximum(greatest, numbers[:, 1], out=greatest)
        report_progress(job, (index + 1) / count)
    ranges = {name: [float(low), float(high)] for name, low, high in zip(names, least, greatest, strict=True)}
    result: Json = {"ranges": ranges}
    return {"results": [result], "load_seconds": None, "peak_rss_bytes": peak_rss_bytes(), "placement": None}


if __name__ == "__main__":
    sys.exit(serve(handle))
