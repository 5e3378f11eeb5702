"""The worker in which a model writes calibration text: ``python -m compress.calibrate.self_text_worker``.

Request (see ``validate.protocol``): ``checkpoint`` {reference, adapter, revision, task}, ``windows``, ``length``,
``seed``, ``opening`` [ids], ``special`` [ids that no document starts with], ``vocabulary`` (ids from there on are
never written: a head may have more rows than the tokenizer has tokens), ``output`` (``.npy`` int64
``[windows, length]``). :mod:`compress.calibrate.self_text` says how tokens are chosen.

A window is written in pieces of equal length side by side, each a text of its own: 32 sequences cost two thirds of
what 16 sequences twice as long do, a small model loses its thread in a long text, and more texts show it more words.

The source model is in memory whole, in float32, with the keys and values of :data:`BATCH` pieces. One thread, so that
sums, and with them the tokens, do not depend on how many there are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.calibrate.self_text import Writer
from compress.errors import CompressError
from compress.validation.protocol import Json, peak_rss_bytes, report_progress, serve

#: The most tokens of a piece, and pieces that are written at once.
PIECE, BATCH = 256, 32

Windows = npt.NDArray[np.int64]
Progress = Callable[[float], None]


def handle(request: Json, job: Path) -> Json:
    """Load the model, let it write, and store the tokens."""
    import torch

    from compress.source import open_checkpoint
    from compress.validation.streaming import StreamedModel

    torch.set_num_threads(1)
    wanted = request["checkpoint"]
    adapter = wanted.get("adapter")
    with open_checkpoint(
        wanted["reference"],
        adapter=Path(adapter) if adapter else None,
        revision=wanted.get("revision"),
        task=wanted.get("task"),
    ) as checkpoint:
        streamed = StreamedModel(checkpoint)
        streamed.fill_all()
        ends = end_tokens(checkpoint.config)
    windows = write(
        streamed.model,
        int(request["windows"]),
        int(request["length"]),
        limit=min(int(request["vocabulary"]), streamed.vocab_size),
        opening=list(request["opening"]),
        special=set(request["special"]) | ends,
        ends=ends,
        seed=int(request["seed"]),
        progress=lambda fraction: report_progress(job, fraction),
    )
    np.save(request["output"], windows)
    return {"results": [{}], "load_seconds": None, "peak_rss_bytes": peak_rss_bytes(), "placement": None}


def end_tokens(config: Mapping[str, Any]) -> set[int]:
    """Return the ids that end a text, by the model's config: none, one or several."""
    found = config.get("eos_token_id")
    given = found if isinstance(found, list) else [found]
    return {value for value in given if isinstance(value, int) and not isinstance(value, bool)}


def write(
    model: Any,
    count: int,
    length: int,
    *,
    limit: int,
    opening: list[int],
    special: set[int],
    ends: set[int],
    seed: int,
    progress: Progress,
) -> Windows:
    """Return int64 ``[count, length]`` that a transformers model wrote, :data:`BATCH` pieces at a time.

    Args:
        model: Called with ids, a cache and ``logits_to_keep``.
        count: Windows.
        length: Tokens a window.
        limit: Ids from there on are never written.
        opening: Ids that open a document.
        special: Ids that are not drawn as a document's random token.
        ends: Ids that end a document.
        seed: Every batch draws from a generator of its own; may be negative.
        progress: Called with the fraction that is done.

    Raises:
        CompressError: No token is left to start a document with, or logits are not finite.
    """
    starts = np.setdiff1d(np.arange(limit, dtype=np.int64), np.array(sorted(special), np.int64))
    if not len(starts):
        raise CompressError("the tokenizer has no ordinary token that a document could start with")
    parts = -(-length // PIECE)
    pieces = np.empty((count * parts, -(-length // parts)), np.int64)
    for first in range(0, len(pieces), BATCH):
        some = pieces[first : first + BATCH]
        writer = Writer(len(some), opening=opening, starts=starts, ends=ends, seed=(seed & (2**64 - 1), first))
        for written in _fill(model, writer, some, limit):
            progress((first + len(some) * written / some.shape[1]) / len(pieces))
    return np.ascontiguousarray(pieces.reshape(count, -1)[:, :length])


def _fill(model: Any, writer: Writer, pieces: Windows, limit: int) -> Iterator[int]:
    """Write every row of ``pieces``, token by token, with the model's own cache; yield how many are written."""
    import torch

    length = pieces.shape[1]
    pieces[:, 0] = writer.next(None)
    cache = _cache(model, length)
    for position in range(1, length):
        ids = torch.from_numpy(pieces[:, position - 1 : position].copy())
        # A new document does not see what was before it in its piece; a token always sees itself.
        begins = np.minimum(writer.begins, position - 1)
        seen = torch.from_numpy((np.arange(position) >= begins[:, None]).astype(np.int64))
        mask = None if seen.all() else seen
        with torch.inference_mode():
            out = model(input_ids=ids, attention_mask=mask, cache=cache, use_cache=True, logits_to_keep=1)
        pieces[:, position] = writer.next(out.logits[:, -1, :limit].numpy())
        yield position + 1


def _cache(model: Any, length: int) -> Any:
    """Return transformers' cache, with room for all positions from the start in layers that keep all of them.

    transformers' own layer copies all keys and values for every token: two fifths of the time here. A layer of a
    sliding window keeps few, and stays as it is.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Roomy(DynamicLayer):  # type: ignore[no-untyped-call]
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            """Append keys and values ``[batch, heads, new, size]``; return all of them as views."""
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.rooms = [torch.empty((*new.shape[:2], length, new.shape[3])) for new in (key_states, value_states)]
                self.filled = 0
            stop = self.filled + key_states.shape[2]
            for room, new in zip(self.rooms, (key_states, value_states), strict=True):
                room[:, :, self.filled : stop] = new
            self.filled = stop
            self.keys, self.values = (room[:, :, :stop] for room in self.rooms)
            return self.keys, self.values

    import torch

    cache = DynamicCache(config=model.config)
    cache.layers = [
        Roomy() if type(layer) is DynamicLayer else layer  # type: ignore[no-untyped-call]
        for layer in cache.layers
    ]
    return cache


if __name__ == "__main__":
    sys.exit(serve(handle))
