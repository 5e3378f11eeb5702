"""Artifacts in an object store or another file system, through fsspec: the manifest last, everything read back.

What a manifest lists is sent first and checked at the other side by size and SHA-256; ``manifest.json`` follows when
all of it is there. An upload that ends midway leaves no manifest, so nothing that passes for an artifact.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from compress.errors import CompressError, UsageError
from compress.fleet.model import Outcome
from compress.package import manifest
from compress.package.manifest_schema import parse_manifest
from compress.package.tree import name_fault, sha256

_CHUNK = 1 << 20
_URL = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)
#: What a file system needs besides, by its scheme, where the error does not say.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "hf": ""}


def is_url(output: str) -> bool:
    """Return whether an output is a place of :class:`Store`, not a path."""
    return _URL.match(output) is not None


class Store:
    """A folder of a file system that fsspec knows."""

    def __init__(self, url: str) -> None:
        """Connect.

        Raises:
            UsageError: It is no such URL, names a file system that nobody knows, or has a password in it.
            CompressError: A package is missing, or the place does not answer.
        """
        scheme, parts = url.partition("://")[0], urlsplit(url)
        if "::" in url:
            raise UsageError("chained URLs are not written to", where=url, hint="give the inner URL alone")
        if parts.password is not None:
            raise UsageError(
                "the URL has a password, which logs and sweep.json would repeat",
                where=f"{scheme}://...",
                hint="give it by the file system's environment variables or configuration file",
            )
        import fsspec

        try:
            self._system, root = fsspec.url_to_fs(url)
        except ImportError as error:
            package = _PACKAGES.get(scheme.lower())
            hint = f"pip install {package}" if package else "install the package that it names"
            raise UsageError(f"{scheme}:// needs a package: {error}", where=url, hint=hint) from None
        except ValueError as error:
            known = "s3://, gs://, abfs://, hf://, file:// ..."
            raise UsageError(f"no file system is called {scheme!r}: {error}", where=url, hint=known) from None
        except Exception as error:  # each file system has its own errors
            raise _failed("the output cannot be reached", error, url) from error
        self.url = url.rstrip("/")
        self._root = root.rstrip("/")

    @property
    def within_process(self) -> bool:
        """Whether only this process sees it."""
        return self.url.partition("://")[0].lower() == "memory"

    def upload(self, directory: Path, name: str) -> None:
        """Send an artifact, the manifest last, and check all of it at the other side.

        Raises:
            CompressError: The artifact is not what its manifest says, or something did not arrive; there is no manifest
                at the other side then.
        """
        found = parse_manifest(manifest.read_manifest(directory))
        files = [(item.name, item.size, item.sha256) for item in found.files]
        signature = directory / manifest.SIGNATURE_NAME
        if signature.is_file():
            files.append((signature.name, signature.stat().st_size, sha256(signature)))
        last = directory / manifest.NAME
        files.append((last.name, last.stat().st_size, sha256(last)))
        with self._explained("the upload failed", name):
            self._remove(f"{name}/{manifest.NAME}")
            for file, size, expected in files:
                fault = name_fault(file)
                if fault is not None:
                    raise CompressError(f"the manifest lists {file!r}, which is refused: {fault}", where=str(directory))
                self._send(directory / file, f"{name}/{file}", size, expected)

    def _send(self, source: Path, target: str, size: int, expected: str) -> None:
        place = f"{self._root}/{target}"
        self._system.makedirs(place.rpartition("/")[0], exist_ok=True)
        try:
            self._system.put_file(str(source), place)
            found = self._digest(target)
        except BaseException:
            if target.endswith(f"/{manifest.NAME}"):
                with contextlib.suppress(Exception):
                    self._remove(target)
            raise
        if found != (size, expected):
            self._remove(target)
            raise CompressError(
                f"{target} arrived with other bytes than were sent", where=self.url, hint="try again; look at the store"
            )

    def _digest(self, target: str) -> tuple[int, str]:
        state, size = hashlib.sha256(), 0
        with self._system.open(f"{self._root}/{target}", "rb") as stream:
            while chunk := stream.read(_CHUNK):
                state.update(chunk)
                size += len(chunk)
        return size, state.hexdigest()

    def _remove(self, target: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._system.rm_file(f"{self._root}/{target}")

    def write(self, name: str, content: bytes) -> None:
        """Write a small file.

        Raises:
            CompressError: It cannot be written there.
        """
        with self._explained("the output cannot be written", name):
            self._system.makedirs(self._root, exist_ok=True)
            self._system.pipe_file(f"{self._root}/{name}", content)

    def read(self, name: str, limit: int) -> bytes | None:
        """Return a file of at most ``limit`` bytes, ``None`` where there is none.

        Raises:
            CompressError: It is larger, or the place does not answer.
        """
        with self._explained("the output cannot be read", name):
            try:
                with self._system.open(f"{self._root}/{name}", "rb") as stream:
                    content: bytes = stream.read(limit + 1)
            except FileNotFoundError:
                return None
        if len(content) > limit:
            raise CompressError(f"{name} has more than {limit:,} bytes", where=self.url)
        return content

    def still_there(self, name: str, expected: Outcome) -> bool:
        """Return whether an artifact's manifest is the recorded one, and every file there has its size.

        Their bytes were compared when they were sent, and are not fetched again.

        Raises:
            CompressError: The place does not answer.
        """
        content = self.read(f"{name}/{manifest.NAME}", manifest.MAX_BYTES)
        if content is None or hashlib.sha256(content).hexdigest() != expected.manifest_sha256:
            return False
        sizes = {item.name: item.size for item in parse_manifest(json.loads(content)).files}
        with self._explained("the output cannot be read", name):
            for file, size in sizes.items():
                try:
                    if self._system.info(f"{self._root}/{name}/{file}")["size"] != size:
                        return False
                except FileNotFoundError:
                    return False
        return True

    def holds(self, name: str) -> bool:
        """Return whether there is an artifact of this name.

        Raises:
            CompressError: The place does not answer.
        """
        with self._explained("the output cannot be read", name):
            return bool(self._system.exists(f"{self._root}/{name}/{manifest.NAME}"))

    def remove(self, name: str) -> None:
        """Remove an artifact, its manifest first.

        Raises:
            CompressError: The place does not answer, or refuses.
        """
        with self._explained("an older artifact cannot be removed", name):
            self._remove(f"{name}/{manifest.NAME}")
            with contextlib.suppress(FileNotFoundError):
                self._system.rm(f"{self._root}/{name}", recursive=True)

    @contextlib.contextmanager
    def _explained(self, what: str, name: str) -> Iterator[None]:
        try:
            yield
        except CompressError:
            raise
        except Exception as error:  # each file system has its own errors
            raise _failed(what, error, f"{self.url}/{name}") from error


def _failed(what: str, error: Exception, where: str) -> CompressError:
    told: Any = str(error).strip() or type(error).__name__
    return CompressError(
        f"{what}: {type(error).__name__}: {told.splitlines()[0][:200]}",
        where=where,
        hint="check the address, the permissions and the connection",
    )
