"""Packages are taken apart without being installed, and apt is kept away from the machine's own state."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from compress.errors import ProviderError
from compress.providers import _debian

pytestmark = pytest.mark.skipif(bool(_debian.missing_tools()), reason="apt and dpkg are not here")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with a program, a library and a link."""
    content = tmp_path / "content"
    (content / "DEBIAN").mkdir(parents=True)
    (content / "DEBIAN" / "control").write_text(
        "Package: tool\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: nothing\n"
    )
    (content / "usr" / "bin").mkdir(parents=True)
    (content / "usr" / "bin" / "tool").write_text("program")
    (content / "usr" / "bin" / "tool").chmod(0o755)
    (content / "usr" / "bin" / "library.so").write_text("library")
    (content / "usr" / "bin" / "library.so").chmod(0o644)
    (content / "usr" / "bin" / "link").symlink_to("tool")
    path = tmp_path / "tool_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(content), str(path)], check=True, capture_output=True)
    return path


def test_the_files_asked_for_come_out_under_their_new_names(package: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    wanted = {"tool": "program", "library.so": "library.so", "link": "link", "other": "other"}
    assert sorted(_debian.extract(package, wanted, target)) == ["library.so", "tool"]
    assert {path.name: path.read_text() for path in target.iterdir()} == {"program": "program", "library.so": "library"}
    assert (target / "program").stat().st_mode & 0o777 == 0o755
    assert (target / "library.so").stat().st_mode & 0o777 == 0o644


def test_a_whole_package_is_unpacked(package: Path, tmp_path: Path) -> None:
    _debian.unpack(package, tmp_path / "root")
    assert (tmp_path / "root" / "usr" / "bin" / "link").read_text() == "program"


@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_a_damaged_package_is_an_error(package: Path, tmp_path: Path, damage: str) -> None:
    content = package.read_bytes()
    package.write_bytes(b"no package" if damage == "garbage" else content[: len(content) - 40])
    with pytest.raises(ProviderError, match="cannot be unpacked"):
        _debian.extract(package, {"tool": "tool"}, tmp_path)
    with pytest.raises(ProviderError, match="cannot be unpacked"):
        _debian.unpack(package, tmp_path / "root")


def test_apt_works_on_a_state_of_our_own(tmp_path: Path) -> None:
    archive = _debian.Archive(tmp_path / "with space", "arm64")
    told = subprocess.run(archive._command("apt-config", "dump"), capture_output=True, text=True, check=True).stdout
    lines = set(told.splitlines())
    assert 'APT::Architecture "arm64";' in lines
    assert [line for line in lines if line.startswith("APT::Architectures::")] == ['APT::Architectures:: "arm64";']
    for key in ("Dir::State", "Dir::Cache"):
        assert any(line.startswith(f'{key} "{tmp_path}/with space/') for line in lines)
    assert not [line for line in lines if "-Invoke" in line and line.split('"')[1]]


def test_an_unknown_package_is_not_offered(tmp_path: Path) -> None:
    archive = _debian.Archive(tmp_path, "arm64")
    assert not archive.offers("there-is-no-such-package")
    with pytest.raises(ProviderError, match="apt cannot get there-is-no-such-package for arm64"):
        archive.package("there-is-no-such-package")
