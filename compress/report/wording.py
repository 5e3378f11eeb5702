"""Numbers and hostile text as pages show them: no more digits than were measured, nothing that hides or reorders."""

from __future__ import annotations

import math
import re

from compress.report.model import Evidence

NOT_MEASURED = "not measured"
#: Half the width of a 95 % interval in standard errors, by the normal distribution.
Z95 = 1.96

EVIDENCE: dict[Evidence, str] = {
    "measured": "measured on the device itself",
    "simulated": "simulated: a vendor's simulator stood in for the device, and its time is no device's",
    "emulated": "emulated: another processor did the work in software, and its time is no device's",
    "static": "only looked up: the graph's operators were compared with what the provider supports, nothing ran",
    "none": "nothing ran",
}
STATES = {
    "ran": "ran",
    "fell_back": "left nodes to another provider",
    "failed": "failed",
    "checked": "was only looked up",
}

# Controls but tab and newline, what reorders (bidirectional controls and marks) or is not seen, and lone surrogates.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u115f\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff]"
)


def visible(text: str) -> str:
    """Return text whose controls, direction marks, unseen characters and lone surrogates are spelled out."""
    return _UNSEEN.sub(lambda match: f"\N{LEFT CEILING}U+{ord(match[0]):04X}\N{RIGHT CEILING}", text)


def plain(value: float) -> str:
    """Return three significant digits, or all before the point; an exponent only far below what can be read."""
    if value == 0 or 1e-4 <= abs(value) < 999.5:
        return f"{value:#.3g}".rstrip(".") if value else "0"
    return f"{value:,.0f}" if abs(value) >= 1 else f"{value:.1e}".replace("e-0", "e-")


def digits_of(error: float | None, fallback: int = 4) -> int:
    """Return how many decimals a value with this standard error has: to the error's second digit."""
    if not error:
        return fallback
    return min(max(1 - math.floor(math.log10(error)), 0), 8)


def with_error(value: float, error: float | None) -> str:
    """Return a value with its standard error, both to the error's second digit."""
    if error is None:
        return f"{value:.4g}"
    decimals = digits_of(error)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def interval(
    value: float, error: float | None, *, lowest: float = -math.inf, highest: float = math.inf, scale: float = 1.0
) -> str | None:
    """Return the 95 % interval of a mean, ``None`` without a standard error.

    Args:
        value: The mean.
        error: Its standard error.
        lowest: What the measure cannot go below.
        highest: What it cannot go above.
        scale: What both are multiplied by: 100 for shares that are shown in per cent.
    """
    if error is None:
        return None
    low, high = max(value - Z95 * error, lowest), min(value + Z95 * error, highest)
    decimals, unit = digits_of(error * scale), "%" if scale == 100 else ""
    return f"{low * scale:.{decimals}f} to {high * scale:.{decimals}f}{unit}"


def share(value: float, error: float | None = None) -> str:
    """Return a share in per cent, with its standard error where there is one."""
    if error is None:
        return f"{value:.1%}"
    decimals = digits_of(error * 100)
    return f"{value * 100:.{decimals}f} ± {error * 100:.{decimals}f}%"


def times(ratio: float) -> str:
    """Return a ratio of two sizes or rates."""
    return f"{ratio:.2f}×"


def seconds(value: float) -> str:
    """Return a time in seconds, in minutes where they are many."""
    if value >= 120:
        return f"{int(value // 60)} min {value % 60:.0f} s"
    return f"{value:.1f} s" if value >= 0.95 else f"{value * 1000:.0f} ms"


def count(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def moment(told: str) -> str:
    """Return an ISO 8601 time in UTC to the minute, anything else as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(?:Z|\+00:00)", told, re.ASCII)
    return f"{found[1]} {found[2]} UTC" if found else told
