"""Sizes as people write and read them."""

from __future__ import annotations

import pytest

from compress.errors import UsageError
from compress.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0), ("800", 800), ("800b", 800), ("1KB", 1000), ("1k", 1000), ("800MB", 800_000_000),
        ("1.5 GB", 1_500_000_000), (" 2GiB ", 2 << 30), ("2gi", 2 << 30), ("0.5tib", 1 << 39), ("3T", 3 * 10**12),
    ],
)  # fmt: skip
def test_parse(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["", "MB", "-1GB", "1e9", "1,5GB", "5i", "5ib", "1PB", "nan", "9" * 400, "1GB extra", "\u0661GB", "1.GB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size") as caught:
        parse_size(text)
    assert "800MB" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (86_543_210, "86.54 MB"),
        (113_600_000, "114 MB"),
        (2.8e9, "2.80 GB"),
    ],
)
def test_format(count: float, text: str) -> None:
    assert format_size(count) == text
