"""WebGPU without it: what is missing is named, what is half there does not count, software is not called hardware."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from compress.errors import ProviderError
from compress.providers import _vulkan
from compress.providers._base import OrtProvider
from compress.providers.webgpu import PROVIDER

REMEDY = "compress doctor --install webgpu"
GPU, SOFTWARE = ("Some GPU", False), ("SwiftShader Device", True)
FILES = ("libvk_swiftshader.so", "vk_swiftshader_icd.json", "libvulkan.so.1")
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Vulkan drivers are looked for on Linux")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on a machine without a GPU."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VK_DRIVER_FILES", raising=False)
    monkeypatch.delenv("VK_ICD_FILENAMES", raising=False)
    monkeypatch.setattr(_vulkan, "has_hardware", lambda: False)
    return tmp_path / "cache"


@pytest.fixture
def environment() -> Path:
    """The environment, as far as a look at it tells."""
    PROVIDER.environment.python.parent.mkdir(parents=True)
    PROVIDER.environment.python.touch()
    (PROVIDER.environment.folder / "installed").touch()
    return PROVIDER.environment.folder


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed browser with a driver; its manifest names the library by a relative path, as Chromium's does."""
    folder = tmp_path / "browser"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(name)
    driver = {"library_path": "./libvk_swiftshader.so", "api_version": "1.0.5"}
    manifest = {"file_format_version": "1.0.0", "ICD": driver}
    (folder / "vk_swiftshader_icd.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(_vulkan, "_BROWSERS", (str(tmp_path / "none"), str(folder)))
    return folder


def test_without_its_environment_the_command_is_named() -> None:
    with pytest.raises(ProviderError, match="webgpu provider's runtime is not installed") as caught:
        PROVIDER.runtime()
    assert caught.value.hint == REMEDY


@linux
def test_an_environment_without_its_stamp_does_not_count(environment: Path) -> None:
    (environment / "installed").unlink()
    with pytest.raises(ProviderError, match="webgpu provider's runtime is not installed"):
        PROVIDER.runtime()


@linux
def test_without_a_driver_the_command_is_named(environment: Path) -> None:
    with pytest.raises(ProviderError, match="no software driver") as caught:
        PROVIDER.runtime()
    assert caught.value.hint == REMEDY


@linux
@pytest.mark.usefixtures("environment", "browser")
def test_the_software_driver_alone_is_shown_to_the_worker(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/of/the/user")
    _vulkan.install_software(lambda step: None)
    runtime = PROVIDER.runtime()
    assert runtime.command == (str(PROVIDER.environment.python),)
    assert runtime.environment["VK_DRIVER_FILES"] == str(cache / "swiftshader" / "vk_swiftshader_icd.json")
    assert runtime.environment["LD_LIBRARY_PATH"] == f"{cache / 'swiftshader'}:/of/the/user"
    assert runtime.environment["PYTHONPATH"] == ""


@linux
@pytest.mark.usefixtures("environment")
def test_a_real_gpu_hides_the_software_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vulkan, "has_hardware", lambda: True)
    variables = PROVIDER.runtime().environment
    assert variables["VK_LOADER_DRIVERS_DISABLE"] == "*lvp_*,*swiftshader*"
    assert "VK_DRIVER_FILES" not in variables and "LD_LIBRARY_PATH" not in variables


@pytest.mark.usefixtures("browser")
def test_the_manifest_names_the_installed_library_by_its_absolute_path(cache: Path) -> None:
    said: list[str] = []
    _vulkan.install_software(said.append)
    manifest = json.loads((cache / "swiftshader" / "vk_swiftshader_icd.json").read_text())
    assert manifest == {
        "file_format_version": "1.0.0",
        "ICD": {"library_path": str(cache / "swiftshader" / "libvk_swiftshader.so"), "api_version": "1.0.5"},
    }
    assert Path(manifest["ICD"]["library_path"]).read_text() == "libvk_swiftshader.so"
    _vulkan.install_software(said.append)
    assert "already" in said[-1] and sum("copying" in step for step in said) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"ICD": []}', '{"layer": {}}', "null"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "icd.json").write_text(content)
    with pytest.raises(ProviderError, match="not the manifest of a Vulkan driver"):
        _vulkan.write_manifest(tmp_path / "icd.json", tmp_path / "lib.so")


