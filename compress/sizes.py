"""Sizes as people write and read them: decimal units, ``1GB`` is 10**9 bytes, ``1GiB`` 2**30."""

from __future__ import annotations

import re

from compress.errors import UsageError

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS = {**_DECIMAL, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Return bytes for ``800MB``, ``1.5 GiB`` or a bare number of bytes.

    Raises:
        UsageError: It is not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"{text!r} is not a size", hint="write 800MB, 1.5GB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_size(count: float) -> str:
    """Return bytes as a short decimal size, three significant digits or more."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.2f} {unit}" if count < 100 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f} B"
