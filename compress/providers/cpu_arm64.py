"""ONNX Runtime's CPU kernels for Arm: on an Arm machine itself, on x86-64 Linux an aarch64 runtime under QEMU.

Emulation proves numbers: the kernels are those that a phone with dot products, i8mm and SVE takes (``-cpu max``). It
says nothing about speed, and its peak memory includes the emulator's.
"""

from __future__ import annotations

import platform
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from compress.contracts import Evidence, Runtime
from compress.errors import ProviderError
from compress.providers import _arm64_root
from compress.providers._base import processor
from compress.providers.cpu import CpuProvider

_ARM = ("aarch64", "arm64")
_ELF_AARCH64 = 183


class CpuArm64Provider(CpuProvider):
    """The CPU provider of the aarch64 build."""

    name = "cpu-arm64"

    def runtime(self) -> Runtime:
        """Return this Python on an Arm machine, the emulated one elsewhere.

        Raises:
            ProviderError: It is not installed, or cannot be on this system.
        """
        if _is_arm():
            return super().runtime()
        self._check_system()
        found = _arm64_root.runtime()
        if found is None:
            raise ProviderError(
                "the emulated aarch64 runtime is not installed", hint="compress doctor --install cpu-arm64"
            )
        return found

    def install(self, say: Callable[[str], None]) -> None:
        """Put the emulated runtime into the cache; an Arm machine needs none.

        Raises:
            ProviderError: This system cannot emulate, or apt or pip refuses.
        """
        if _is_arm():
            super().install(say)
            return
        self._check_system()
        _arm64_root.install(say)

    def available(self) -> tuple[bool, str]:
        """Return whether this process runs aarch64 code, and onnxruntime's version."""
        if not _is_arm():
            return False, f"this process runs {platform.machine()} code, not aarch64"
        return super().available()

    def device(self) -> str:
        """Return the processor's name, or who emulates one."""
        return "aarch64 emulated by QEMU" if _is_emulated() else processor()

    def evidence(self) -> Evidence:
        """Return ``measured`` on an Arm processor."""
        return "emulated" if _is_emulated() else "measured"

    def _check_system(self) -> None:
        if (sys.platform, platform.machine().lower()) != ("linux", "x86_64"):
            raise ProviderError(
                f"cpu-arm64 needs an Arm processor, or x86-64 Linux to emulate one; this is {platform.machine()} "
                f"on {platform.system()}",
            )


def _is_arm() -> bool:
    return platform.machine().lower() in _ARM


def _is_emulated() -> bool:
    """Return whether the program that the kernel really runs is none for Arm.

    An emulated process is told that it runs on aarch64, and that its program is an aarch64 one; QEMU answers so for
    ``/proc/self``. It does not for the files of a thread. Where there is no ``/proc``, there is no user-mode QEMU.
    """
    try:
        with Path(f"/proc/self/task/{threading.get_native_id()}/exe").open("rb") as program:
            header = program.read(20)
    except OSError:
        return False
    return header[:4] == b"\x7fELF" and struct.unpack_from("<H", header, 18)[0] != _ELF_AARCH64


PROVIDER = CpuArm64Provider()
