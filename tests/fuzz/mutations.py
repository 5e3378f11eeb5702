"""Cases made of seeds: a valid document with one thing or a few wrong, which random bytes hardly ever are."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

#: Values that a reader may not expect where a number, a name or a list is.
ODD: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 8, 64, 255, 256, 65535, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 64, 10**30,
    10**70, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), True, False, None, "", "a", "x" * 300,
    "../x", "/etc/passwd", "a/../b", "C:\\x", "\x00", "\x1b[2J", "\u202e", "\ud800", "__class__", "{{", "(a+)+$", [],
    {}, [[]], [1] * 40, {"": 0}, ["a", 1, None], {"a": {"a": {"a": {}}}},
)  # fmt: skip
NUMBERS = (0, 1, 2, 3, 7, 8, 9, 12, 31, 32, 127, 128, 255, 256, 65535, 65536, 1 << 24, (1 << 31) - 1, 1 << 31,
           (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip

Mutation = Callable[[bytes, random.Random], bytes]


def mutate(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Return a case: changed by its format's structure, one in three times in its bytes as well."""
    changed = data
    way = _way(data)
    if way is not None and rng.random() < 0.8:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            changed = way(changed, rng)
    if way is None or changed == data or rng.random() < 0.3:
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            changed = _bytes(changed, others, rng)
    return changed[: 1 << 20]


def _way(data: bytes) -> Mutation | None:
    start = data.lstrip()[:1]
    if data[:4] == b"GGUF":
        return _gguf
    if start in (b"{", b"["):
        return _json_lines if b"}\n{" in data else _json
    if len(data) > 8 and data[8:9] == b"{":
        return _safetensors
    return None


# -------------------------------------------------------------------------------------------------------------- JSON


def _json(data: bytes, rng: random.Random) -> bytes:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    kind = rng.random()
    if kind < 0.05:
        depth = rng.choice((10, 31, 33, 100, 5000))
        return b'{"a":' * depth + b"1" + b"}" * depth
    places = _places(value)
    parent, key = rng.choice(places) if places else (None, None)
    if parent is None:
        value = rng.choice(ODD)
    elif kind < 0.2:
        del parent[key]
    elif kind < 0.3 and isinstance(parent, dict):
        parent[rng.choice(("", "a", str(key) + "s", "__metadata__", "auto_map", "0", "-1"))] = parent[key]
    elif kind < 0.4 and len(places) > 1:
        parent[key] = rng.choice(places)[0]
    elif kind < 0.5 and isinstance(parent[key], list):
        parent[key] = parent[key] * rng.choice((2, 100))
    elif kind < 0.6 and isinstance(parent[key], int):
        parent[key] = parent[key] + rng.choice((-1, 1, 7))
    elif kind < 0.7 and isinstance(parent[key], str):
        text = parent[key]
        parent[key] = rng.choice(
            (text * 50, text[:-1], text.upper(), f"../{text}", f"/{text}", text + "\0", text[::-1])
        )
    else:
        parent[key] = rng.choice(ODD)
    try:
        written = json.dumps(value)[: 1 << 20].encode()
    except (ValueError, RecursionError):  # a document inside itself
        return data
    if kind > 0.97 and written.startswith(b"{") and isinstance(value, dict) and value:
        name = rng.choice(list(value))
        written = written[:-1] + b", " + json.dumps(name).encode() + b": 1}"
    return written


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) of a document, at most some thousands."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting and len(found) < 4000:
        item = waiting.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        for key in keys:
            found.append((item, key))
            waiting.append(item[key])
    return found


def _json_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    lines[place] = _json(lines[place], rng)
    return b"\n".join(lines)


# -------------------------------------------------------------------------------------------------------- containers


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    length = min(int.from_bytes(data[:8], "little"), len(data) - 8)
    header = _json(data[8 : 8 + length], rng)
    told = len(header) if rng.random() < 0.9 else rng.choice(NUMBERS)
    return struct.pack("<Q", told) + header + data[8 + length :]


def _gguf(data: bytes, rng: random.Random) -> bytes:
    """Put a number where a count, a length, a type or an offset may be: after a name, or in the preamble."""
    width = rng.choice((4, 8))
    if rng.random() < 0.2:
        place = rng.choice((4, 8, 16))
    else:
        names = [
            i for i in range(24, len(data) - 16) if data[i : i + 1].isalpha() and not data[i + 1 : i + 2].isalnum()
        ]
        place = (rng.choice(names) if names else rng.randrange(len(data))) + rng.choice((1, 5, 9, 13, 17, 21))
    number = struct.pack("<Q", rng.choice(NUMBERS))[:width]
    return data[:place] + number + data[place + width :]


# --------------------------------------------------------------------------------------------------------------- bytes


def _bytes(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    if not data:
        return rng.randbytes(rng.randrange(1, 64))
    place, stop = sorted((rng.randrange(len(data)), rng.randrange(len(data)) + 1))
    kind = rng.randrange(9)
    if kind == 0:
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == 1:
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if kind == 2:
        return data[:place] + rng.randbytes(rng.randrange(1, 9)) + data[place:]
    if kind == 3:
        return data[:place] + data[min(stop, place + rng.randrange(1, 64)) :]
    if kind == 4:
        return data[:place]
    if kind == 5:
        return data[:stop] + data[place:]
    if kind == 6:
        width = rng.choice((1, 2, 4, 8))
        return data[:place] + struct.pack("<Q", rng.choice(NUMBERS))[:width] + data[place + width :]
    if kind == 7 and others:
        other = rng.choice(others)
        return data[:place] + other[rng.randrange(len(other) + 1) :]
    word = rng.choice(
        (b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\n", b"{{", b"}}", b"%}", b"999999999999", b"-1", b"e999", b"[[[")
    )
    return data[:place] + word * rng.choice((1, 1, 40)) + data[place:]
