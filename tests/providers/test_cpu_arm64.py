"""The emulated Arm: what is missing is named, what is half there does not count, emulation is not called measured."""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path

import pytest

from compress.contracts import Runtime
from compress.errors import ProviderError
from compress.providers import _arm64_root, cpu_arm64
from compress.providers.cpu_arm64 import PROVIDER
from compress.validation import protocol


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on x86-64 Linux."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    on_system(monkeypatch, "linux", "x86_64")
    return tmp_path / "cache"


def on_system(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)


def put_together() -> Path:
    """Make what a look at an installation takes for one."""
    place = _arm64_root.folder()
    (place / "root" / "usr" / "bin").mkdir(parents=True)
    (place / "root" / "usr" / "bin" / "python3.11").touch()
    (place / "qemu-aarch64-static").touch()
    (place / "packages" / "onnxruntime").mkdir(parents=True)
    (place / "installed").write_text(json.dumps({"python": "3.11"}))
    return place


def test_without_it_the_command_is_named() -> None:
    with pytest.raises(ProviderError, match="not installed") as caught:
        PROVIDER.runtime()
    assert caught.value.hint == "compress doctor --install cpu-arm64"


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "ARM64"])
def test_an_arm_machine_needs_no_emulator(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    on_system(monkeypatch, "darwin", machine)
    assert PROVIDER.runtime() == Runtime((sys.executable,))
    said: list[str] = []
    PROVIDER.install(said.append)
    assert said == ["cpu-arm64: nothing to install"] and not _arm64_root.folder().exists()


@pytest.mark.parametrize(("system", "machine"), [("win32", "AMD64"), ("darwin", "x86_64"), ("linux", "riscv64")])
def test_other_systems_are_refused(monkeypatch: pytest.MonkeyPatch, system: str, machine: str) -> None:
    on_system(monkeypatch, system, machine)
    for call in (PROVIDER.runtime, lambda: PROVIDER.install(lambda step: None)):
        with pytest.raises(ProviderError, match=f"needs an Arm processor.*this is {machine}"):
            call()


def test_the_emulator_is_started_with_its_own_python_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    place = put_together()
    monkeypatch.setenv("PYTHONPATH", "/packages/for/x86")
    runtime = PROVIDER.runtime()
    root = place / "root"
    python = str(root / "usr/bin/python3.11")
    assert runtime.command == (str(place / "qemu-aarch64-static"), "-cpu", "max", "-L", str(root), python, "-S")
    variables = protocol._child_environment(place, 3, runtime.environment)
    assert variables["PYTHONPATH"] == f"{place / 'path'}{os.pathsep}{place / 'packages'}"
    assert variables["PYTHONHOME"] == str(root / "usr") and variables["OMP_NUM_THREADS"] == "3"
    assert variables["LD_LIBRARY_PATH"] == variables["LD_PRELOAD"] == ""


def test_only_a_runtime_with_a_path_of_its_own_loses_the_inherited_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/inherited")
    assert protocol._child_environment(tmp_path, 1, {})["PYTHONPATH"] == f"{tmp_path / 'path'}{os.pathsep}/inherited"
    assert protocol._child_environment(tmp_path, 1, {"PYTHONPATH": ""})["PYTHONPATH"] == str(tmp_path / "path")


PARTS = ("installed", "qemu-aarch64-static", "root/usr/bin/python3.11", "packages/onnxruntime")


@pytest.mark.parametrize("lost", PARTS)
def test_an_installation_with_a_part_missing_does_not_count(lost: str) -> None:
    place = put_together()
    assert _arm64_root.runtime() is not None
    (place / lost).rename(place / "elsewhere")
    assert _arm64_root.runtime() is None


@pytest.mark.parametrize("stamp", ["", "{", "[]", "{}", '{"python": "2.7"}'])
def test_a_damaged_stamp_does_not_count(stamp: str) -> None:
    (put_together() / "installed").write_text(stamp)
    assert _arm64_root.runtime() is None


class Steps:
    """The steps of an installation, without the network; ``fail`` names the one that fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail = ""
        monkeypatch.setattr(_arm64_root, "missing_tools", list)
        monkeypatch.setattr(_arm64_root, "_get_emulator", self.emulator)
        monkeypatch.setattr(_arm64_root, "_get_python", self.python)
        monkeypatch.setattr(_arm64_root, "_get_wheels", self.wheels)

    def emulator(self, temporary: Path, target: Path, say: object) -> None:
        self._step("emulator", target / "qemu-aarch64-static")

    def python(self, temporary: Path, root: Path, say: object) -> str:
        self._step("python", root / "usr" / "bin" / "python3.12")
        return "3.12"

    def wheels(self, temporary: Path, version: str, target: Path, say: object) -> None:
        assert version == "3.12"
        self._step("wheels", target / "onnxruntime" / "__init__.py")

    def _step(self, name: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if name == self.fail:
            raise ProviderError(f"{name} failed")


@pytest.mark.parametrize("step", ["emulator", "python", "wheels"])
def test_an_installation_that_fails_leaves_nothing_and_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    steps = Steps(monkeypatch)
    steps.fail = step
    with pytest.raises(ProviderError, match=f"{step} failed"):
        PROVIDER.install(lambda text: None)
    assert list(_arm64_root.folder().parent.iterdir()) == [] and _arm64_root.runtime() is None
    steps.fail = ""
    said: list[str] = []
    PROVIDER.install(said.append)
    assert PROVIDER.runtime().command[5].endswith("root/usr/bin/python3.12")
    PROVIDER.install(said.append)
    assert "installed in" in said[0] and "already installed in" in said[1]


def test_a_broken_installation_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    (put_together() / "installed").unlink()
    Steps(monkeypatch)
    PROVIDER.install(lambda text: None)
    assert PROVIDER.runtime().command[5].endswith("python3.12")
    assert not (_arm64_root.folder() / "root/usr/bin/python3.11").exists()


def test_without_apt_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_arm64_root, "missing_tools", lambda: ["apt-get", "dpkg-deb"])
    with pytest.raises(ProviderError, match="apt-get, dpkg-deb is not here") as caught:
        PROVIDER.install(lambda step: None)
    assert "on an Arm machine" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("header", "emulated"),
    [
        (b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\x3e\x00", True),
        (b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\xb7\x00", False),
        (b"", False),
    ],
)
def test_the_kernels_own_view_of_the_program_tells_emulation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: bytes, emulated: bool
) -> None:
    (tmp_path / "program").write_bytes(header)
    monkeypatch.setattr(cpu_arm64, "Path", lambda path: tmp_path / "program")
    assert cpu_arm64._is_emulated() is emulated
    assert PROVIDER.evidence() == ("emulated" if emulated else "measured")
    assert (PROVIDER.device() == "aarch64 emulated by QEMU") is emulated


def test_this_process_is_not_taken_for_an_arm_one() -> None:
    works, reason = PROVIDER.available()
    assert not works and "x86_64 code" in reason
