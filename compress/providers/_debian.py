"""Debian packages for a cache folder: no root, nothing installed, any architecture.

apt itself fetches and verifies, with the machine's own sources and keys, but with lists and a (blank) state of our own:
so packages of another architecture can be had without telling dpkg about it, and a machine whose lists were deleted, as
container images do, needs no root to renew them.
"""

from __future__ import annotations

import shutil
import stat
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from compress.environments import run
from compress.errors import ProviderError

# Hooks of the machine's configuration are for its own state: one cleans its cache, another renews a desktop's lists.
_OWN = """\
#clear APT::Architectures;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
#clear DPkg::Pre-Install-Pkgs;
"""
_TOOLS = ("apt-get", "apt-cache", "dpkg", "dpkg-deb")


def missing_tools() -> list[str]:
    """Return which of the tools that this module calls are not here."""
    return [tool for tool in _TOOLS if shutil.which(tool) is None]


def native_architecture() -> str:
    """Return Debian's name of this machine's architecture."""
    return subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True).stdout.strip()


class Archive:
    """The packages that this machine's sources offer for one architecture.

    Args:
        folder: Where lists and packages may be kept; it is the caller's to delete.
        architecture: Debian's name of it.
    """

    def __init__(self, folder: Path, architecture: str) -> None:
        self._folder, self._architecture = folder, architecture
        for name in ("state/lists/partial", "cache/archives/partial", "packages"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        (folder / "own.conf").write_text(_OWN)

    def update(self) -> None:
        """Fetch the lists.

        Raises:
            ProviderError: apt refuses: no network, a signature that does not fit, a source without the architecture.
        """
        run(self._command("apt-get", "update"), what=f"apt cannot read the package lists for {self._architecture}")

    def offers(self, package: str) -> bool:
        """Return whether a package of that name can be had."""
        done = subprocess.run(self._command("apt-cache", "show", package), capture_output=True, check=False)
        return done.returncode == 0

    def with_dependencies(self, packages: Sequence[str]) -> list[Path]:
        """Fetch packages and everything they depend on; return the files.

        Raises:
            ProviderError: apt refuses.
        """
        wanted = ["--no-install-recommends", "--download-only", "--yes", "install", *packages]
        run(self._command("apt-get", *wanted), what=f"apt cannot get {', '.join(packages)} for {self._architecture}")
        return sorted((self._folder / "cache" / "archives").glob("*.deb"))

    def package(self, name: str) -> Path:
        """Fetch one package alone; return its file.

        Raises:
            ProviderError: apt refuses.
        """
        place = self._folder / "packages"
        what = f"apt cannot get {name} for {self._architecture}"
        run(self._command("apt-get", "download", name), what=what, cwd=place)
        found = sorted(place.glob(f"{name}_*.deb"))
        if not found:
            raise ProviderError(what, where=str(place))
        return found[-1]

    def _command(self, tool: str, *arguments: str) -> list[str]:
        settings = {
            "APT::Architecture": self._architecture,
            "APT::Architectures::": self._architecture,
            "Acquire::Languages": "none",
            "Dir::State": self._folder / "state",
            "Dir::State::status": self._folder / "status",
            "Dir::Cache": self._folder / "cache",
        }
        options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
        return [tool, "-q", "-c", str(self._folder / "own.conf"), *options, *arguments]


def unpack(package: Path, root: Path) -> None:
    """Unpack a whole package into ``root``.

    Raises:
        ProviderError: It is damaged.
    """
    run(["dpkg-deb", "-x", str(package), str(root)], what=f"{package.name} cannot be unpacked")


def extract(package: Path, wanted: Mapping[str, str], target: Path) -> list[str]:
    """Write a package's regular files whose base names are keys of ``wanted`` to ``target``, under the values.

    Returns:
        The keys that were found.

    Raises:
        ProviderError: It is damaged.
    """
    found = []
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as reader:
        assert reader.stdout is not None
        try:
            with tarfile.open(fileobj=reader.stdout, mode="r|") as archive:
                for member in archive:
                    name = PurePosixPath(member.name).name
                    source = archive.extractfile(member) if name in wanted and member.isfile() else None
                    if source is None:
                        continue
                    path = target / wanted[name]
                    with path.open("wb") as stream:
                        shutil.copyfileobj(source, stream)
                    path.chmod(0o755 if member.mode & stat.S_IXUSR else 0o644)
                    found.append(name)
        except tarfile.TarError as error:
            raise ProviderError(f"{package.name} cannot be unpacked: {error}", where=str(package)) from error
    return found
