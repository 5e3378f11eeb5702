"""An encoder's artifact run by ONNX Runtime with nothing of ``compress``: what a user would write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class PlainEncoder:
    """Answers batches of token ids ``[batch, sequence]``; a mask of 0 is padding."""

    def __init__(self, model: Path | bytes) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        source = model / "model.onnx" if isinstance(model, Path) else model
        self.session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, ids: Ids, mask: Ids, segments: Ids) -> dict[str, Floats]:
        """Return every output by its name."""
        given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}
        found = self.session.run(None, {name: given[name] for name in self.inputs})
        return dict(zip(self.outputs, found, strict=True))


def padded(lengths: tuple[int, ...], width: int) -> Ids:
    """Return the mask of texts that end in padding; a negative length begins with it."""
    columns = np.arange(width)
    return np.array([columns < length if length >= 0 else columns >= width + length for length in lengths], np.int64)


def example(lengths: tuple[int, ...], width: int, *, vocabulary: int, seed: int = 0) -> tuple[Ids, Ids, Ids]:
    """Return random ids, their mask, and random segments."""
    random = np.random.default_rng(seed)
    shape = (len(lengths), width)
    return random.integers(5, vocabulary, shape), padded(lengths, width), random.integers(0, 2, shape)
