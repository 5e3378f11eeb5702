"""A decoder of static shapes, two graphs over one cache, driven as ``decoding.CachedDecoder`` is.

The prefill graph takes a fixed number of new tokens, padded at the end, the decode graph one. Both read a cache of a
fixed number of slots and hand out the new tokens' keys and values, which are written into it here: where a phone's
program would do it. Inputs and outputs are described in ``graph/static_decoder``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.errors import CompressError

#: The graph for one token, beside the one for several, which has the artifact's usual name.
DECODE_NAME = "decode.onnx"
_PAST, _PRESENT = "past_key_values.", "present."


def decode_graph(model: Path, session: Any) -> Path | None:  # noqa: ANN401 - onnxruntime has no stubs
    """Return where the other graph of a static decoder is, ``None`` if the session's graph is none.

    It is ``decode.onnx`` beside ``model.onnx``, and ``decode_ctx.onnx`` beside a compiled ``model_ctx.onnx``.

    Raises:
        CompressError: It is missing.
    """
    shapes = {value.name: value.shape for value in session.get_inputs()}
    past = [shape for name, shape in shapes.items() if name.startswith(_PAST)]
    if not past or not all(isinstance(size, int) for shape in past for size in shape):
        return None
    stem = model.stem.removeprefix("model") if model.stem.startswith("model") else ""
    path = model.with_name(f"{Path(DECODE_NAME).stem}{stem}.onnx")
    if not path.is_file():
        raise CompressError(f"a static decoder needs {path.name} beside {model.name}", where=str(model.parent))
    return path


class StaticDecoder:
    """One sequence fed piece by piece to the sessions of a prefill and a decode graph.

    Raises:
        CompressError: The graphs' inputs and outputs are not those of one static decoder.
    """

    def __init__(self, prefill: Any, decode: Any) -> None:  # noqa: ANN401
        self._sessions = (prefill, decode)
        self._shapes, other = ({value.name: value.shape for value in one.get_inputs()} for one in self._sessions)
        self._past = sorted(name for name in self._shapes if name.startswith(_PAST))
        wanted = {"input_ids", "position_ids", "attention_mask", *self._past}
        if set(self._shapes) != wanted or set(other) != wanted or not self._past:
            raise CompressError(
                "the graphs are not prefill and decode of a static decoder",
                where=f"inputs {sorted(set(self._shapes) ^ set(other) or set(self._shapes) ^ wanted)}",
            )
        if any(self._shapes[name] != other[name] for name in self._past) or other["input_ids"] != [1, 1]:
            raise CompressError("prefill and decode do not share a cache, or decode takes more than one token")
        self.slots = int(self._shapes[self._past[0]][2])
        self.reset()

    @property
    def trims_logits(self) -> bool:
        """Whether the graph can leave out the logits of all but the last positions: it has one length."""
        return False

    def reset(self) -> None:
        """Forget the sequence."""
        self._cache = {name: np.zeros(self._shapes[name], np.float32) for name in self._past}
        self.length = 0

    def keep(self, length: int) -> None:
        """Forget all but the first ``length`` positions: the mask leaves the slots behind them out."""
        self.length = min(length, self.length)

    def feed(self, ids: npt.NDArray[np.int64], keep: int = 0) -> npt.NDArray[np.float32]:
        """Append ``ids`` int64 ``[1, new]`` and return float32 logits ``[1, new, vocab]``, whatever ``keep`` says.

        Raises:
            CompressError: More than one sequence, or the cache is full.
        """
        batch, new = ids.shape
        if batch != 1 or self.length + new > self.slots:
            raise CompressError(
                f"the graphs hold one sequence of {self.slots} tokens; {batch} of {self.length + new} were given",
                hint="export with a larger graph.cache_length, or measure shorter texts",
            )
        width = int(self._shapes["input_ids"][1])
        if new == 1:
            return self._run(1, ids, 1)
        pieces = [self._run(0, ids[:, start : start + width], width) for start in range(0, new, width)]
        return np.concatenate(pieces, axis=1)

    def _run(self, which: int, ids: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.float32]:
        start, count = self.length, ids.shape[1]
        tokens, positions = np.zeros((1, width), np.int64), np.zeros((1, width), np.int64)
        tokens[:, :count], positions[:, :count] = ids, np.arange(start, start + count)
        mask = np.zeros((1, self.slots + width), np.int64)
        mask[:, :start] = mask[:, self.slots : self.slots + count] = 1
        feeds = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask, **self._cache}
        names = ["logits", *(_PRESENT + name.removeprefix(_PAST) for name in self._past)]
        logits, *present = self._sessions[which].run(names, feeds)
        for name, made in zip(self._past, present, strict=True):
            self._cache[name][:, :, start : start + count] = made[:, :, :count]
        self.length += count
        result: npt.NDArray[np.float32] = logits[:, :count].astype(np.float32, copy=False)
        return result
