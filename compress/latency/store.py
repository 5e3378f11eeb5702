"""Measured points on disk, one file for each machine: a second prediction takes no time.

A file is named after everything that a time depends on: processor and instruction sets, cores, onnxruntime, threads,
how the parts are built and measured. Whatever is wrong with a file counts as absent, and is measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from compress.environments import cache_directory
from compress.report.environment import environment

#: How parts are built and measured; another number makes every point anew.
METHOD = 1
_MAX_BYTES = 64 << 20


def machine() -> dict[str, object]:
    """Return what a time depends on besides the point and the threads."""
    here = environment()
    return {
        "cpu": here.cpu,
        "model": _cpu_model(),
        "instruction_sets": sorted(here.instruction_sets),
        "cores": here.cores,
        "architecture": here.architecture,
        "onnxruntime": metadata.version("onnxruntime"),
        "method": METHOD,
    }


def _cpu_model() -> str:
    """Return family, model and stepping: virtual machines call every processor by one name."""
    with contextlib.suppress(OSError):
        fields = dict(_field(line) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        return " ".join(fields.get(name, "") for name in ("cpu family", "model", "stepping", "CPU part"))
    return ""


def _field(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


class Store:
    """The points of this machine at a number of threads, in seconds by :attr:`compress.latency.parts.Point.key`."""

    def __init__(self, threads: int, described: Mapping[str, object] | None = None) -> None:
        self._machine = {**(machine() if described is None else described), "threads": threads}
        told = json.dumps(self._machine, sort_keys=True)
        self.path = cache_directory() / "latency" / f"{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"

    def read(self) -> dict[str, float]:
        """Return every point that is there."""
        try:
            if self.path.stat().st_size > _MAX_BYTES:
                return {}
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        points = document.get("points") if isinstance(document, dict) else None
        if not isinstance(points, dict) or document.get("machine") != self._machine:
            return {}
        return {key: float(value) for key, value in points.items() if _is_time(value)}

    def add(self, points: Mapping[str, float]) -> None:
        """Add points to those that are there; a cache that cannot be written is none, and no error."""
        document = {"machine": self._machine, "points": dict(sorted({**self.read(), **points}.items()))}
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem, suffix=".part")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as stream:
                    json.dump(document, stream, indent=0)
                Path(name).replace(self.path)
            except OSError:
                Path(name).unlink(missing_ok=True)
                raise


def _is_time(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value >= 0
