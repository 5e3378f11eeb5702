"""Intel's OpenVINO: processors, GPUs and NPUs, the device chosen by what the plug-in says each of its devices is.

The plug-in offers Intel's devices only. Elsewhere (an AMD processor) the onnxruntime build that has OpenVINO inside
runs its CPU device; it excludes the ordinary onnxruntime, so it has an environment of its own. Asked for an NPU that is
not there, OpenVINO runs on the CPU with a warning: a device that was asked for and is missing is refused here.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.environments import Environment
from compress.errors import ProviderError
from compress.providers._base import processor
from compress.providers._plugin import PluginProvider

_DEVICE_TYPE = "device_type"
#: ``ov_device`` of a plug-in's device: the device that ``device_type`` names.
_METADATA = "ov_device"


class OpenVinoProvider(PluginProvider):
    """OpenVINO by its plug-in, or by the onnxruntime that has it built in."""

    name = "openvino"
    onnxruntime_name = "OpenVINOExecutionProvider"
    package = "onnxruntime-ep-openvino"
    module = "onnxruntime_ep_openvino"
    _device = "CPU"

    environment = Environment("openvino", ("onnxruntime-openvino==1.24.1", "numpy>=2.1,<3"))

    def missing(self) -> str | None:
        """Return what this machine lacks: OpenVINO comes for x86-64."""
        machine = platform.machine().lower()
        return None if machine in ("x86_64", "amd64") else f"onnxruntime's OpenVINO has no build for {machine}"

    def here(self) -> bool:
        """Return whether the plug-in is installed, and would offer a device."""
        return super().here() and _intel()

    def available(self) -> tuple[bool, str]:
        """Return whether OpenVINO is in this process, built in or as a plug-in."""
        import onnxruntime as ort

        if self.onnxruntime_name in ort.get_available_providers():
            return True, f"onnxruntime-openvino {ort.__version__}"
        return super().available()

    def device(self) -> str:
        """Return the device of the last session, the CPU before there was one."""
        return f"OpenVINO {self._device} device" + (f", {processor()}" if self._device == "CPU" else "")

    def defaults(self) -> dict[str, str]:
        """Return the CPU device: the one that is everywhere."""
        return {_DEVICE_TYPE: "CPU"}

    def start(self, ort: Any, model: Path, options: Any, provider_options: Mapping[str, str]) -> Any:  # noqa: ANN401
        """Start the session on the device that ``device_type`` names."""
        self._device = provider_options[_DEVICE_TYPE]
        if self.onnxruntime_name in ort.get_available_providers():
            return super(PluginProvider, self).start(ort, model, options, provider_options)
        rest = dict(provider_options)
        wanted = rest.pop(_DEVICE_TYPE, "CPU")
        offered = {
            dict(device.ep_metadata).get(_METADATA, device.device.type.name): device for device in self.devices()
        }
        if wanted not in offered:
            raise ProviderError(f"OpenVINO offers no device {wanted}", hint=f"it offers {', '.join(offered) or 'none'}")
        options.add_provider_for_devices([offered[wanted]], rest)
        return ort.InferenceSession(str(model), options, enable_fallback=0)


def _intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "intel" in processor().lower()


PROVIDER = OpenVinoProvider()
