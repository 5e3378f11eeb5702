"""The CPU provider: ONNX Runtime's own kernels (MLAS), on the machine this runs on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.contracts import Evidence, Scheme
from compress.errors import ProviderError

_BITS = (2, 4, 8)
_BLOCKS = (16, 32, 64, 128, 256)
_FAST_2BIT_BLOCKS = (32, 64, 128)


class CpuProvider:
    """ONNX Runtime's default provider; it always runs every node, so nothing can fall back from it."""

    name = "cpu"
    onnxruntime_name = "CPUExecutionProvider"

    def available(self) -> tuple[bool, str]:
        """Return whether onnxruntime can be imported, and its version or the remedy."""
        try:
            import onnxruntime as ort
        except ImportError as error:
            return False, f"onnxruntime cannot be imported ({error}): pip install onnxruntime"
        if self.onnxruntime_name not in ort.get_available_providers():
            return False, f"onnxruntime {ort.__version__} was built without {self.onnxruntime_name}"
        return True, f"onnxruntime {ort.__version__}"

    def evidence(self) -> Evidence:
        """Return ``measured``: the code runs on this machine's processor itself."""
        return "measured"

    def session(self, model: Path, options: Mapping[str, str], threads: int) -> Any:  # noqa: ANN401
        """Return an ``onnxruntime.InferenceSession`` on the CPU alone.

        Raises:
            ProviderError: onnxruntime is missing, or refuses the model.
        """
        usable, reason = self.available()
        if not usable:
            raise ProviderError("the cpu provider does not work here", hint=reason)
        import onnxruntime as ort

        from compress.providers._session import session_options

        try:
            return ort.InferenceSession(
                str(model), session_options(options, threads), providers=[self.onnxruntime_name]
            )
        except Exception as error:  # onnxruntime raises a dozen classes that share only Exception
            if type(error).__module__.startswith("onnxruntime"):
                raise ProviderError(
                    f"onnxruntime {ort.__version__} cannot load the model: {str(error).splitlines()[0]}",
                    where=str(model),
                ) from error
            raise

    def supports(self, scheme: Scheme) -> str | None:
        """Return why ``MatMulNBits`` cannot run ``scheme`` fast on CPUs, or ``None``."""
        if scheme.activations != "none":
            return None  # MLAS multiplies bytes on every processor it runs on
        if scheme.bits not in _BITS:
            return f"{scheme.bits}-bit weights have no CPU kernel; use 2, 4 or 8 bits"
        if scheme.block_size not in _BLOCKS:
            return f"block size {scheme.block_size} has no CPU kernel; use {', '.join(map(str, _BLOCKS))}"
        if scheme.bits == 2 and scheme.block_size not in _FAST_2BIT_BLOCKS:
            return f"2-bit weights with block size {scheme.block_size} run 100 times slower; use 32, 64 or 128"
        return None


PROVIDER = CpuProvider()
