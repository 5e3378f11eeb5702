"""NVIDIA GPUs through the CUDA provider of onnxruntime-gpu, which excludes the ordinary onnxruntime."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.contracts import CacheType, Scheme
from compress.environments import Environment
from compress.providers._base import OrtProvider

#: CUDA and cuDNN come with it as wheels: onnxruntime-gpu preloads them from there.
ENVIRONMENT = Environment("cuda", ("onnxruntime-gpu[cuda,cudnn]==1.31.1", "numpy>=2.1,<3"))
_TIMEOUT_SECONDS = 20


class CudaProvider(OrtProvider):
    """The CUDA provider."""

    name = "cuda"
    onnxruntime_name = "CUDAExecutionProvider"
    cache_device = "cuda"
    package = "onnxruntime-gpu"
    environment = ENVIRONMENT

    def missing(self) -> str | None:
        """Return what this machine lacks: the driver, or a device that it sees."""
        return missing_gpu()

    def remedy(self) -> str | None:
        """Return what to do about it."""
        return "an NVIDIA GPU with its driver (nvidia-smi lists it), then: compress doctor --install cuda"

    def here(self) -> bool:
        """Return ``False``: this Python has the ordinary onnxruntime."""
        return False

    def device(self) -> str:
        """Return the GPU's name and driver, as nvidia-smi has them."""
        return gpu_names() or "an NVIDIA GPU"

    def start(self, ort: Any, model: Path, options: Any, provider_options: Mapping[str, str]) -> Any:  # noqa: ANN401
        """Start the session, CUDA's libraries loaded from their wheels."""
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        return super().start(ort, model, options, provider_options)

    def supports(self, scheme: Scheme) -> str | None:
        """Return why ``MatMulNBits`` cannot run a scheme fast on CUDA, or ``None``."""
        if scheme.activations == "none" and scheme.bits == 2:
            return "2-bit weights have no kernel on cuda; use 4 or 8 bits"
        return super().supports(scheme)

    def supports_cache(self, kept: CacheType) -> str | None:
        """Return why a cache of bytes is not offered: it is wrong, without an error, unless past and present are one.

        Seen with onnxruntime-gpu 1.31.1 on an H100 (docs/benchmarks.md).
        """
        if kept == "int8":
            return "a cache kept as int8 is read wrongly on cuda wherever past and present are two buffers"
        return super().supports_cache(kept)


def missing_gpu() -> str | None:
    """Return what is missing for CUDA on this machine, ``None`` if nothing is."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"there is no NVIDIA driver on this machine ({library} cannot be loaded)"
    count = ctypes.c_int(0)
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    return "the NVIDIA driver is there, but sees no GPU" if failed or not count.value else None


def gpu_names() -> str | None:
    """Return the GPUs by nvidia-smi, ``None`` where it cannot say."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return "; ".join(f"{line.strip()}".replace(",", ", driver", 1) for line in done.stdout.splitlines() if line.strip())


PROVIDER = CudaProvider()
