"""The worker that prunes a checkpoint: ``python -m compress.prune.worker``.

Request (see ``validate.protocol``): ``job`` (``prune``; ``curves``: what removing parts would cost, as ``inner``,
``heads``, ``layers`` {size: loss}; ``divergence`` of the model ``smaller`` on ``texts``: ``kl``), ``checkpoint``
{reference, adapter, revision, task}, ``texts`` (decoders: ``.npy`` int64 ``[windows, length]``; encoders: ``.npz`` of
:class:`compress.validation.encoded.Encoded`; null: no text is read), ``amounts`` {inner, heads, kv_heads, layers},
``algorithm``, ``depth`` (an algorithm's name), ``fit`` (bool), ``seed``, ``sparsity`` (share of single weights, or
0), ``sparsifier``, ``pattern`` ([n, m] or null), ``vocabulary`` (``.npy`` of the ids that stay, or null), ``output``
(a directory), ``workers`` (threads), ``memory_cap``.

It writes the weights files into ``output`` and answers ``layers`` [blocks that stay], ``zeros`` [tensors in which
removed heads, or single weights, are zeros], ``errors`` {linear: [without, with the fit]}, ``dtype``.

In memory are one block of a decoder (an encoder whole), the hidden states of the calibration tokens twice, and the
inputs of one linear with their second moments. Sums are made by one thread each, over pieces that do not depend on how
many threads there are.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from compress.allocator import keep_buffers
from compress.calibrate.blocks import Block, Workers
from compress.contracts import KEPT_HEADS, Checkpoint, Encoder, FloatArray, PrunableFamily, Structure
from compress.errors import CompressError, SourceError
from compress.families import load_family
from compress.prune import load_depth_pruner, load_pruner, load_sparsifier
from compress.prune.amounts import Amounts, full
from compress.prune.block_pruner import BlockPruner, Pruned
from compress.prune.checkpoint import Stored, WeightsWriter, stored_type
from compress.prune.curves import of_depth, summed
from compress.prune.cuts import Cut, Kept, block_cuts, renumbered, vocabulary_cuts
from compress.prune.encoder_blocks import EncoderBlocks
from compress.prune.estimate import STATE_TOKENS
from compress.quantize.finite import first_nonfinite
from compress.validation.encoded import Batch, Encoded, batch_of
from compress.validation.protocol import Json, peak_rss_bytes, report_progress, serve
from compress.validation.streaming import Call, StreamedModel

#: Buffers to keep, as in calibration.
_KEPT_BYTES = 32 << 20
_INTEGERS = ("I", "U", "BOOL")

Progress = Callable[[float], None]


class Pruning:
    """One run: the source, what is to be left of it, and the files that are written."""

    def __init__(self, request: Json) -> None:
        from compress.source import open_checkpoint

        wanted = request["checkpoint"]
        adapter = wanted.get("adapter")
        self.request = request
        self.checkpoint: Checkpoint = open_checkpoint(
            wanted["reference"],
            adapter=Path(adapter) if adapter else None,
            revision=wanted.get("revision"),
            task=wanted.get("task"),
        )
        family = load_family(self.checkpoint.config)
        assert isinstance(family, PrunableFamily)
        self.structure: Structure = family.describe(self.checkpoint.config, self.checkpoint.tensors())
        self.amounts = Amounts(**request["amounts"])
        self.full = full(self.structure)
        self.leave_zeros = family.sizes.head_dim is None
        self.workers = Workers(int(request["workers"]))
        self.model: Any = self._model()
        self.batch, self.real = self._texts()
        self.pruner = BlockPruner(
            self.structure,
            self.amounts,
            load_pruner(request["algorithm"]),
            fit=bool(request["fit"]),
            real=self.real,
            workers=self.workers,
            seed=int(request["seed"]),
        )
        self.errors: dict[str, tuple[float, float]] = {}
        self.zeros: list[str] = []

    @property
    def blocks(self) -> int:
        """Return how many blocks have weights of their own."""
        return 1 + max(linear.layer for linear in self.structure.linears if linear.layer is not None)

    def run(self, progress: Progress) -> Json:
        """Choose blocks, then prune and write one after the other."""
        heads = (self.amounts.heads, self.amounts.kv_heads) != (self.full.heads, self.full.kv_heads)
        if heads and self.leave_zeros and KEPT_HEADS in self.checkpoint.config:
            raise CompressError(
                "heads of this checkpoint were removed before", hint="prune the original model by the sum of both"
            )
        stay = self._stay(lambda fraction: progress(0.3 * fraction))
        self._names: Mapping[str, str] = {name: name for name in self._stored()}
        if self._by_depth():
            self._names = renumbered(list(self._stored()), self.structure, stay)
        self._cuts = self._planned(stay)
        tensors = [
            Stored(
                self._names[name],
                stored_type(info.dtype),
                self._cuts[name].shape(info.shape) if name in self._cuts else info.shape,
            )
            for name, info in self._stored().items()
            if name in self._names
        ]
        with WeightsWriter(Path(self.request["output"]), tensors) as self._writer:
            self._done: set[str] = set()
            self._prune(stay, lambda fraction: progress(0.3 + 0.6 * fraction))
            for name in self._names:
                if name not in self._done:
                    self._copy(name)
        types = Counter[str]()
        for tensor in tensors:
            types[tensor.dtype] += tensor.nbytes
        return {
            "layers": list(stay),
            "zeros": sorted(self.zeros),
            "errors": {name: list(pair) for name, pair in self.errors.items()},
            "dtype": types.most_common(1)[0][0],
        }

    def curves(self, progress: Progress) -> Json:
        """Find out what removing neurons, heads and blocks would cost, without removing any."""
        inner: list[dict[int, float]] = []
        heads: list[dict[int, float]] = []
        states: list[FloatArray] = []
        places = self._places()

        def visit(index: int, layer: torch.nn.Module, call: Call, hidden: torch.Tensor) -> torch.Tensor:
            block = self._block(index * self.blocks // self.full.layers, layer, call, hidden)
            found = self.pruner.costs(block)
            inner.append(found[0])
            heads.append(found[1])
            if not states:
                states.append(hidden.flatten(0, -2)[places].numpy())
            states.append(found[2].flatten(0, -2)[places].numpy())
            return found[2]

        self.model.visit_blocks(self.batch, visit, progress)
        depth, stacked = load_depth_pruner(self.request["depth"]), np.stack(states)
        gone = {count: depth.remove(stacked, count) for count in range(1, self.full.layers)}
        layers = of_depth(stacked, gone) if self.blocks in (1, self.full.layers) else {self.full.layers: 0.0}
        return {"inner": summed(inner), "heads": summed(heads), "layers": layers}

    # --------------------------------------------------------------------------------------------------- what stays

    def _places(self) -> npt.NDArray[np.int64]:
        """Return the positions whose hidden states stand for all."""
        assert self.real is not None, "this is found out on a text"
        places = np.flatnonzero(self.real.reshape(-1))
        found: npt.NDArray[np.int64] = places[np.unique(np.linspace(0, len(places) - 1, STATE_TOKENS).astype(np.int64))]
        return found

    def _by_depth(self) -> bool:
        """Return whether blocks that go take tensors with them: not those of one that is run several times."""
        return self.amounts.layers < self.full.layers and self.blocks == self.full.layers

    def _stay(self, progress: Progress) -> tuple[int, ...]:
        """Return the blocks that stay; of one that is run several times, the runs."""
        count = self.full.layers - self.amounts.layers
        if not self._by_depth():
            return tuple(range(self.amounts.layers))
        depth = load_depth_pruner(self.request["depth"])
        places = self._places()
        states: list[FloatArray] = []

        def visit(index: int, layer: torch.nn.Module, call: Call, hidden: torch.Tensor) -> torch.Tensor:
            block = self._block(index, layer, call, hidden)
            outputs = block.outputs()
            if not states:
                states.append(hidden.flatten(0, -2)[places].numpy())
            states.append(outputs.flatten(0, -2)[places].numpy())
            return outputs

        self.model.visit_blocks(self.batch, visit, progress)
        found = np.stack(states)
        bad = first_nonfinite(found.reshape(len(found), -1))
        if bad is not None:
            raise SourceError("the model's hidden states are not finite on the text", where=f"block {bad[0]}")
        gone = depth.remove(found, count)
        return tuple(index for index in range(self.full.layers) if index not in set(gone.tolist()))

    # ------------------------------------------------------------------------------------------------------ pruning

    def _prune(self, stay: tuple[int, ...], progress: Progress) -> None:
        """Go through the model once, or through its weights where no text is read."""
        if not self._any_width() and not self.request["fit"] and not self.request["sparsity"]:
            return
        if self.batch is None:
            self.model.each(lambda index, layer: self._choose(index, layer, stay))
        elif self.blocks == self.full.layers:
            self._follow(stay, progress)
        else:
            self._share(progress)

    def _any_width(self) -> bool:
        return (self.amounts.inner, self.amounts.heads, self.amounts.kv_heads) != (
            self.full.inner,
            self.full.heads,
            self.full.kv_heads,
        )

    def _choose(self, index: int, layer: torch.nn.Module, stay: tuple[int, ...]) -> None:
        if index not in stay and self.blocks == self.full.layers:
            return
        block = self._block(index, layer, None, None)
        pruned = self.pruner.choose(block)
        self._cut(index, pruned)

    def _follow(self, stay: tuple[int, ...], progress: Progress) -> None:
        """Two streams: the source's through the model's own forward, the pruned one's beside it."""
        stream: list[torch.Tensor] = []

        def visit(index: int, layer: torch.nn.Module, call: Call, hidden: torch.Tensor) -> torch.Tensor:
            block = self._block(index, layer, call, hidden)
            if not stream:
                stream.append(hidden)
            if index not in stay:
                return block.outputs()
            if self.request["sparsity"]:
                outputs = block.outputs()
                pruned, stream[0] = self._sparsified(block, stream[0])
            else:
                pruned, outputs, stream[0] = self.pruner.follow(block, stream[0])
            self._require_finite(index, stream[0])
            self._cut(index, pruned)
            self._write_changed(block, pruned)
            return outputs

        self.model.visit_blocks(self.batch, visit, progress)

    def _sparsified(self, block: Block, stream: torch.Tensor) -> tuple[Pruned, torch.Tensor]:
        asked = self.request
        pattern = None if asked["pattern"] is None else (int(asked["pattern"][0]), int(asked["pattern"][1]))
        algorithm = load_sparsifier(asked["sparsifier"])
        return self.pruner.sparsify(block, stream, algorithm, float(asked["sparsity"]), pattern)

    def _share(self, progress: Progress) -> None:
        """A block that is run several times: its inputs over all runs that stay, then one choice."""
        seen: dict[int, dict[str, FloatArray]] = {}
        groups = self.full.layers // self.blocks

        def visit(run: int, layer: torch.nn.Module, call: Call, hidden: torch.Tensor) -> torch.Tensor:
            index = run // groups
            block = self._block(index, layer, call, hidden)
            if run < self.amounts.layers:
                found, known = self.pruner.observed(block), seen.setdefault(index, {})
                for name, array in found.items():
                    known[name] = known[name] + array if name in known else array
            return block.outputs()

        self.model.visit_blocks(self.batch, visit, progress)

        def settle(index: int, layer: torch.nn.Module) -> None:
            block = self._block(index, layer, None, None)
            pruned = self.pruner.settle_shared(block, seen[index])
            self._cut(index, pruned)
            self._write_changed(block, pruned)

        self.model.each(settle)

    def _block(self, index: int, layer: torch.nn.Module, call: Call | None, hidden: torch.Tensor | None) -> Block:
        return Block(self.model, self.structure, index, layer, call, hidden, self.workers)

    @staticmethod
    def _require_finite(index: int, states: torch.Tensor) -> None:
        bad = first_nonfinite(states.flatten(0, -2).numpy())
        if bad is not None:
            raise SourceError("the pruned model's hidden states are not finite on the text", where=f"block {index}")

    # ------------------------------------------------------------------------------------------------------ writing

    def _stored(self) -> Mapping[str, Any]:
        """Return the tensors that are written: floats, and of a trimmed vocabulary none that the plan does not know."""
        tensors = self.checkpoint.tensors()
        known = set(self._vocabulary_cuts())
        rows = self.structure.vocab_size
        return {
            name: info
            for name, info in tensors.items()
            if not info.dtype.startswith(_INTEGERS) and (not known or name in known or rows not in info.shape)
        }

    def _vocabulary_cuts(self) -> dict[str, Cut]:
        if self.request["vocabulary"] is None:
            return {}
        return vocabulary_cuts(self.structure, np.load(self.request["vocabulary"]))

    def _planned(self, stay: tuple[int, ...]) -> dict[str, Cut]:
        """Return cuts of the right sizes: which rows and columns stay is known block by block."""
        some = Kept(
            None if self.amounts.inner == self.full.inner else np.arange(self.amounts.inner),
            None,
            None,
        )
        if (self.amounts.heads, self.amounts.kv_heads) != (self.full.heads, self.full.kv_heads):
            some = Kept(some.neurons, np.arange(self.amounts.heads), np.arange(self.amounts.kv_heads))
        cuts = self._vocabulary_cuts()
        for index in range(self.blocks):
            if index in stay or self.blocks != self.full.layers:
                cuts |= block_cuts(self.structure, index, some, leave_zeros=self.leave_zeros)
        return cuts

    def _cut(self, index: int, pruned: Pruned) -> None:
        found = block_cuts(self.structure, index, pruned.kept, leave_zeros=self.leave_zeros)
        self._cuts |= found
        self.errors |= pruned.errors or {}
        if self.leave_zeros and pruned.kept.heads is not None:
            roles = ("qkv", "attention_output")
            linears = [item for item in self.structure.linears if item.layer == index and item.role in roles]
            names = {piece.tensor for item in linears for piece in (*item.weight, *item.bias)}
            self.zeros += [self._names[name] for name in names if name in found]

    def _write_changed(self, block: Block, pruned: Pruned) -> None:
        """Write what was fitted, from the block; all else is read from the source again."""
        for linear in block.linears:
            if linear.name not in pruned.changed:
                continue
            if self.request["sparsity"]:
                self.zeros += [self._names[piece.tensor] for piece in linear.linear.weight]
            for piece in (*linear.linear.weight, *linear.linear.bias):
                self._write(piece.tensor, block.parameter(piece.tensor).numpy())

    def _copy(self, name: str) -> None:
        self._write(name, self.checkpoint.read(name))

    def _write(self, name: str, tensor: npt.NDArray[Any]) -> None:
        cut = self._cuts.get(name)
        self._writer.write(self._names[name], tensor if cut is None else cut.apply(tensor))
        self._done.add(name)

    # -------------------------------------------------------------------------------------------------------- inputs

    def _model(self) -> Any:
        if isinstance(self.structure, Encoder):
            return EncoderBlocks(self.checkpoint, self.structure, self.request.get("memory_cap"))
        return StreamedModel(self.checkpoint)

    def _texts(self) -> tuple[Any, npt.NDArray[np.bool_] | None]:
        path = self.request["texts"]
        if path is None:
            return None, None
        if isinstance(self.structure, Encoder):
            texts = Encoded.load(path)
            batch: Batch = batch_of(texts, np.arange(len(texts)), 0)
            return batch, batch.mask.astype(bool)
        windows = np.load(path)
        return windows, np.ones(windows.shape, bool)


