"""The text that drift is measured on, and its tokens in windows.

Without the user's own text it is the Python language reference that ships with CPython (``pydoc_data.topics``): long
English prose, present wherever Python is, and never downloaded. It comes in two halves that share no paragraph, one to
calibrate on and one to evaluate on.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from compress.errors import CompressError, SourceError, UsageError
from compress.source.files import open_regular
from compress.tokens import Tokenizer

Half = Literal["calibration", "evaluation"]
Windows = npt.NDArray[np.int64]
# No tokenizer in use spends more bytes on a token of running text; one that does gets the "too short" error.
BYTES_PER_TOKEN = 64
MINIMUM_BYTES = 1 << 20


@dataclass(frozen=True)
class Text:
    """A text with its provenance: what it is called, and the SHA-256 (hexadecimal) of all of it as UTF-8.

    ``content`` may be the beginning of a long file, or excerpts; ``sha256`` is the whole file's.
    """

    name: str
    sha256: str
    content: str


def embedded(half: Half) -> Text:
    """Return one half of the Python language reference, about 150,000 characters.

    Topics repeat each other's sections (``compound`` holds ``if``, ``for`` ...), so a paragraph counts for the longest
    topic that has it. Topics then go, longest first, to the shorter half: both are running text, and disjoint.
    """
    from pydoc_data.topics import topics

    halves: dict[Half, dict[str, str]] = {"calibration": {}, "evaluation": {}}
    sizes: dict[Half, int] = {"calibration": 0, "evaluation": 0}
    seen: set[str] = set()
    for name in sorted(topics, key=lambda topic: (-len(topics[topic]), topic)):
        own = []
        for paragraph in topics[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                own.append(paragraph.rstrip())
        target: Half = "evaluation" if sizes["evaluation"] <= sizes["calibration"] else "calibration"
        halves[target][name] = "\n\n".join(own)
        sizes[target] += len(halves[target][name])
    content = "\n\n".join(halves[half][name] for name in sorted(halves[half]) if halves[half][name])
    name = f"python-{platform.python_version()}-language-reference/{half}"
    return Text(name, hashlib.sha256(content.encode()).hexdigest(), content)


def from_file(path: Path, tokens: int, *, excerpts: int = 1) -> Text:
    """Read the user's text, as much of it as ``tokens`` tokens need.

    Args:
        path: The file.
        tokens: How many it must be enough for.
        excerpts: A longer file is read in so many places, evenly spaced from its beginning to its end; 1 is the
            beginning alone. Excerpts begin and end with whole words, and a blank line parts them.

    Raises:
        UsageError: The file is missing, empty, or not UTF-8 text.
    """
    limit = max(MINIMUM_BYTES, BYTES_PER_TOKEN * tokens)
    try:
        with open_regular(path, str(path)) as stream:
            size = stream.seek(0, os.SEEK_END)
            count = excerpts if size > limit else 1
            share = limit // count
            pieces = []
            for index in range(count):
                start = (size - share) * index // max(1, count - 1) if size > share else 0
                stream.seek(start)
                pieces.append(_decoded(_read(stream, share), start, size, path))
            # After what is read of it was found to be text: a large file of anything else need not be digested.
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except SourceError as error:
        raise UsageError(f"the text cannot be read: {error.what}", where=error.where, hint=error.hint) from error
    except OSError as error:
        raise UsageError(f"the text cannot be read: {error.strerror}", where=str(path)) from error
    content = pieces[0] if count == 1 else "\n\n".join(map(_whole_words, pieces))
    if not content.strip():
        raise UsageError("the text is empty", where=str(path))
    return Text(path.name, digest, content)


def _read(stream: io.FileIO, count: int) -> bytes:
    """Return ``count`` bytes, fewer where the file ends before."""
    parts: list[bytes] = []
    while count and (data := stream.read(count)):
        parts.append(data)
        count -= len(data)
    return b"".join(parts)


def _decoded(data: bytes, start: int, size: int, path: Path) -> str:
    """Decode what stands at byte ``start`` of a file of ``size`` bytes; characters cut at its ends are left out."""
    skipped = 0
    if start:
        while skipped < min(3, len(data)) and data[skipped] & 0xC0 == 0x80:  # the rest of a character
            skipped += 1
    decoder = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")()
    try:
        content = decoder.decode(data[skipped:], final=start + len(data) >= size)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the text is not UTF-8 (byte {start + skipped + error.start})",
            where=str(path),
            hint="convert it to UTF-8 plain text",
        ) from error
    if "\0" in content:
        raise UsageError("the file is not text: it has NUL bytes", where=str(path))
    return content


def _whole_words(piece: str) -> str:
    """Leave out the words that the cut went through: the first and the last, if there are others."""
    words = re.search(r"\s(.*)\s", piece, re.DOTALL)
    return words.group(1).strip() if words and words.group(1).strip() else piece


def tokenize(text: str, directory: Path) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before a text (BOS, often none), and the text's own ids.

    Args:
        text: What to encode.
        directory: Where ``tokenizer.json`` is. Without one, transformers makes a tokenizer of what is there, in a
            process of its own.

    Raises:
        CompressError: There is no tokenizer, or it is damaged.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return _tokenize_with_transformers(text, directory)
    with Tokenizer(path=path) as tokenizer:
        prefix = split_prefix(tokenizer.ids("a", special=True), tokenizer.ids("a"))
        return prefix, tokenizer.ids(text)


def split_prefix(special: list[int], plain: list[int]) -> list[int]:
    """Return what stands before ``plain`` in ``special``: the ids a tokenizer prepends."""
    for start in range(len(special) - len(plain) + 1):
        if special[start : start + len(plain)] == plain:
            return special[:start]
    return []


def windows(text: Text, directory: Path, *, length: int, tokens: int, vocab_size: int) -> Windows:
    """Cut a text into consecutive windows that do not overlap.

    Args:
        text: The text.
        directory: Where the tokenizer is.
        length: Tokens a window, those the tokenizer prepends included.
        tokens: How many to use at most; a rest shorter than a window is left out.
        vocab_size: Rows of the model's output head.

    Returns:
        int64 ``[windows, length]``, at least one window.

    Raises:
        UsageError: The text has fewer tokens than a window takes, or lengths make no sense.
        CompressError: The tokenizer is missing, damaged, or not this model's.
    """
    prefix, ids = tokenize(text.content, directory)
    own = length - len(prefix)
    if own < 2 or tokens < length:
        raise UsageError(
            f"windows of {length} tokens cannot be cut from {tokens} tokens", hint="use at least 8 a window"
        )
    count = min(tokens // length, len(ids) // own)
    if count < 1:
        raise UsageError(
            f"the text has {len(ids)} tokens, one window needs {own}", where=text.name, hint="use a longer text"
        )
    body = np.array(ids[: count * own], np.int64).reshape(count, own)
    cut = np.hstack([np.tile(np.array(prefix, np.int64), (count, 1)), body])
    check_ids(cut, vocab_size, directory)
    return cut


def beginning(text: Text, directory: Path, *, length: int, tokens: int) -> str:
    """Return the part of a text that :func:`windows` cuts, of the same lengths; all of it without ``tokenizer.json``.

    Args:
        text: The text.
        directory: Where the tokenizer is.
        length: Tokens a window, those the tokenizer prepends included.
        tokens: How many are used at most.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return text.content  # what transformers makes of other files does not say where a token stands
    prefix, _ = tokenize("a", directory)
    with Tokenizer(path=path) as tokenizer:
        places = tokenizer.encode([(text.content, None)], fields=("offsets",))[0].offsets
    own = length - len(prefix)
    used = min(tokens // length, len(places) // own) * own
    if not used:
        return ""
    end = re.compile(r"\s|$").search(text.content, places[used - 1][1])  # a token may end inside a word
    return text.content[: end.start()] if end else text.content


def check_ids(ids: Windows, vocab_size: int, directory: Path) -> None:
    """Refuse ids int64 ``[windows, length]`` that the model has no rows for.

    Raises:
        CompressError: The tokenizer in ``directory`` is another model's.
    """
    if ids.max() >= vocab_size:
        raise CompressError(
            f"the tokenizer gives id {ids.max()}, the model's vocabulary has {vocab_size}",
            where=str(directory),
            hint="use the tokenizer that belongs to the model",
        )


def random_windows(vocab_size: int, count: int, length: int, seed: int) -> Windows:
    """Return uniformly random ids int64 ``[count, length]``, for a model without a tokenizer."""
    return np.random.default_rng(seed).integers(0, vocab_size, (count, length), dtype=np.int64)


def _tokenize_with_transformers(text: str, directory: Path) -> tuple[list[int], list[int]]:
    from compress.validation.protocol import run_worker

    request = {"directory": str(directory), "texts": ["a", text]}
    (special, plain), (_, ids) = run_worker("tokenization", request, timeout=300)["results"]
    return split_prefix(special, plain), list(ids)
