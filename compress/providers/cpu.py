"""The CPU provider: ONNX Runtime's own kernels (MLAS), on the machine this runs on."""

from __future__ import annotations

from compress.contracts import CacheType, Scheme
from compress.providers._base import OrtProvider

_FAST_2BIT_BLOCKS = (32, 64, 128)


class CpuProvider(OrtProvider):
    """ONNX Runtime's default provider; it always runs every node, so nothing can fall back from it."""

    name = "cpu"
    onnxruntime_name = "CPUExecutionProvider"

    def supports(self, scheme: Scheme) -> str | None:
        """Return why ``MatMulNBits`` cannot run ``scheme`` fast on CPUs, or ``None``."""
        slow = scheme.activations == "none" and scheme.bits == 2 and scheme.block_size not in _FAST_2BIT_BLOCKS
        if slow and super().supports(scheme) is None:
            return f"2-bit weights with block size {scheme.block_size} run 100 times slower; use 32, 64 or 128"
        return super().supports(scheme)

    def supports_cache(self, kept: CacheType) -> str | None:
        """Return ``None``: both have kernels."""
        return None


PROVIDER = CpuProvider()
