"""What a run ran on: versions, processor, memory. Imports none of the libraries it names."""

from __future__ import annotations

import hashlib
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import compress
from compress.errors import UsageError
from compress.report.model import Environment

LIBRARIES = ("mobius-onnx", "numpy", "onnx", "onnx-ir", "onnxruntime", "tokenizers", "torch", "transformers")
# What kernels for quantized weights look for, by /proc/cpuinfo's names.
INSTRUCTION_SETS = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip


def created() -> str:
    """Return the time, ISO 8601 in UTC to the second; what ``SOURCE_DATE_EPOCH`` says, where that is set.

    Raises:
        UsageError: It is no number of seconds that a date can have.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given is None:
        return datetime.now(UTC).isoformat(timespec="seconds")
    try:
        return datetime.fromtimestamp(int(given), UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"SOURCE_DATE_EPOCH is no time: {given[:40]!r}", hint="give seconds since 1970, or unset it"
        ) from None


def environment() -> Environment:
    """Describe this process's surroundings."""
    versions = {"python": platform.python_version(), "compress": compress.__version__}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    name, flags = cpu(_text("/proc/cpuinfo"))
    return Environment(
        versions=versions,
        cpu=name or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        instruction_sets=tuple(flag for flag in INSTRUCTION_SETS if flag in flags),
        os=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        memory_bytes=_memory(_text("/proc/meminfo")),
    )


def cpu(cpuinfo: str) -> tuple[str, frozenset[str]]:
    """Return the processor's name and its flags from ``/proc/cpuinfo``; empty where the kernel does not say."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or fields.get("Model") or fields.get("Hardware") or ""
    return name, frozenset((fields.get("flags") or fields.get("Features") or "").split())


def processor() -> dict[str, str]:
    """Return what the order of floating-point sums may depend on: architecture, processor, its instruction sets."""
    name, flags = cpu(_text("/proc/cpuinfo"))
    digest = hashlib.sha256(" ".join(sorted(flags)).encode()).hexdigest()[:16]
    return {"architecture": platform.machine(), "name": name, "flags": digest}


def _memory(meminfo: str) -> int | None:
    lines = (line.split() for line in meminfo.splitlines())
    return next((int(parts[1]) * 1024 for parts in lines if parts[:1] == ["MemTotal:"]), None)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