def divergence(request: Json) -> float:
    """Return the mean KL divergence of a smaller decoder from its source on windows, nats a token."""
    from compress.source import open_checkpoint

    windows = np.load(request["texts"])
    spec = request["checkpoint"]
    adapter = Path(spec["adapter"]) if spec.get("adapter") else None
    with (
        open_checkpoint(
            spec["reference"], adapter=adapter, revision=spec.get("revision"), task=spec.get("task")
        ) as source,
        open_checkpoint(request["smaller"]) as smaller,
    ):
        models = [StreamedModel(source), StreamedModel(smaller)]
        states = [model.hidden_states(windows) for model in models]
        total = 0.0
        for row in range(len(windows)):
            first, second = (
                torch.from_numpy(np.concatenate([block for _, block in model.logits(hidden[row : row + 1])], axis=1))
                for model, hidden in zip(models, states, strict=True)
            )
            first, second = first.log_softmax(-1), second.log_softmax(-1)
            total += float((first.exp() * (first - second)).sum(dtype=torch.float64))
    return total / int(windows.size)


def handle(request: Json, job: Path) -> Json:
    """Open the model, prune it, and write it; or find out what that would cost."""
    if request["job"] == "divergence":
        torch.set_num_threads(int(request["threads"]))
        return {"results": [{"kl": divergence(request)}], "peak_rss_bytes": peak_rss_bytes()}
    torch.set_num_threads(1)
    keep_buffers(_KEPT_BYTES)
    pruning = Pruning(request)
    try:
        with torch.no_grad():
            work = pruning.curves if request["job"] == "curves" else pruning.run
            result = work(lambda fraction: report_progress(job, fraction))
    finally:
        pruning.workers.close()
    return {"results": [result], "peak_rss_bytes": peak_rss_bytes()}


if __name__ == "__main__":
    sys.exit(serve(handle))
