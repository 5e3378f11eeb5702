"""Losses of candidates on a pool of windows: what the trials of benchmark_gate.py are drawn from.

A candidate is an exported graph with some change. It runs once over the pool, in the worker of `compress validate`, a
few windows at a time; what is kept of a window is small: losses by position, how often the best token is the source's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from compress.validation import drift, run, text
from compress.validation.artifact import Artifact, open_artifact
from compress.validation.logits import LogitsFile, check_disk
from compress.validation.losses import Losses, digest
from compress.validation.on_provider import run_artifact
from compress.validation.protocol import run_worker
from compress.validation.speed import SpeedPlan

AT_ONCE = 16
PROVIDER = "cpu"
DATA = "model.onnx.data"
PLAN = SpeedPlan(threads=2, timeout=7200)
Floats = npt.NDArray[np.float32]


def silent(stage: str, fraction: float) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Taken:
    """A candidate on the pool's windows: ``nll``, ``kl`` ``[windows, length - 1]`` in nats, the rest ``[windows]``.

    ``difference`` is the mean of nll less the source's, ``top1`` the share of positions with the source's best token.
    """

    nll: Floats
    kl: Floats
    difference: npt.NDArray[np.float64]
    top1: npt.NDArray[np.float64]

    def against(self, other: Taken) -> float:
        """Return by how many nats a token this one is worse than another; expm1 of it is the loss of perplexity."""
        return float((self.nll.astype(np.float64) - other.nll).mean())


class Pool:
    """The windows of a text, and the source's logits for them on the disk: 4 bytes a token and a word."""

    def __init__(
        self, artifact: Path, checkpoint: Path, eval_text: Path, *, windows: int, length: int, work: Path
    ) -> None:
        self.artifact, self._work, self.plan = open_artifact(artifact), work, PLAN
        self.scratch = work / "candidate"
        chosen = text.from_file(eval_text, windows * length)
        self.windows = text.windows(
            chosen, artifact, length=length, tokens=windows * length, vocab_size=self.artifact.vocab_size
        )
        self.text = chosen
        check_disk(work, (self.windows.size + AT_ONCE * length) * self.artifact.vocab_size * 4)
        self._places = []
        for start in range(0, len(self.windows), AT_ONCE):
            place = work / f"windows-{digest(self.windows[start : start + AT_ONCE])[:12]}"
            if not (place / "reference.npy").is_file():
                self._source(start, place, checkpoint)
            self._places.append(place)

    def _source(self, start: int, place: Path, checkpoint: Path) -> None:
        """Run the source on some windows; the directory appears whole."""
        beside = place.with_suffix(".partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        np.save(beside / "windows.npy", self.windows[start : start + AT_ONCE])
        job = {"kind": "logits", "windows": str(beside / "windows.npy"), "output": str(beside / "reference.npy")}
        request = {
            "checkpoint": run.CheckpointSpec(str(checkpoint)).as_request(),
            "threads": self.plan.threads,
            "jobs": [job],
        }
        run_worker("reference", request, timeout=self.plan.timeout)
        beside.rename(place)

    def take(self, artifact: Artifact, *, threads: int | None = None, chunks: int | None = None) -> Taken:
        """Run a candidate over the pool, or its first ``chunks`` of 16 windows."""
        found: list[drift.Drift] = []
        for place in self._places[:chunks]:
            windows, output = np.load(place / "windows.npy"), self._work / "candidate.npy"
            job = {"kind": "logits", "windows": str(place / "windows.npy"), "output": str(output)}
            run_artifact(
                artifact, PROVIDER, [job], threads or self.plan.threads, self.plan.timeout, lambda fraction: None
            )
            for index in range(len(windows)):
                rows = np.arange(windows.shape[1]) + index * windows.shape[1]
                mine, source = LogitsFile(output, rows), LogitsFile(place / "reference.npy", rows)
                found.append(drift.measure(source, mine, windows[index : index + 1]))
            output.unlink()
        return Taken(
            nll=np.concatenate([item.losses.nll for item in found]),
            kl=np.concatenate([item.losses.kl for item in found]),
            difference=np.log([item.perplexity_ratio for item in found]),
            top1=np.array([item.top1_agreement for item in found]),
        )

    def kept(self, name: str, make: Callable[[], Artifact], **how: int) -> Taken:
        """Return what was measured of a candidate by this name before, or make it and :meth:`take` it."""
        path = self._work / f"taken-{name}-{digest(self.windows)[:8]}.npz"
        if not path.is_file():
            taken = self.take(make(), **how)
            with path.with_suffix(".partial").open("wb") as stream:
                np.savez(stream, **vars(taken))
            path.with_suffix(".partial").rename(path)
        with np.load(path, allow_pickle=False) as stored:
            return Taken(**{name: stored[name] for name in ("nll", "kl", "difference", "top1")})

    def losses(self, taken: Taken, chosen: npt.NDArray[np.int64]) -> Losses:
        """Return a candidate's losses on some windows, as an artifact would hold them."""
        return Losses(taken.nll[chosen], taken.kl[chosen], digest(self.windows[chosen]))


def changed(artifact: Path, directory: Path, change: Callable[[ir.Model], Any]) -> Artifact:
    """Return a copy of an artifact with a change to its graph or weights."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(artifact, directory, ignore=shutil.ignore_patterns("model.onnx*", "report.*", "drift.npz"))
    model = ir.load(artifact / "model.onnx")
    change(model)
    ir.save(model, directory / "model.onnx", external_data=DATA)
    return open_artifact(directory)


def add_noise(share: float, seed: int = 0) -> Callable[[ir.Model], None]:
    """Return a change that adds normal noise of ``share`` of a weight's root mean square to every product's weight."""

    def change(model: ir.Model) -> None:
        random = np.random.default_rng(seed)
        for name, value in model.graph.initializers.items():
            if name.endswith("_proj.weight") and value.const_value is not None:
                weight = value.const_value.numpy()
                scale = np.float32(share * np.sqrt((weight.astype(np.float64) ** 2).mean()))
                noise = random.standard_normal(weight.shape, np.float32) * scale
                value.const_value = ir.tensor(weight + noise, name=name)

    return change


def move_codes(share: float, seed: int = 0) -> Callable[[ir.Model], None]:
    """Return a change that moves ``share`` of the blocks' 4-bit weights by one step, up or down: worse rounding.

    The same seed moves a superset for a larger share.
    """

    def change(model: ir.Model) -> None:
        random = np.random.default_rng(seed)
        for name, value in model.graph.initializers.items():
            if name.endswith("_proj.codes") and value.const_value is not None:
                codes = value.const_value.numpy()
                parts = np.stack([codes & 15, codes >> 4]).astype(np.int8)
                moves = np.where(random.random(parts.shape, np.float32) < share, 1, 0).astype(np.int8)
                moves *= random.integers(0, 2, parts.shape, np.int8) * 2 - 1
                low, high = np.clip(parts + moves, 0, 15).astype(np.uint8)
                value.const_value = ir.tensor(low | (high << 4), name=name)

    return change
