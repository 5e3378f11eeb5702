"""A small aarch64 Linux in a cache folder, run by QEMU: Python, onnxruntime and numpy as an Arm machine has them.

Debian's arm64 packages of Python and of the libraries that it needs, the aarch64 wheels, and the statically linked
``qemu-aarch64-static``; no root, nothing installed, no binfmt. The folder takes its name when all of it is there, and
holds a stamp: an interrupted installation leaves nothing that counts as one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from compress.contracts import Runtime
from compress.environments import cache_directory, run
from compress.errors import ProviderError
from compress.providers._debian import Archive, extract, missing_tools, native_architecture, unpack

WHEELS = ("onnxruntime==1.31.1", "numpy==2.4.6")
PYTHONS = ("3.11", "3.12", "3.13")
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
#: Where the emulator is, and its name there: until Debian 12 in the first, then in the second.
_EMULATORS = (("qemu-user-static", "qemu-aarch64-static"), ("qemu-user", "qemu-aarch64"))
_EMULATOR, _STAMP = "qemu-aarch64-static", "installed"
# What an Arm kernel says of a processor. QEMU takes files below its root for those outside, and would else show an
# x86 list, at which onnxruntime 1.31.1 dies when it is imported. Kernels are chosen by the features that QEMU itself
# tells (AT_HWCAP); of this list, only the part number is read: Neoverse N2, which has dot products, i8mm and bf16.
_PROCESSOR = """\
processor\t: {index}
BogoMIPS\t: 48.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp i8mm bf16
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd49
CPU revision\t: 0

"""


def folder() -> Path:
    """Return where it is kept; the name changes with what is pinned."""
    told = "\n".join((*WHEELS, *PYTHONS)).encode()
    return cache_directory() / "environments" / f"cpu-arm64-{hashlib.sha256(told).hexdigest()[:12]}"


def runtime() -> Runtime | None:
    """Return how to start the emulated Python, ``None`` where it is not installed."""
    place = folder()
    try:
        version = str(json.loads((place / _STAMP).read_text(encoding="utf-8"))["python"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    root, emulator = place / "root", place / _EMULATOR
    python = root / "usr" / "bin" / f"python{version}"
    if not (emulator.is_file() and python.is_file() and (place / "packages" / "onnxruntime").is_dir()):
        return None
    # -S: Debian's site module would add folders of the machine outside. The library variables are for x86 code.
    return Runtime(
        (str(emulator), "-cpu", "max", "-L", str(root), str(python), "-S"),
        {
            "PYTHONHOME": str(root / "usr"),
            "PYTHONPATH": str(place / "packages"),
            "LD_LIBRARY_PATH": "",
            "LD_PRELOAD": "",
        },
    )


def install(say: Callable[[str], None]) -> None:
    """Put it together.

    Raises:
        ProviderError: apt or pip refuses, or this is not a Debian-like system whose sources have arm64.
    """
    place = folder()
    if runtime() is not None:
        say(f"cpu-arm64: already installed in {place}")
        return
    lacking = missing_tools()
    if lacking:
        raise ProviderError(
            f"the emulated aarch64 runtime is put together from Debian packages, and {', '.join(lacking)} is not here",
            hint="validate on cpu-arm64 on an Arm machine, or in a Debian container",
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".cpu-arm64-") as temporary:
        built = Path(temporary) / "built"
        (built / "root").mkdir(parents=True)
        _get_emulator(Path(temporary) / "native", built, say)
        version = _get_python(Path(temporary) / "arm64", built / "root", say)
        _get_wheels(Path(temporary) / "pip", version, built / "packages", say)
        (built / _STAMP).write_text(json.dumps({"python": version, "wheels": WHEELS}), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        built.rename(place)
    say(f"cpu-arm64: installed in {place}")


def _get_emulator(temporary: Path, target: Path, say: Callable[[str], None]) -> None:
    archive = Archive(temporary, native_architecture())
    say("cpu-arm64: reading the package lists of this machine's architecture")
    archive.update()
    for package, member in _EMULATORS:
        if not archive.offers(package):
            continue
        say(f"cpu-arm64: getting {member} out of {package}")
        if extract(archive.package(package), {member: _EMULATOR}, target):
            return
    raise ProviderError(f"this system's sources offer neither {' nor '.join(name for name, _ in _EMULATORS)}")


def _get_python(temporary: Path, root: Path, say: Callable[[str], None]) -> str:
    """Unpack the first Python of ``PYTHONS`` that the sources have, with its libraries; return its version."""
    archive = Archive(temporary, "arm64")
    say("cpu-arm64: reading the package lists of arm64")
    archive.update()
    version = next((version for version in PYTHONS if archive.offers(f"python{version}-minimal")), None)
    if version is None:
        raise ProviderError(f"this system's sources have no Python {', '.join(PYTHONS)} for arm64")
    say(f"cpu-arm64: getting Python {version} for arm64 and the libraries that it needs")
    # Newer packages have their files in /usr only and count on these links, older ones in both places.
    (root / "usr" / "lib").mkdir(parents=True)
    (root / "usr" / "bin").mkdir()
    for name in ("lib", "bin"):
        (root / name).symlink_to(f"usr/{name}")
    packages = archive.with_dependencies((f"python{version}-minimal", f"libpython{version}-stdlib", "libstdc++6"))
    for package in packages:
        unpack(package, root)
    if not (root / "usr" / "bin" / f"python{version}").is_file() or not (root / "lib/ld-linux-aarch64.so.1").exists():
        raise ProviderError(f"the arm64 packages of Python {version} hold no Python that could be started")
    processors = "".join(_PROCESSOR.format(index=index) for index in range(os.cpu_count() or 1))
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text(processors)
    return version


def _get_wheels(temporary: Path, version: str, target: Path, say: Callable[[str], None]) -> None:
    """Install the aarch64 wheels with a pip of our own: the user's environment may have none."""
    say(f"cpu-arm64: installing {', '.join(WHEELS)} for aarch64")
    run([sys.executable, "-m", "venv", str(temporary)], what="an environment for pip cannot be made")
    pip = [str(temporary / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, *_foreign(version), "--target", str(target), *WHEELS], what="pip cannot install the aarch64 wheels")


def _foreign(version: str) -> Sequence[str]:
    """Return pip's options for another processor's and another Python's wheels."""
    platforms = [part for platform in _PLATFORMS for part in ("--platform", platform)]
    python = ["--python-version", version, "--implementation", "cp", "--abi", f"cp{version.replace('.', '')}"]
    return [*platforms, *python, "--only-binary=:all:", "--no-compile"]
