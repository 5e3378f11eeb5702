"""An artifact run by ONNX Runtime with nothing of ``compress``: what a user would write in twenty lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Ids = npt.NDArray[np.int64]


class PlainDecoder:
    """Feeds tokens and keeps the cache; rows of a batch may end in padding (mask 0)."""

    def __init__(self, artifact: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(artifact / "model.onnx", options, providers=["CPUExecutionProvider"])
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        self._outputs = [value.name for value in self.session.get_outputs()]
        self._past: dict[str, npt.NDArray[np.floating]] = {}

    def reset(self) -> None:
        self._past = {}

    def feed(self, ids: Ids, mask: Ids, positions: Ids, keep: int | None = None) -> npt.NDArray[np.float32]:
        """Return float32 logits ``[batch, positions kept, vocabulary]`` of the new tokens ``ids`` ``[batch, new]``."""
        feeds = {"input_ids": ids, "attention_mask": mask, **(self._past or self._empty(len(ids)))}
        if "position_ids" in self._inputs:
            feeds["position_ids"] = positions
        if keep is not None:
            feeds["logits_to_keep"] = np.array([keep], np.int64)
        logits, *present = self.session.run(None, feeds)
        self._past = {
            name.replace("present", "past_key_values"): value
            for name, value in zip(self._outputs[1:], present, strict=True)
        }
        return np.asarray(logits, np.float32)

    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], float]:
        """Return ``count`` greedy tokens after ``prompt``, and the least lead the best logit had over the second."""
        self.reset()
        tokens, lead = list(prompt), float("inf")
        new = np.array([prompt])
        for _ in range(count):
            length = len(tokens)
            positions = np.arange(length - new.shape[1], length)[None]
            last = self.feed(new, np.ones((1, length), np.int64), positions)[0, -1]
            second, best = np.sort(last)[-2:]
            lead = min(lead, float(best - second))
            tokens.append(int(last.argmax()))
            new = np.array([tokens[-1:]])
        return tokens[len(prompt) :], lead

    def _empty(self, batch: int) -> dict[str, npt.NDArray[np.floating]]:
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
        return {
            name: np.zeros((batch, value.shape[1], 0, value.shape[3]), types[value.type])
            for name, value in self._inputs.items()
            if name.startswith("past_key_values.")
        }