@pytest.mark.usefixtures("browser")
@pytest.mark.parametrize("lost", [*FILES, "installed"])
def test_a_driver_with_a_file_missing_does_not_count_and_is_made_anew(cache: Path, lost: str) -> None:
    _vulkan.install_software(lambda step: None)
    assert _vulkan.software_environment() is not None
    (cache / "swiftshader" / lost).unlink()
    assert _vulkan.software_environment() is None
    _vulkan.install_software(lambda step: None)
    assert _vulkan.software_environment() is not None


@pytest.mark.usefixtures("browser")
def test_an_interrupted_installation_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []

    def interrupted(source: Path, target: Path) -> None:
        if copied:
            raise KeyboardInterrupt
        copied.append(shutil.copyfile(source, target))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copy", interrupted)
        _vulkan.install_software(lambda step: None)
    assert copied and list(cache.iterdir()) == [] and _vulkan.software_environment() is None


def test_without_a_browser_or_apt_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vulkan, "_BROWSERS", ())
    monkeypatch.setattr(_vulkan, "missing_tools", lambda: ["apt-get"])
    with pytest.raises(ProviderError, match="apt-get not found") as caught:
        _vulkan.install_software(lambda step: None)
    assert "install Chromium" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ((), False),
        (("sys/class/drm/renderD128",), False),
        (("usr/share/vulkan/icd.d/intel_icd.x86_64.json",), False),
        (("sys/class/drm/renderD128", "usr/share/vulkan/icd.d/lvp_icd.x86_64.json"), False),
        (("sys/class/drm/renderD128", "usr/share/vulkan/icd.d/intel_icd.x86_64.json"), True),
        (("dev/nvidiactl", "etc/vulkan/icd.d/nvidia_icd.json"), True),
    ],
)
def test_a_gpu_counts_with_a_driver_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], expected: bool
) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("VK_DRIVER_FILES", raising=False)
    monkeypatch.delenv("VK_ICD_FILENAMES", raising=False)
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert _vulkan.has_hardware(tmp_path) is expected


@linux
@pytest.mark.parametrize(
    ("devices", "evidence", "device"),
    [
        ([], "none", "none"),
        ([GPU], "measured", "Some GPU"),
        ([SOFTWARE], "emulated", "SwiftShader Device (software Vulkan driver)"),
        ([GPU, SOFTWARE], "emulated", "SwiftShader Device (software Vulkan driver)"),
    ],
)
def test_a_run_is_measured_only_where_no_software_is_in_sight(
    monkeypatch: pytest.MonkeyPatch, devices: list[tuple[str, bool]], evidence: str, device: str
) -> None:
    monkeypatch.setattr(_vulkan, "devices", lambda: devices)
    assert (PROVIDER.evidence(), PROVIDER.device()) == (evidence, device)
    assert PROVIDER.tokens_at_once() == (1 if evidence == "emulated" else None)


def test_provider_options_arrive_as_config_entries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Mapping[str, str]] = []

    def session(self: object, model: Path, options: Mapping[str, str], threads: int) -> Any:
        seen.append(options)

    monkeypatch.setattr(OrtProvider, "session", session)
    PROVIDER.session(tmp_path, {"a.b": "1"}, 1)
    PROVIDER.session(tmp_path, {}, 1, {"preferredLayout": "NHWC", "enableInt64": "1"})
    prefix = "ep.webgpuexecutionprovider."
    assert seen == [
        {"a.b": "1", f"{prefix}preferredLayout": "NCHW"},
        {f"{prefix}preferredLayout": "NHWC", f"{prefix}enableInt64": "1"},
    ]
