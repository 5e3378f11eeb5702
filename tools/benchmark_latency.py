"""Predicted beside measured time of artifacts on this machine: ``benchmark_latency.py [CASE ...]``.

A case is ``MODEL PROFILE`` joined by a colon. MODEL is what ``compress export`` takes, or ``geometry/NAME``: random
weights of the shape that geometry.py and geometry_encoders.py know by that name, with sizes changed as in
``geometry/minilm,intermediate_size=768,num_hidden_layers=4``. Each is exported without validation; its graph and the
parts that its time is predicted from are run in turn, all of them in every round, so that a machine that slows down for
a while slows both sides of a ratio. The median of the rounds' ratios says how good the prediction is; that of the
measured times is for orientation.

With one thread the clock is the thread's own, which does not run while another process has the processor. What others
do to the caches and to the other half of a core counts all the same: a range far wider than its ratio's distance from 1
is a busy machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geometry
import geometry_encoders
import numpy as np
import onnxruntime as ort
from measured_export import machine

from compress import pipeline
from compress.contracts import Decoder
from compress.latency import Geometry, LatencyModel, Workload, geometry_of, standard_workloads
from compress.latency.graphs import Noise
from compress.latency.model import points_of
from compress.latency.parts import Point
from compress.latency.store import Store
from compress.latency.worker import QUANTILE, Run, timed
from compress.profile import load_profile
from compress.progress import Stages
from compress.validation.decoding import CachedDecoder
from compress.validation.encoding import Encoder, random_batch

PRUNED = "geometry/minilm,intermediate_size=768,num_hidden_layers=4"
CASES = (
    "minilm:float",
    "minilm:x86-int8",
    f"{PRUNED}:float",
    f"{PRUNED}:x86-int8",
    "geometry/distilbert:x86-int8",
    "smollm2:float",
    "smollm2:x86-int4",
    "smollm2:x86-int4-mixed",
    "smollm2:x86-int8",
    "smollm2:arm-int4",
    "geometry/gpt2:float",
    "geometry/gpt2:x86-int4",
    "geometry/tinyllama,num_hidden_layers=4:x86-int4",
    "geometry/tinyllama,num_hidden_layers=4:arm-int4",
    "geometry/phi-3,num_hidden_layers=2:arm-int4",
)


@dataclass(frozen=True)
class Row:
    """Times of one artifact under one workload: seconds a run, round by round."""

    case: str
    workload: str
    predicted: list[float]
    measured: list[float]

    @property
    def ratios(self) -> list[float]:
        """Predicted over measured, of each round."""
        return [one / other for one, other in zip(self.predicted, self.measured, strict=True)]


class Rounds(Store):
    """A cache that is none: every round measures everything."""

    def read(self) -> dict[str, float]:
        return {}

    def add(self, points: Any) -> None:
        del points


def resolve(model: str, place: Path) -> str:
    """Return a model reference; a geometry is written into ``place`` first."""
    if not model.startswith("geometry/"):
        return model
    name, *changes = model.removeprefix("geometry/").split(",")
    module = geometry if name in geometry.CONFIGS else geometry_encoders
    if name not in module.CONFIGS:
        raise SystemExit(f"no geometry is named {name!r}: {', '.join([*geometry.CONFIGS, *geometry_encoders.CONFIGS])}")
    kept = dict(module.CONFIGS[name])
    for change in changes:
        key, _, value = change.partition("=")
        if key not in kept or not value.isdecimal():
            raise SystemExit(f"{change!r} changes no size of {name}")
        module.CONFIGS[name][key] = int(value)
    out = place / "checkpoint"
    try:
        module.write(name, out, dtype="f32")
    finally:
        module.CONFIGS[name] = kept
    return str(out)


def export(reference: str, profile: str, place: Path, threads: int) -> tuple[Path, Geometry, bool]:
    """Return the graph of an artifact, what its time is predicted from, and whether it is a decoder's."""
    recipe = load_profile(profile)
    model = pipeline.ModelReference(reference)
    with model.open() as checkpoint:
        structure = pipeline.describe(checkpoint)
    output = place / "artifact"
    made = pipeline.export(model, recipe, output, pipeline.ExportOptions(validate=False, threads=threads), Stages())
    # What calibration kept in float32 is known only now.
    whole = [item["name"] for item in made.manifest["tensors"] if item["storage"] == "float32"]
    return output / "model.onnx", geometry_of(structure, recipe, keep_float=whole), isinstance(structure, Decoder)


