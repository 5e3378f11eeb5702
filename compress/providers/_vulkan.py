"""Vulkan's devices on Linux, and a driver in software where there is none.

The driver is SwiftShader as Chromium ships it: three files of Debian's ``chromium-common``, or of a Chromium or Chrome
that is installed. Mesa's lavapipe is no substitute: onnxruntime's WebGPU refuses it.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from compress.environments import cache_directory
from compress.errors import ProviderError
from compress.providers._debian import Archive, extract, missing_tools, native_architecture

_DRIVER, _MANIFEST, _LOADER = "libvk_swiftshader.so", "vk_swiftshader_icd.json", "libvulkan.so.1"
_PACKAGE = "chromium-common"
_BROWSERS = ("/usr/lib/chromium", "/usr/lib64/chromium-browser", "/opt/google/chrome", "/opt/chromium.org/chromium")
_MANIFESTS = ("/etc/vulkan/icd.d", "/usr/share/vulkan/icd.d", "/usr/local/share/vulkan/icd.d")
#: Drivers in software by the names of their manifests, as ``VK_LOADER_DRIVERS_DISABLE`` takes them.
_SOFTWARE = ("lvp_", "swiftshader")
_STAMP = "installed"


def driver_folder() -> Path:
    """Return where the driver is kept."""
    return cache_directory() / "swiftshader"


def has_hardware(system: Path = Path("/")) -> bool:
    """Return whether this Linux machine has a GPU and a Vulkan driver that is not software.

    Variables of the user that name a driver count as one.
    """
    gpu = any((system / "sys/class/drm").glob("renderD*")) or (system / "dev/nvidiactl").exists()
    if not gpu:
        return False
    if os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES"):
        return True
    manifests = [path.name for place in _MANIFESTS for path in (system / place.lstrip("/")).glob("*.json")]
    return any(not any(part in name for part in _SOFTWARE) for name in manifests)


def hardware_environment() -> dict[str, str]:
    """Return the variables under which Vulkan shows real devices only: a run on them can be called measured."""
    return {"VK_LOADER_DRIVERS_DISABLE": ",".join(f"*{part}*" for part in _SOFTWARE)}


def software_environment() -> dict[str, str] | None:
    """Return the variables under which Vulkan shows the driver in software only, ``None`` where it is not installed."""
    folder = driver_folder()
    files = [folder / name for name in (_STAMP, _DRIVER, _MANIFEST, _LOADER)]
    if not all(path.is_file() for path in files):
        return None
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return {
        "VK_DRIVER_FILES": str(folder / _MANIFEST),
        "VK_ICD_FILENAMES": str(folder / _MANIFEST),
        "LD_LIBRARY_PATH": f"{folder}{os.pathsep}{inherited}" if inherited else str(folder),
    }


def install_software(say: Callable[[str], None]) -> None:
    """Put the driver into the cache, from an installed browser or from Debian's archive.

    Raises:
        ProviderError: Neither is there, or apt refuses.
    """
    folder = driver_folder()
    if software_environment() is not None:
        say(f"webgpu: the software Vulkan driver is already in {folder}")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".swiftshader-") as place:
        built = Path(place) / "built"
        built.mkdir()
        browser = next((path for path in map(Path, _BROWSERS) if _complete(path)), None)
        if browser is not None:
            say(f"webgpu: copying the software Vulkan driver from {browser}")
            for name in (_DRIVER, _MANIFEST, _LOADER):
                shutil.copy(browser / name, built / name)
        else:
            _from_debian(Path(place) / "apt", built, say)
        write_manifest(built / _MANIFEST, folder / _DRIVER)
        (built / _STAMP).touch()
        shutil.rmtree(folder, ignore_errors=True)
        built.rename(folder)
    say(f"webgpu: the software Vulkan driver is in {folder}")


def write_manifest(path: Path, driver: Path) -> None:
    """Make a driver's manifest name its library by the absolute path, whatever it said before.

    Raises:
        ProviderError: It is not the manifest of a Vulkan driver.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["ICD"]["library_path"] = str(driver)
    except (ValueError, KeyError, TypeError) as error:
        raise ProviderError(f"not the manifest of a Vulkan driver: {error}", where=str(path)) from error
    path.write_text(json.dumps(manifest), encoding="utf-8")


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (_DRIVER, _MANIFEST, _LOADER))


def _from_debian(place: Path, target: Path, say: Callable[[str], None]) -> None:
    lacking = missing_tools()
    if lacking:
        raise ProviderError(
            f"there is no GPU here, and no package of a software Vulkan driver: {', '.join(lacking)} not found",
            hint="install Chromium or Chrome, which bring SwiftShader, and run compress doctor --install webgpu again",
        )
    archive = Archive(place, native_architecture())
    say("webgpu: reading Debian's package lists")
    archive.update()
    if not archive.offers(_PACKAGE):
        raise ProviderError(
            f"this system's sources do not offer {_PACKAGE}, which has a software Vulkan driver",
            hint="install Chromium or Chrome outside a sandbox, and run compress doctor --install webgpu again",
        )
    say(f"webgpu: getting the software Vulkan driver out of {_PACKAGE}")
    package = archive.package(_PACKAGE)
    extract(package, {name: name for name in (_DRIVER, _MANIFEST, _LOADER)}, target)
    if not _complete(target):
        raise ProviderError(f"{package.name} has no software Vulkan driver in it")


# ------------------------------------------------------------------------------------------------------- what is there

_CPU = 4
_NAME_OFFSET, _NAME_BYTES, _PROPERTIES_BYTES = 20, 256, 2048


class _InstanceInfo(ctypes.Structure):
    """``VkInstanceCreateInfo``; all zero but the type asks for Vulkan 1.0 without layers or extensions."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("application", ctypes.c_void_p),
        ("layer_count", ctypes.c_uint32),
        ("layers", ctypes.c_void_p),
        ("extension_count", ctypes.c_uint32),
        ("extensions", ctypes.c_void_p),
    )


def devices() -> list[tuple[str, bool]]:
    """Return the Vulkan devices of this process: each one's name, and whether it is software on the CPU.

    Empty where there is no loader, no driver or no device. It loads drivers: call it in a worker.
    """
    try:
        vulkan = ctypes.CDLL(_LOADER)
    except OSError:
        return []
    instance = ctypes.c_void_p()
    info = _InstanceInfo(type=1)  # VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO
    if vulkan.vkCreateInstance(ctypes.byref(info), None, ctypes.byref(instance)) != 0:
        return []
    try:
        count = ctypes.c_uint32()
        if vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None) != 0:
            return []
        handles = (ctypes.c_void_p * count.value)()
        if vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), handles) != 0:
            return []
        return [_properties(vulkan, handle) for handle in handles[: count.value]]
    finally:
        vulkan.vkDestroyInstance(instance, None)


def _properties(vulkan: ctypes.CDLL, handle: int | None) -> tuple[str, bool]:
    """Read ``VkPhysicalDeviceProperties``: five 32-bit numbers, the last one the kind of device, then its name."""
    buffer = ctypes.create_string_buffer(_PROPERTIES_BYTES)
    vulkan.vkGetPhysicalDeviceProperties(ctypes.c_void_p(handle), buffer)
    kind = int.from_bytes(buffer.raw[16:20], sys.byteorder)
    name = buffer.raw[_NAME_OFFSET : _NAME_OFFSET + _NAME_BYTES].split(b"\0", 1)[0]
    return name.decode("utf-8", "replace"), kind == _CPU
