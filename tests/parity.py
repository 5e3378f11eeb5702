"""A decoder's artifact beside PyTorch: prefill, cached decoding, a padded batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plain_decoder import PlainDecoder
from tiny_models import LONG_ROPE_SWITCH, SLIDING_WINDOW, VOCABULARY

PROMPT, SHORT, STEPS = 30, 21, 8
assert SLIDING_WINDOW < SHORT and PROMPT < LONG_ROPE_SWITCH < PROMPT + STEPS


@dataclass(frozen=True)
class Expected:
    """PyTorch's logits: of both rows of a padded prefill, and of every decode step after it ``[step, row, V]``."""

    ids: np.ndarray
    new: np.ndarray
    prefill: np.ndarray
    decode: np.ndarray


def load(directory: Path) -> Any:
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def expected_logits(model: Any) -> Expected:
    """Run transformers: the padded prefill as a batch, decode steps row by row without padding.

    A padded slot would count in transformers' sliding window; rows on their own have none. LongRoPE, which has no
    window, chooses its factors by the longest row of a batch: there the batch decodes together.
    """
    import torch

    random = np.random.default_rng(0)
    ids = random.integers(3, VOCABULARY, (2, PROMPT))
    new = random.integers(3, VOCABULARY, (STEPS, 2, 1))
    lengths = (PROMPT, SHORT)
    mask = torch.tensor([[int(column < length) for column in range(PROMPT)] for length in lengths])
    with torch.no_grad():
        prefill = model(input_ids=torch.tensor(ids), attention_mask=mask, use_cache=True)
        decode = np.empty((STEPS, 2, VOCABULARY), np.float32)
        if (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
            past = prefill.past_key_values
            for step in range(STEPS):
                mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
                positions = torch.tensor([[length + step] for length in lengths])
                out = model(input_ids=torch.tensor(new[step]), attention_mask=mask, position_ids=positions, cache=past)
                past, decode[step] = out.past_key_values, out.logits[:, -1].numpy()
        else:
            for row, length in enumerate(lengths):
                past = model(input_ids=torch.tensor(ids[row : row + 1, :length]), use_cache=True).past_key_values
                for step in range(STEPS):
                    out = model(input_ids=torch.tensor(new[step, row : row + 1]), cache=past)
                    past, decode[step, row] = out.past_key_values, out.logits[0, -1].numpy()
    return Expected(ids, new, prefill.logits.numpy(), decode)


def prefill(decoder: PlainDecoder, ids: np.ndarray, lengths: tuple[int, ...], keep: int | None = None) -> np.ndarray:
    decoder.reset()
    width = ids.shape[1]
    mask = np.array([[int(column < length) for column in range(width)] for length in lengths])
    return decoder.feed(ids, mask, np.tile(np.arange(width), (len(lengths), 1)), keep)


def decode(decoder: PlainDecoder, new: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    """Return the last logits of every step ``[step, row, V]``; a row's mask sums to its own length."""
    steps = []
    for step, tokens in enumerate(new):
        mask = np.array(
            [[int(column < length or column >= PROMPT) for column in range(PROMPT + step + 1)] for length in lengths]
        )
        positions = np.array([[length + step] for length in lengths])
        steps.append(decoder.feed(tokens, mask, positions)[:, -1])
    return np.array(steps)


def differences(artifact: Path, expected: Expected) -> dict[str, float]:
    """Return the largest logit difference of every phase."""
    decoder = PlainDecoder(artifact)
    found = {"prefill": float(np.abs(prefill(decoder, expected.ids[:1], (PROMPT,)) - expected.prefill[:1]).max())}
    alone = decode(decoder, expected.new[:, :1], (PROMPT,))
    found["decode"] = float(np.abs(alone[:, 0] - expected.decode[:, 0]).max())
    lengths = (PROMPT, SHORT)
    both = prefill(decoder, expected.ids, lengths)
    for row, length in enumerate(lengths):
        found[f"batch row {row}"] = float(np.abs(both[row, :length] - expected.prefill[row, :length]).max())
    after = np.abs(decode(decoder, expected.new, lengths) - expected.decode).max(axis=(0, 2))
    found |= {f"batch decode row {row}": float(value) for row, value in enumerate(after)}
    return found
