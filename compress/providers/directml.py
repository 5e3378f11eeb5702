"""DirectML: any DirectX 12 GPU or NPU on Windows, in a build of onnxruntime that excludes the ordinary one."""

from __future__ import annotations

import sys

from compress.environments import Environment
from compress.providers._base import OrtProvider


class DirectMlProvider(OrtProvider):
    """The DirectML provider."""

    name = "directml"
    onnxruntime_name = "DmlExecutionProvider"
    package = "onnxruntime-directml"
    environment = Environment("directml", ("onnxruntime-directml==1.24.4", "numpy>=2.1,<3"))

    def missing(self) -> str | None:
        """Return that this is not Windows."""
        return None if sys.platform == "win32" else "DirectML runs on Windows only"

    def remedy(self) -> str | None:
        """Return what to do about it."""
        return "on Windows 10 or later: compress doctor --install directml"

    def here(self) -> bool:
        """Return ``False``: this Python has the ordinary onnxruntime."""
        return False

    def device(self) -> str:
        """Return what DirectML runs on."""
        return "the first DirectX 12 device"


PROVIDER = DirectMlProvider()
