"""The worker that calibrates a decoder block by block: ``python -m compress.calibrate.decoder_worker``.

Request (see ``validate.protocol``): ``checkpoint`` {reference, adapter, revision, task}, ``profile`` (resolved),
``schemes`` {weight: [bits, block size, symmetric]} that go before the profile's, ``windows`` (.npy int64 ``[windows,
length]``), ``workers`` (threads), and ``job``:

- ``sensitivity``: ``options`` {weight: [schemes]}, ``seed``, ``tokens``, ``work`` (a directory), ``token_weights``
  (.npz) -> ``losses`` {weight: [nats a token, in the order of the schemes]}; how much each token matters to each linear
  is written to ``token_weights`` (:mod:`compress.calibrate.fisher`);
- ``quantize``: ``data`` (the data file, its space claimed), ``inline`` (.npz), ``token_weights`` (.npz or null: every
  token counts the same), ``state`` (a file that says after every block how far it is, to go on from; or null) ->
  ``written`` [names of the tensors that are in the data file or, the small ones, in ``inline``], ``errors`` {linear:
  share of its outputs' power}, ``stored_errors`` {weight: its relative error}.

In memory are one block, the hidden states of the calibration tokens, and the inputs of one linear with their second
moments. Sums are made by one thread each, over pieces that do not depend on how many threads there are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress import rotation
from compress.allocator import keep_buffers
from compress.calibrate import cache_ranges
from compress.calibrate.blocks import Block, BlockLinear, Workers, require_finite, statistics
from compress.calibrate.fold import fold_channels
from compress.calibrate.tune import tune_scales
from compress.contracts import (
    BlockLearner,
    ChannelScaler,
    Checkpoint,
    Decoder,
    FloatArray,
    InputStatistics,
    QuantizedRows,
    Quantizer,
    Scheme,
)
from compress.errors import CompressError
from compress.families import load_family
from compress.package.writer import DataFile
from compress.planning import CACHE_SCALES, Fate, Plan, make_plan
from compress.profile import Profile, parse_profile
from compress.quantize import load_quantizer
from compress.reading import CHUNK_WEIGHTS, read_rows
from compress.rotation.modules import rotate_inputs
from compress.rotation.structure import HEAD_ROTATION
from compress.state_file import read_arrays, write_arrays
from compress.store import Store, compared, restored
from compress.validation.protocol import Json, peak_rss_bytes, report_progress, serve
from compress.validation.streaming import Call, StreamedModel

#: Rows of a weight that one thread quantizes at a time.
ROWS = 512
#: Rows, evenly spaced, that a linear's error is noted of.
_ERROR_ROWS = 256
#: Buffers to keep: larger ones are of many sizes here, and holes between them took 0.3 of 2.9 GB at Phi-3's geometry.
_KEPT_BYTES = 32 << 20
#: Part of the work that the blocks are; the rest is the head.
_BLOCKS_SHARE = 0.95


class Calibration:
    """What every job needs: the source, its plan, the windows, and threads."""

    def __init__(self, request: Json) -> None:
        from compress.source import open_checkpoint

        wanted = request["checkpoint"]
        adapter = wanted.get("adapter")
        self.checkpoint: Checkpoint = open_checkpoint(
            wanted["reference"],
            adapter=Path(adapter) if adapter else None,
            revision=wanted.get("revision"),
            task=wanted.get("task"),
        )
        self.profile: Profile = parse_profile(request["profile"], where="the request")
        structure = load_family(self.checkpoint.config).describe(self.checkpoint.config, self.checkpoint.tensors())
        self.checkpoint, structure = rotation.applied(self.checkpoint, structure, self.profile)
        assert isinstance(structure, Decoder)
        self.decoder = structure
        schemes = {name: Scheme(*values) for name, values in request["schemes"].items()}
        self.plan: Plan = make_plan(structure, self.profile, self.checkpoint, schemes=schemes)
        self.windows = np.load(request["windows"])
        self.model = StreamedModel(self.checkpoint)
        rotate_inputs(self.model, structure)
        self.workers = Workers(int(request["workers"]))

    def head(self) -> Fate:
        """Return the weight that the head multiplies by."""
        tied = next((fate for fate in self.plan.fates if fate.tied), None)
        return tied or next(fate for fate in self.plan.fates if fate.role == "head")


class Quantization:
    """The ``quantize`` job: every block's linears, then the head."""

    def __init__(
        self,
        calibration: Calibration,
        data: DataFile,
        token_weights: Mapping[str, FloatArray],
        progress: Callable[[float], None],
        state: Path | None = None,
    ) -> None:
        self.given, self.token_weights, self.progress = calibration, token_weights, progress
        self._data, self._state = data, state
        self.quantizer: Quantizer = load_quantizer(calibration.profile.quantize.quantizer)
        self.store = Store(calibration.plan, data)
        self.errors: dict[str, float] = {}
        self.written: list[str] = []

    def run(self) -> None:
        """Quantize and store everything whose inputs calibration shows."""
        hidden = self.given.model.visit_blocks(self.given.windows, self._visit, known=self._restore())
        inputs = np.ascontiguousarray(hidden.flatten(0, -2).numpy())
        self._head(inputs)
        self.progress(1.0)

    def _visit(self, index: int, layer: torch.nn.Module, call: Call, hidden: torch.Tensor) -> torch.Tensor:
        given = self.given
        block = Block(given.model, given.decoder, index, layer, call, hidden, given.workers)
        wanted = [linear for linear in block.linears if given.plan.by_name[linear.name].scheme is not None]
        if isinstance(self.quantizer, ChannelScaler):
            self._fold(block)
        fates = given.plan.by_name
        before = {linear.name: compared(fates[linear.name], 0, linear.weight()) for linear in wanted}
        results = self._results(block, wanted)
        for linear in wanted:
            self.store.quantized(fates[linear.name], 0, results[linear.name], before[linear.name])
            self.written.append(linear.name)
        result = self._outputs(block)
        self._save(index + 1, result)
        self.progress(_BLOCKS_SHARE * (index + 1) / given.decoder.layers)
        return result

    def _outputs(self, block: Block) -> torch.Tensor:
        """Return what a block gives now; where its cache is kept in bytes, store what they are scaled by."""
        given = self.given
        if given.plan.cache_type == "float":
            return block.outputs()
        with cache_ranges.watched(block.layer, given.decoder) as ranges:
            result = block.outputs()
        found = ranges.scales(given.decoder.kv_heads, where=f"block {block.index}")
        for name, scales in zip(CACHE_SCALES, found, strict=True):
            fate = given.plan.by_name[name.format(block.index)]
            self.store.constant(fate.stored[0], scales)
            self.written.append(fate.name)
        return result

    def _save(self, done: int, hidden: torch.Tensor) -> None:
        """Keep how far it is: what was written is on the disk before anything says so."""
        if self._state is None:
            return
        self._data.sync()
        rows = {name: self.store.errors.rows(name) for name in self.store.errors.names()}
        told = {"done": done, "written": self.written, "errors": self.errors, "stored_errors": rows}
        arrays = {f"inline/{name}": array for name, array in self.store.inline.items()}
        write_arrays(self._state, {"hidden": hidden.numpy(), **arrays}, told)

    def _restore(self) -> tuple[int, torch.Tensor] | None:
        """Take up what an earlier run kept; return how many blocks are done, and the outputs of the last."""
        if self._state is None or not self._state.is_file():
            return None
        try:
            arrays, told = read_arrays(self._state)
        except ValueError:  # damaged: the blocks are done again
            return None
        self.written, self.errors = list(told["written"]), dict(told["errors"])
        self.store.errors.restore(told["stored_errors"])
        self.store.inline.update(
            {name.removeprefix("inline/"): array for name, array in arrays.items() if name.startswith("inline/")}
        )
        return int(told["done"]), torch.from_numpy(arrays["hidden"])

    def _results(self, block: Block, wanted: list[BlockLinear]) -> Mapping[str, QuantizedRows]:
        """Quantize a block's linears, one after the other or together; the block computes with them from then on."""
        plan = self.given.plan
        fates = {linear.name: plan.by_name[linear.name] for linear in wanted}
        if isinstance(self.quantizer, BlockLearner):
            return self.quantizer.learn(block, fates, block.outputs(), plan.scale_format)
        # Before anything is rounded: what the tuned block is to come near to.
        targets = block.outputs() if self.given.profile.quantize.effort == "max" else None
        results = {}
        for linear in wanted:
            weights = self.token_weights.get(linear.name)
            found = statistics(linear.name, block.inputs(linear), self.given.workers, weights)
            results[linear.name] = self._rounded(linear, found)
            self._replace(linear, results[linear.name], found)
        return results if targets is None else tune_scales(block, fates, results, targets, plan.scale_format)

    def _rounded(self, linear: BlockLinear, found: InputStatistics) -> QuantizedRows:
        """Quantize a linear, some rows a thread."""
        weight, fate = linear.weight(), self.given.plan.by_name[linear.name]
        assert fate.scheme is not None
        importance = np.ascontiguousarray(np.diagonal(found.moments))

        def part(start: int) -> QuantizedRows:
            assert fate.scheme is not None
            return self.quantizer.quantize(
                weight[start : start + ROWS],
                fate.scheme,
                importance,
                scale_format=self.given.plan.scale_format,
                moments=found.moments,
            )

        return joined(self.given.workers.map(part, range(0, len(weight), ROWS)))

    def _replace(self, linear: BlockLinear, result: QuantizedRows, found: InputStatistics) -> None:
        """Let the block compute with a quantized linear, and note the error."""
        fate = self.given.plan.by_name[linear.name]
        assert fate.scheme is not None
        now, before = restored(result, fate.scheme, fate.columns), linear.weight()
        linear.set_weight(now)
        now -= before
        self.errors[linear.name] = float(_power(now, found) / max(_power(before, found), 1e-30))

    def _fold(self, block: Block) -> None:
        """Let the algorithm rescale channels, and store the vectors that it was folded into."""
        given = self.given
        assert isinstance(self.quantizer, ChannelScaler)
        for name, array in fold_channels(block, given.plan, self.quantizer, given.workers).items():
            self.store.constant(given.plan.by_name[name].stored[0], array)
            self.written.append(name)

    def _head(self, inputs: FloatArray) -> None:
        fate = self.given.head()
        if fate.scheme is None:
            return
        require_finite(fate.name, inputs)
        turn = self.given.plan.by_name.get(HEAD_ROTATION)
        if turn is not None:
            inputs = inputs @ read_rows(self.given.checkpoint, turn, 0, turn.rows).T
        found = statistics(fate.name, inputs, self.given.workers)
        importance = np.ascontiguousarray(np.diagonal(found.moments))
        # A tied table is looked up as well: making up for errors would be right for one of its two uses only.
        quantizer = load_quantizer("rtn") if fate.tied else self.quantizer
        whole = any(piece.whole for piece in fate.reads)
        step = fate.rows if whole else max(ROWS, CHUNK_WEIGHTS // fate.columns // ROWS * ROWS)

        def part(start: int) -> None:
            assert fate.scheme is not None
            rows = read_rows(self.given.checkpoint, fate, start, min(start + step, fate.rows))
            before = compared(fate, start, rows)
            result = quantizer.quantize(
                rows,
                fate.scheme,
                importance,
                scale_format=self.given.plan.scale_format,
                moments=None if fate.tied else found.moments,
            )
            self.store.quantized(fate, start, result, before)

        self.given.workers.map(part, range(0, fate.rows, step))
        self.written.append(fate.name)


def joined(parts: list[QuantizedRows]) -> QuantizedRows:
    """Return rows that were quantized piece by piece as one."""
    zeros = [part.zero_points for part in parts if part.zero_points is not None]
    return QuantizedRows(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zeros) if zeros else None,
    )


