"""XNNPACK: kernels for phones' processors, built into ONNX Runtime's Android and iOS packages and no Python wheel."""

from __future__ import annotations

from compress.contracts import Scheme
from compress.providers._base import OrtProvider


class XnnpackProvider(OrtProvider):
    """The XNNPACK provider, where somebody built an onnxruntime with it."""

    name = "xnnpack"
    onnxruntime_name = "XnnpackExecutionProvider"

    def missing(self) -> str | None:
        """Return that this onnxruntime was built without it."""
        works, reason = self.available()
        return None if works else reason

    def remedy(self) -> str | None:
        """Return how it is had."""
        return "build onnxruntime with --use_xnnpack --build_wheel, or run the artifact with the Android or iOS package"

    def supports(self, scheme: Scheme) -> str | None:
        """Return why XNNPACK cannot run a scheme: it knows no ``MatMulNBits``."""
        if scheme.activations == "none":
            return "weight-only products (MatMulNBits) have no kernel on xnnpack; the cpu provider has them"
        return None


PROVIDER = XnnpackProvider()
