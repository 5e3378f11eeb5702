"""Qualcomm's NPU (Hexagon, "HTP") through the QNN provider: the device itself on Arm, its simulator on x86-64 Linux.

The simulator executes HTP graphs bit for bit: it proves placement, numbers and offline compilation, and says nothing
about time or power. HTP wants graphs of standard operators with every shape a number, in 16- or 8-bit integers
(QuantizeLinear and DequantizeLinear around every operator) or float16.
"""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.contracts import Evidence, Scheme
from compress.environments import Environment
from compress.errors import ProviderError, UsageError, did_you_mean
from compress.providers._plugin import PluginProvider

#: What a chip is called, and QNN's number of it (``QnnHtpDevice``'s SoC models).
SOC_MODELS: Mapping[str, int] = {
    "SM8450": 36,
    "SM8550": 43,
    "SM8650": 57,
    "SC8380XP": 60,
    "SM8750": 69,
    "SM8850": 87,
}
DEFAULT_SOC = "SM8750"
#: Key of the chip's name in the metadata of a graph that was compiled for one.
SOC_KEY = "soc_model"


def soc_model(name: str) -> str:
    """Return QNN's number of a chip, given its name or number.

    Raises:
        UsageError: No such chip is known.
    """
    if name.isdigit():
        return name
    if name.upper() not in SOC_MODELS:
        raise UsageError(f"unknown soc_model {name!r}", hint=did_you_mean(name, SOC_MODELS))
    return str(SOC_MODELS[name.upper()])


def soc_name(given: str) -> str:
    """Return a chip's name, given its name or number.

    Raises:
        UsageError: No such chip is known.
    """
    number = soc_model(given)
    name = next((name for name, known in SOC_MODELS.items() if str(known) == number), None)
    if name is None:
        raise UsageError(f"unknown soc_model {given!r}", hint=f"known: {', '.join(SOC_MODELS)}")
    return name


class QnnProvider(PluginProvider):
    """The HTP backend of the QNN plug-in."""

    name = "qnn"
    onnxruntime_name = "QNNExecutionProvider"
    package = "onnxruntime-qnn"
    module = "onnxruntime_qnn"
    static_shapes = True
    environment = Environment("qnn", ("onnxruntime==1.31.1", "onnxruntime-qnn==2.7.0", "numpy>=2.1,<3"))

    def missing(self) -> str | None:
        """Return what this machine lacks: Qualcomm's libraries come for few systems."""
        system = (sys.platform, platform.machine().lower())
        if system in (("linux", "x86_64"), ("win32", "arm64"), ("win32", "amd64"), ("linux", "aarch64")):
            return None
        return f"onnxruntime-qnn has no build for {system[0]} on {system[1]}"

    def remedy(self) -> str | None:
        """Return where it runs."""
        return "the simulator runs on x86-64 Linux, the NPU is in Arm laptops and phones"

    def device(self) -> str:
        """Return the NPU, or that it is the simulator."""
        return "Hexagon HTP" if self.evidence() == "measured" else "Hexagon HTP simulator"

    def evidence(self) -> Evidence:
        """Return ``measured`` on an Arm machine, where the library talks to the NPU, else ``simulated``."""
        return "measured" if platform.machine().lower() in ("aarch64", "arm64") else "simulated"

    def defaults(self) -> dict[str, str]:
        """Return the HTP backend, for a chip: without one, graphs are made for the oldest.

        Float operators run in float16, which HTP has, instead of falling back: drift shows what that costs. What turns
        a graph's inputs and outputs into integers and back runs on HTP too, not on the CPU as the default is.
        """
        backend = importlib.import_module(self.module).get_qnn_htp_path()
        return {
            "backend_path": str(backend),
            "soc_model": DEFAULT_SOC,
            "enable_htp_fp16_precision": "1",
            "offload_graph_io_quantization": "0",
        }

    def start(self, ort: Any, model: Path, options: Any, provider_options: Mapping[str, str]) -> Any:  # noqa: ANN401
        """Start the session; chips may be called by their names."""
        numbered = {**provider_options, "soc_model": soc_model(provider_options["soc_model"])}
        session = super().start(ort, model, options, numbered)
        # The simulator would run it; a device would not, and says less about why.
        compiled_for = session.get_modelmeta().custom_metadata_map.get(SOC_KEY)
        if compiled_for is not None and soc_model(compiled_for) != numbered["soc_model"]:
            raise ProviderError(
                f"the context binary is for another chip: compiled for {compiled_for}, asked to run on "
                f"{provider_options['soc_model']}",
                where=str(model),
                hint="compile it for this chip, or name the chip it is for: soc_model",
            )
        return session

    def supports(self, scheme: Scheme) -> str | None:
        """Return why HTP cannot run a scheme, or ``None``."""
        if scheme.activations != "none":
            return None
        if scheme.bits == 8 and scheme.block_size == 0:
            return None
        if scheme.bits != 4 or scheme.block_size not in (32, 64, 128):
            return (
                f"weights of {scheme.bits} bits in blocks of {scheme.block_size} have no kernel on HTP; "
                "use 8 bits a channel, or 4 bits in blocks of 32, 64 or 128"
            )
        return None


PROVIDER = QnnProvider()
