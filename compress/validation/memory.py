"""Whether a float model is going to fit, told before it is loaded."""

from __future__ import annotations

from pathlib import Path

from compress.errors import ResourceError


def check_memory(needed: int, cap: int | None) -> None:
    """Refuse what is predicted not to fit.

    Args:
        needed: Predicted bytes.
        cap: The most that may be used, or ``None``; what the kernel calls available counts in any case.

    Raises:
        ResourceError: It does not fit.
    """
    for limit, name in ((cap, "allowed"), (available_memory(), "available")):
        if limit is not None and needed > limit:
            raise ResourceError(
                f"the float32 model needs about {needed / 1e9:.2g} GB of memory, {limit / 1e9:.2g} GB are {name}"
            )


def available_memory() -> int | None:
    """Return the bytes the kernel would give without swapping (``MemAvailable``), or ``None`` where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
