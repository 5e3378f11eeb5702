"""WebGPU: onnxruntime's WGSL kernels on a GPU, or on a Vulkan driver in software where there is none.

The software driver runs the very shaders that a browser or a GPU would: it proves placement and numbers, not speed.
Only a package of its own has this provider, so it lives in an environment of its own.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress.contracts import Evidence, Runtime
from compress.environments import Environment
from compress.errors import ProviderError
from compress.providers import _vulkan
from compress.providers._base import OrtProvider

_REMEDY = "compress doctor --install webgpu"
#: What onnxruntime reads this provider's options from: the dictionary that Python passes beside its name is ignored.
_PREFIX = "ep.webgpuexecutionprovider."


class WebGpuProvider(OrtProvider):
    """Dawn's WebGPU, built into onnxruntime-webgpu."""

    name = "webgpu"
    onnxruntime_name = "WebGpuExecutionProvider"
    package = "onnxruntime-webgpu"
    environment = Environment("webgpu", ("onnxruntime-webgpu==1.27.0", "numpy==2.4.6"))

    def runtime(self) -> Runtime:
        """Return the interpreter of its environment, and on Linux what chooses the Vulkan driver.

        Raises:
            ProviderError: The environment, or a driver, is not installed.
        """
        found = super().runtime()
        if platform.system() != "Linux":
            return found
        driver = _vulkan.hardware_environment() if _vulkan.has_hardware() else _vulkan.software_environment()
        if driver is None:
            raise ProviderError("there is no GPU with a Vulkan driver here, and no software driver", hint=_REMEDY)
        return Runtime(found.command, {**found.environment, **driver})

    def here(self) -> bool:
        """Return ``False``: this Python has the ordinary onnxruntime."""
        return False

    def install(self, say: Callable[[str], None]) -> None:
        """Make the environment and, on Linux without a GPU, get the software driver.

        Raises:
            ProviderError: pip or apt refuses, or this system has no package of the driver.
        """
        self.environment.install(say)
        if platform.system() == "Linux" and not _vulkan.has_hardware():
            _vulkan.install_software(say)

    def available(self) -> tuple[bool, str]:
        """Return whether this process's onnxruntime has it and there is a device for it."""
        usable, reason = super().available()
        if usable and not self._adapters():
            return False, f"{reason}, but there is no device for WebGPU: no GPU, or no driver that it can load"
        return usable, reason

    def device(self) -> str:
        """Return what runs the shaders."""
        found = self._adapters()
        if any(software for _, software in found):
            return f"{next(name for name, software in found if software)} (software Vulkan driver)"
        return ", ".join(name for name, _ in found) or "none"

    def evidence(self) -> Evidence:
        """Return ``measured`` where only hardware is in sight: which of several devices is taken is Dawn's choice."""
        found = self._adapters()
        if not found:
            return "none"
        return "emulated" if any(software for _, software in found) else "measured"

    def tokens_at_once(self) -> int | None:
        """Return 1 on the software driver, whose numbers for several tokens at once are wrong.

        Attention over several new tokens takes onnxruntime's flash-attention shader. Where there are subgroups it
        multiplies 8 keys at a time and counts on 8 lanes; SwiftShader has 4, so keys are counted twice (seen with
        1.27.0: one token right to 1e-6, five wrong by 0.3). A real GPU gets them all at once: were it as narrow, its
        users would get wrong texts, and validation has to show that.
        """
        return 1 if any(software for _, software in self._adapters()) else None

    def session(
        self, model: Path, options: Mapping[str, str], threads: int, provider_options: Mapping[str, str] | None = None
    ) -> Any:  # noqa: ANN401 - onnxruntime has no stubs
        """Return a session on WebGPU; see :class:`compress.contracts.Provider`.

        The layout is NCHW unless an option says otherwise: with its default, NHWC, onnxruntime records only the nodes
        that fell back, since it assigns the others before it begins to record.
        """
        own = {"preferredLayout": "NCHW", **(provider_options or {})}
        entries = {key if key.startswith(_PREFIX) else f"{_PREFIX}{key}": value for key, value in own.items()}
        return super().session(model, {**options, **entries}, threads)

    def start(self, ort: Any, model: Path, options: Any, provider_options: Mapping[str, str]) -> Any:  # noqa: ANN401
        """Start the session; onnxruntime's Python would run it on the CPU where WebGPU fails, with a line in print."""
        return ort.InferenceSession(str(model), options, providers=[self.onnxruntime_name], enable_fallback=0)

    def _adapters(self) -> list[tuple[str, bool]]:
        """Return the devices' names, and whether each is software."""
        if platform.system() == "Linux":
            return _vulkan.devices()
        import onnxruntime as ort

        gpu = ort.OrtHardwareDeviceType.GPU
        found = [item.device for item in ort.get_ep_devices() if item.ep_name == self.onnxruntime_name]
        return [(item.metadata.get("Description", item.vendor or "GPU"), False) for item in found if item.type == gpu]


PROVIDER = WebGpuProvider()
