"""What the source writes after prompts, beside what the artifact wrote: jobs of the reference worker.

``prompts``: ``directory`` (the artifact's), ``texts`` -> ``ids`` of each, ``chat`` (whether a template was applied),
``stop`` (ids that end a text), or ``reason`` why there are none.

``samples``: ``directory``, ``prompts`` [ids], ``written`` [the artifact's new ids, the one that ended it among them],
``limits`` [new tokens at most], ``stop`` -> ``samples``, an entry a prompt: ``artifact`` and ``source`` (texts),
``first_difference`` (index of a new token, or null), ``source_complete``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress import prompts
from compress.contracts import Checkpoint
from compress.validation.protocol import Json
from compress.validation.streaming import StreamedModel

Progress = Callable[[float], None]


def encode(checkpoint: Checkpoint, item: Json, progress: Progress) -> Json:
    """Encode prompts; a tokenizer or template that fails is a reason, not an error: no budget depends on samples."""
    directory = Path(item["directory"])
    try:
        tokenizer = prompts.tokenizer_of(directory)
        ids = [prompts.encode(tokenizer, text, chat=True) for text in item["texts"]]
        stop = sorted(prompts.end_tokens(directory))
    except Exception as error:  # noqa: BLE001 - a template is a program of the model's author, and raises what it likes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return {"ids": [], "chat": False, "stop": [], "reason": f"the prompts cannot be encoded: {reason}"}
    return {"ids": ids, "chat": prompts.has_chat_template(tokenizer), "stop": stop, "reason": None}


def ahead(checkpoint: Checkpoint, item: Json, progress: Progress) -> Json:
    """Let the streamed source, a block in memory at a time, read prompts and artifact's texts in one pass.

    Texts are padded at their ends, where no earlier position sees it.
    """
    places, windows = [], np.zeros((len(item["prompts"]), _longest(item)), np.int64)
    for row, (prompt, written) in enumerate(zip(item["prompts"], item["written"], strict=True)):
        text = [*prompt, *written[:-1]]
        windows[row, : len(text)] = text
        places += [(row, column) for column in range(len(prompt) - 1, len(text))]
    model = StreamedModel(checkpoint)
    hidden = model.hidden_states(windows, progress)
    rows, columns = (torch.tensor(axis) for axis in zip(*places, strict=True))
    best, choices = np.full(len(places), -np.inf, np.float32), np.zeros(len(places), np.int64)
    for start, block in model.logits(hidden[rows, columns][None]):
        found = block.argmax(axis=1)
        values = block[np.arange(len(block)), found]
        better = values > best
        best[better], choices[better] = values[better], start + found[better]
    chosen = np.split(choices, np.cumsum([len(written) for written in item["written"]])[:-1])
    return _answers(item, [_until(w, c.tolist()) for w, c in zip(item["written"], chosen, strict=True)], whole=False)


@torch.inference_mode()
def whole(model: Any, item: Json) -> Json:  # noqa: ANN401 - transformers' own
    """Let the whole source write: one pass over what the artifact wrote, then token by token from the difference."""
    sources = []
    for prompt, written, limit in zip(item["prompts"], item["written"], item["limits"], strict=True):
        ids = torch.tensor([[*prompt, *written[:-1]]])
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(written)).logits
        source = _until(written, logits[0, -len(written) :].argmax(-1).tolist())
        if source != written:
            source += _continued(model, [*prompt, *source], limit - len(source), set(item["stop"]), source[-1])
        sources.append(source)
    return _answers(item, sources, whole=True)


def _continued(model: Any, ids: list[int], count: int, stop: set[int], last: int) -> list[int]:  # noqa: ANN401
    """Return ``count`` more tokens, greedily, or fewer where one of ``stop`` ends the text."""
    made: list[int] = []
    cache, feed = None, torch.tensor([ids])
    while len(made) < count and last not in stop:
        out = model(input_ids=feed, cache=cache, use_cache=True, logits_to_keep=1)
        last, cache = int(out.logits[0, -1].argmax()), out.past_key_values
        made.append(last)
        feed = torch.tensor([[last]])
    return made


def _until(written: list[int], choices: list[int]) -> list[int]:
    """Return the source's tokens up to and including the first that differs; all of them where none does."""
    for index, (own, choice) in enumerate(zip(written, choices, strict=True)):
        if own != choice:
            return [*written[:index], choice]
    return written


def _answers(item: Json, sources: list[list[int]], *, whole: bool) -> Json:
    tokenizer = prompts.tokenizer_of(Path(item["directory"]))
    samples = []
    for written, source in zip(item["written"], sources, strict=True):
        different = (i for i, (own, other) in enumerate(zip(written, source, strict=False)) if own != other)
        first = next(different, None)
        samples.append(
            {
                "artifact": tokenizer.decode(written, skip_special_tokens=True),
                "source": tokenizer.decode(source, skip_special_tokens=True),
                "first_difference": first,
                "source_complete": whole or first is None,
            }
        )
    return {"samples": samples}


def _longest(item: Json) -> int:
    return max(len(p) + len(w) - 1 for p, w in zip(item["prompts"], item["written"], strict=True))