def _power(weight: FloatArray, found: InputStatistics) -> float:
    """Return the mean power of a linear's outputs, ``trace(W H W^T)``, of rows that stand for all."""
    rows = weight[np.unique(np.linspace(0, len(weight) - 1, min(len(weight), _ERROR_ROWS)).round().astype(np.int64))]
    return max(0.0, float(np.einsum("nk,nk->", rows @ found.moments, rows, dtype=np.float64)))


def handle(request: Json, job: Path) -> Json:
    """Open the model and do the job."""
    torch.set_num_threads(1)
    keep_buffers(_KEPT_BYTES)
    calibration = Calibration(request)
    work = _JOBS.get(request["job"])
    if work is None:
        raise CompressError(f"unknown job {request['job']!r}", where="request")
    try:
        result = work(calibration, request, lambda fraction: report_progress(job, fraction))
    finally:
        calibration.workers.close()
    return {"results": [result], "peak_rss_bytes": peak_rss_bytes()}


def _quantize(calibration: Calibration, request: Json, progress: Callable[[float], None]) -> Json:
    weights: dict[str, FloatArray] = {}
    if request["token_weights"] is not None:
        with np.load(request["token_weights"]) as stored:
            weights = {name: stored[name] for name in stored.files}
    with DataFile.reopen(Path(request["data"])) as data:
        state = None if request["state"] is None else Path(request["state"])
        work = Quantization(calibration, data, weights, progress, state)
        work.run()
        inline: dict[str, Any] = dict(work.store.inline)
        np.savez(request["inline"], **inline)
    return {"written": work.written, "errors": work.errors, "stored_errors": work.store.errors.relative()}


def _sensitivity(calibration: Calibration, request: Json, progress: Callable[[float], None]) -> Json:
    from compress.calibrate.fisher import measure

    options = {name: tuple(Scheme(*item) for item in schemes) for name, schemes in request["options"].items()}
    found = measure(
        calibration,
        options,
        seed=int(request["seed"]),
        tokens=int(request["tokens"]),
        work=Path(request["work"]),
        progress=progress,
    )
    np.savez(request["token_weights"], **dict(found.tokens))  # type: ignore[arg-type]
    return {"losses": dict(found.losses)}


_JOBS: dict[str, Callable[[Calibration, Json, Callable[[float], None]], Json]] = {
    "quantize": _quantize,
    "sensitivity": _sensitivity,
}

if __name__ == "__main__":
    sys.exit(serve(handle))
