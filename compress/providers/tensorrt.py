"""NVIDIA GPUs through TensorRT, in the same onnxruntime-gpu build as CUDA, with TensorRT's own libraries added."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.contracts import Scheme
from compress.environments import Environment
from compress.providers.cuda import ENVIRONMENT, CudaProvider


class TensorRtProvider(CudaProvider):
    """The TensorRT provider; what it does not take would run on CUDA, which counts as fallen back."""

    name = "tensorrt"
    onnxruntime_name = "TensorrtExecutionProvider"
    environment = Environment("tensorrt", (*ENVIRONMENT.requirements, "tensorrt-cu13-libs==10.16.1.11"))

    def remedy(self) -> str | None:
        """Return what to do about it."""
        return "an NVIDIA GPU with its driver (nvidia-smi lists it), then: compress doctor --install tensorrt"

    def start(self, ort: Any, model: Path, options: Any, provider_options: Mapping[str, str]) -> Any:  # noqa: ANN401
        """Start the session; TensorRT's libraries are found by importing them."""
        import tensorrt_libs  # type: ignore[import-not-found]  # noqa: F401

        return super().start(ort, model, options, provider_options)

    def supports(self, scheme: Scheme) -> str | None:
        """Return why TensorRT cannot run a scheme: it knows no ``MatMulNBits``."""
        if scheme.activations == "none":
            return "weight-only products (MatMulNBits) have no kernel on tensorrt; use static 8-bit activations"
        return None


PROVIDER = TensorRtProvider()
