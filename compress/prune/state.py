"""Where a distillation stands, in one file: what a run that was interrupted goes on from.

A safetensors file ``KIND/tensor`` of weights, moments and best weights, written whole at every evaluation; its metadata
hold the history of losses and a digest of everything that the result depends on. Batches and learning rates follow
from step and history (:mod:`compress.prune.schedule`), so there is no more to keep.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from compress.contracts import Checkpoint
from compress.errors import UsageError
from compress.package.staging import sync
from compress.prune.adam import Adam
from compress.source.files import sha256_of

#: What of a request the result depends on, beside the files.
_OPTIONS = ("pooling", "frozen_zeros", "steps", "rate", "batch", "seed")

Tensors = Mapping[str, torch.Tensor]
History = list[tuple[int, float]]


def digest_of(request: Mapping[str, Any], teacher: Checkpoint, student: Checkpoint) -> str:
    """Return the SHA-256 of what the result depends on: options, texts, both models' files, torch's version."""
    files = [[[file.name, file.sha256] for file in checkpoint.files()] for checkpoint in (teacher, student)]
    texts = sha256_of(Path(request.get("windows") or request["texts"]))
    task = dict(request["checkpoint"]).get("task")
    basis = [{name: request[name] for name in _OPTIONS}, texts, files, task, torch.__version__]
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()


class State:
    """The file of one job; ``digest`` says which.

    Args:
        path: Where it is, or will be.
        digest: From :func:`digest_of`.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self._path, self._digest = path, digest

    def check(self) -> bool:
        """Return whether there is a state to go on from.

        Raises:
            UsageError: There is another job's, or a damaged one.
        """
        if not self._path.exists():
            return False
        try:
            with safe_open(self._path, "pt") as stored:
                digest = (stored.metadata() or {}).get("digest")
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"the state of the distillation is damaged: {error}", where=str(self._path), hint="remove it"
            ) from error
        if digest != self._digest:
            raise UsageError(
                "the state is of another distillation: other models, texts or options",
                where=str(self._path),
                hint="repeat the command that it is of, or remove the file",
            )
        return True

    def restore(self, adam: Adam, best: Tensors, history: History) -> bool:
        """Fill in what was kept; returns whether anything was."""
        if not self.check():
            return False
        with safe_open(self._path, "pt") as stored:
            for kind, tensors in _kinds(adam, best).items():
                for name, tensor in tensors.items():
                    tensor.copy_(stored.get_tensor(f"{kind}/{name}"))
            history[:] = [(int(step), float(loss)) for step, loss in json.loads(stored.metadata()["history"])]
        return True

    def save(self, adam: Adam, best: Tensors, history: History) -> None:
        """Write everything."""
        tensors = {f"{kind}/{name}": item for kind, found in _kinds(adam, best).items() for name, item in found.items()}
        save_tensors(self._path, tensors, {"digest": self._digest, "history": json.dumps(history)})

    def remove(self) -> None:
        """Forget it: the job is done."""
        self._path.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Replace a safetensors file whole: write beside, fsync, rename."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        save_file(dict(tensors), beside, metadata=dict(metadata))
        sync(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _kinds(adam: Adam, best: Tensors) -> dict[str, Tensors]:
    return {"weight": adam.weights, "mean": adam.means, "square": adam.squares, "best": best}