class Whole:
    """The artifact's own graph, run as validation runs it."""

    def __init__(self, model: Path, workload: Workload, vocabulary: int, threads: int, *, decoder: bool) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._workload, self._decoder = workload, CachedDecoder(session) if decoder else None
        if self._decoder is None:
            self._encoder, self._batch = Encoder(session), random_batch(workload.batch, workload.tokens, vocabulary)
            return
        ids = np.random.default_rng(0).integers(0, vocabulary, (workload.batch, workload.tokens), dtype=np.int64)
        self._ids = ids
        if workload.past:
            past = np.random.default_rng(1).integers(0, vocabulary, (workload.batch, workload.past), dtype=np.int64)
            self._decoder.feed(past, keep=1)

    def run(self) -> None:
        """Run it once, always after as many tokens."""
        if self._decoder is None:
            self._encoder.run(self._batch, self._encoder.outputs)
            return
        kept = self._decoder._cache, self._decoder.length
        self._decoder.feed(self._ids, keep=1)
        self._decoder._cache, self._decoder.length = kept


def rounds_of(case: str, place: Path, options: argparse.Namespace) -> list[Row]:
    """Export a case and measure it under each workload."""
    reference, _, profile = case.rpartition(":")
    graph, shape, decoder = export(resolve(reference, place), profile, place, options.threads)
    vocabulary = shape.head.outputs if shape.head is not None else 1000
    rows = []
    for name, workload in standard_workloads(decoder=decoder).items():
        whole = Whole(graph, workload, vocabulary, options.threads, decoder=decoder)
        noise = Noise()
        runs = [Run(point, noise, options.threads) for point in points_of(shape, workload)]
        row = Row(case, name, [], [])
        for _ in range(options.rounds):
            before = [_quantile(timed(run.run, options.seconds / 2, options.threads, run.evict)) for run in runs]
            row.measured.append(_quantile(timed(whole.run, options.seconds, options.threads)))
            after = [_quantile(timed(run.run, options.seconds / 2, options.threads, run.evict)) for run in runs]
            times = [(one + other) / 2 for one, other in zip(before, after, strict=True)]
            row.predicted.append(_sum(shape, workload, times, options.threads))
        rows.append(row)
    return rows


def _sum(shape: Geometry, workload: Workload, times: list[float], threads: int) -> float:
    """Return the prediction that a round's times of the points give."""

    def given(points: list[Point], threads: int, progress: Any) -> list[float]:
        del threads, progress
        assert points == points_of(shape, workload)
        return times

    return LatencyModel(threads, measure=given, store=Rounds(threads)).seconds(shape, workload)


def _quantile(seconds: list[float]) -> float:
    return float(np.quantile(seconds, QUANTILE))


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = ["| model, profile | run | measured, ms | predicted, ms | ratio | range |", "|---|---|---|---|---|---|"]
    for row in rows:
        measured, predicted = (1000 * float(np.median(times)) for times in (row.measured, row.predicted))
        ratio, low, high = float(np.median(row.ratios)), min(row.ratios), max(row.ratios)
        cells = [row.case, row.workload, f"{measured:.2f}", f"{predicted:.2f}", f"{ratio:.2f}", f"{low:.2f}-{high:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="MODEL:PROFILE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.4, help="of each run in a round")
    options = parser.parse_args()
    rows: list[Row] = []
    begin, described = time.monotonic(), machine()
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            rows += rounds_of(case, Path(folder), options)
        print(table(rows[-2:]), file=sys.stderr)
    print(table(rows))
    minutes = (time.monotonic() - begin) / 60
    print(f"\n{options.threads} threads, {options.rounds} rounds, {minutes:.0f} minutes in all", end="; ")
    print(f"onnxruntime {ort.__version__}; {described}")


if __name__ == "__main__":
    main()
