"""What the source writes after prompts, beside what the artifact wrote: jobs of the reference worker.

``prompts``: ``directory`` (the artifact's), ``texts`` -> ``ids`` of each, ``chat`` (whether a template was applied),
``stop`` (ids that end a text), or ``reason`` why there are none.

``samples``: ``directory``, ``prompts`` [ids], ``written`` [the artifact's new ids, the one that ended it among them],
``limits`` [new tokens at most], ``stop``, ``by_rows`` (of the streamed source) -> ``samples``, an entry a prompt:
``artifact`` and ``source`` (texts), ``first_difference`` (index of a new token, or null), ``source_complete``.
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
    model = StreamedModel(checkpoint, by_rows=bool(item.get("by_rows")))
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
    """Let the whole source write: a pass over each of the artifact's texts, then on from the differences, together."""
    sources = []
    for prompt, written in zip(item["prompts"], item["written"], strict=True):
        ids = torch.tensor([[*prompt, *written[:-1]]])
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(written)).logits
        sources.append(_until(written, logits[0, -len(written) :].argmax(-1).tolist()))
    stop = set(item["stop"])
    open_ended = [
        row
        for row, (source, written) in enumerate(zip(sources, item["written"], strict=True))
        if source != written and source[-1] not in stop and len(source) < item["limits"][row]
    ]
    begun = [[*item["prompts"][row], *sources[row]] for row in open_ended]
    room = [item["limits"][row] - len(sources[row]) for row in open_ended]
    for row, more in zip(open_ended, _continued(model, begun, room, stop), strict=True):
        sources[row] = [*sources[row], *more]
    return _answers(item, sources, whole=True)


def _continued(model: Any, texts: list[list[int]], room: list[int], stop: set[int]) -> list[list[int]]:  # noqa: ANN401
    """Return what follows each text, greedily: as many tokens as it has room for, or up to one of ``stop``.

    One step writes a token of every text: weights are what takes its time, and they are read once.
    """
    if not texts:
        return []
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max(room),
        do_sample=False,
        eos_token_id=sorted(stop) or None,
        pad_token_id=0,
    )
    found = []
    for row, count in zip(out[:, longest:].tolist(), room, strict=True):
        made = row[:count]
        end = next((place for place, token in enumerate(made) if token in stop), count)
        found.append(made[: end + 1])
    return found


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
