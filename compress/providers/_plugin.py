"""Providers that are a library beside onnxruntime: registered once a process, bound by device."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import ProviderError
from compress.providers._base import OrtProvider


class PluginProvider(OrtProvider):
    """A plug-in; see "plugin execution provider libraries" in ONNX Runtime's documentation.

    Attributes:
        module: The Python module that knows where the library is.
    """

    module = ""

    def __init__(self) -> None:
        self._registered = False

    def here(self) -> bool:
        """Return whether the plug-in is installed beside this Python's onnxruntime."""
        return importlib.util.find_spec(self.module) is not None

    def available(self) -> tuple[bool, str]:
        """Return whether the plug-in loads and offers a device, and the versions or the remedy."""
        try:
            import onnxruntime as ort

            importlib.import_module(self.module)
        except ImportError as error:
            return False, f"{error}: pip install {self.package}"
        try:
            found = self.devices()
        except ProviderError as error:
            return False, error.what
        version = importlib.metadata.version(self.package)
        if not found:
            return False, f"{self.package} {version} offers no device that it could use on this machine"
        return True, f"onnxruntime {ort.__version__}, {self.package} {version}"

    def devices(self) -> list[Any]:
        """Return the ``OrtEpDevice`` objects to bind.

        Raises:
            ProviderError: The library cannot be registered.
        """
        import onnxruntime as ort

        if not self._registered:
            library = importlib.import_module(self.module).get_library_path()
            try:
                ort.register_execution_provider_library(self.onnxruntime_name, library)
            except Exception as error:
                raise ProviderError(f"onnxruntime refuses the plug-in: {error}", where=str(library)) from error
            self._registered = True
        return [device for device in ort.get_ep_devices() if device.ep_name == self.onnxruntime_name]

    def start(self, ort: Any, model: Path, options: Any, provider_options: Mapping[str, str]) -> Any:  # noqa: ANN401
        """Start the session on the plug-in's devices."""
        options.add_provider_for_devices(self.devices(), dict(provider_options))
        return ort.InferenceSession(str(model), options, enable_fallback=0)
