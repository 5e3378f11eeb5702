"""The worker that watches a static graph's tensors: ``python -m compress.calibrate.activation_worker``.

Request (see ``validate.protocol``): ``model`` (a graph all of whose watched values are outputs), ``samples`` (``.npz``,
a row a sample, by input name), ``count`` (rows), ``groups`` [[names] fetched in one run]. It answers ``ranges`` {name:
[least, greatest]}, float32 numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from compress.errors import CompressError
from compress.validate.protocol import Json, peak_rss_bytes, report_progress, serve


def handle(request: Json, job: Path) -> Json:
    """Run every sample, a group of outputs at a time."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # Nothing may be fused: every value between nodes is one that the integer graph has.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = ort.InferenceSession(request["model"], options, providers=["CPUExecutionProvider"])
    ranges: dict[str, list[float]] = {}
    count = int(request["count"])
    with np.load(request["samples"]) as stored:
        samples = {name: stored[name] for name in stored.files}
    for index in range(count):
        feeds = {name: rows[index] for name, rows in samples.items()}
        for names in request["groups"]:
            for name, array in zip(names, session.run(names, feeds), strict=True):
                low, high = float(array.min()), float(array.max())
                if not np.isfinite([low, high]).all():
                    raise CompressError("a tensor is not finite on a calibration sample", where=name)
                known = ranges.setdefault(name, [low, high])
                ranges[name] = [min(known[0], low), max(known[1], high)]
        report_progress(job, (index + 1) / count)
    result: Json = {"ranges": ranges}
    return {"results": [result], "load_seconds": None, "peak_rss_bytes": peak_rss_bytes(), "placement": None}


if __name__ == "__main__":
    sys.exit(serve(handle))
