"""How much of the evaluation text was in the calibration text.

Drift measured on what a model was calibrated on is too good to be true. Eight words in a row are the usual sign that
one text was copied from another (GPT-3 looked for 8 to 13: Brown et al. 2020, appendix C): other texts of the same
domain share next to none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import islice

import numpy as np
import numpy.typing as npt

WORDS = 8
#: Words that are hashed at once, and hashes of words that are kept.
_BLOCK, _KEPT = 1 << 16, 1 << 18
# Chinese and Japanese put no spaces between words: each of their characters counts as one.
_WORD = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff]|[^\s\u2e80-\u9fff\uf900-\ufaff]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: no information is lost by multiplying

Hashes = npt.NDArray[np.uint64]


def overlap(calibration: str, evaluation: str) -> float:
    """Return the share of the evaluation text's 8-word sequences that occur in the calibration text, 0..1.

    Case and the amount of white space do not count. A sequence counts as often as the evaluation text has it. An
    evaluation text of fewer words is one sequence; one without words overlaps with nothing.

    Args:
        calibration: Read word by word: some tens of megabytes, however long it is.
        evaluation: Takes some 50 bytes a word.
    """
    words = np.concatenate([np.empty(0, np.uint64), *_hashes(evaluation)])
    width = min(WORDS, len(words))
    if not width:
        return 0.0
    wanted, counts = np.unique(_sequences(words, width), return_counts=True)
    found = np.zeros(len(wanted), bool)
    before = np.empty(0, np.uint64)
    for block in _hashes(calibration):
        words = np.concatenate([before, block])
        before = words[max(0, len(words) - width + 1) :]
        if len(words) < width:
            continue
        seen = _sequences(words, width)
        place = np.minimum(np.searchsorted(wanted, seen), len(wanted) - 1)
        found[place[wanted[place] == seen]] = True
    return float(counts[found].sum() / counts.sum())


def _hashes(text: str) -> Iterator[Hashes]:
    """Yield 64-bit hashes of a text's words, many at a time."""
    known: dict[str, int] = {}

    def number(word: str) -> int:
        value = known.get(word)
        if value is None:
            if len(known) >= _KEPT:
                known.clear()
            value = int.from_bytes(hashlib.blake2b(word.casefold().encode(), digest_size=8).digest(), "little")
            known[word] = value
        return value

    words = (number(match.group()) for match in _WORD.finditer(text))
    while len(block := np.fromiter(islice(words, _BLOCK), np.uint64)):
        yield block


def _sequences(words: Hashes, width: int) -> Hashes:
    """Return a hash of every ``width`` words in a row, in which their order counts: uint64 ``[words - width + 1]``."""
    count = len(words) - width + 1
    total = np.zeros(count, np.uint64)
    for offset in range(width):
        total = (total ^ words[offset : offset + count]) * _FACTOR  # modulo 2**64
        total ^= total >> np.uint64(29)
    return total
