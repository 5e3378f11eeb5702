"""The files of a directory that somebody else may have made: what is there, without following a link or opening a pipe.

A name in a manifest or in a graph is checked as text first; only then is it looked for.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from compress.errors import CompressError

MAX_ENTRIES = 10_000
MAX_NAME = 1024
#: What file systems take.
MAX_PART = 255
_CHUNK = 1 << 20


@dataclass
class Tree:
    """A directory's entries by their names relative to it, ``/`` between parts.

    Attributes:
        files: Sizes of regular files, bytes.
        links: Symbolic links, and where they point.
        special: What else there is (pipes, sockets, devices), and its kind.
    """

    files: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    special: dict[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.files or name in self.links or name in self.special


def scan(directory: Path) -> Tree:
    """List a directory and all below it; links are listed, not followed.

    Raises:
        CompressError: It cannot be listed, or holds more entries than any artifact does.
    """
    tree, waiting, seen = Tree(), [""], 0
    while waiting:
        prefix = waiting.pop()
        try:
            entries = sorted(os.scandir(directory / prefix), key=lambda entry: entry.name)
        except OSError as error:
            raise CompressError(f"cannot list the directory: {error.strerror}", where=str(directory / prefix)) from None
        seen += len(entries)
        if seen > MAX_ENTRIES:
            raise CompressError(f"more than {MAX_ENTRIES:,} entries: this is no artifact", where=str(directory))
        for entry in entries:
            name = f"{prefix}{entry.name}"
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                tree.links[name] = os.readlink(directory / name)  # noqa: PTH115 - the text, not a path
            elif stat.S_ISDIR(found.st_mode):
                waiting.append(f"{name}/")
            elif stat.S_ISREG(found.st_mode):
                tree.files[name] = found.st_size
            else:
                tree.special[name] = _kind(found.st_mode)
    return tree


def name_fault(name: str) -> str | None:
    """Return what is wrong with a name that shall lie in a directory, ``None`` where nothing is.

    Only one spelling of each name is accepted: ``a//b`` and ``./a`` are wrong, as are Windows' separators and drives.
    """
    if not name or len(name) > MAX_NAME:
        return "it is empty" if not name else f"it is longer than {MAX_NAME} characters"
    if any(len(part.encode("utf-8", "replace")) > MAX_PART for part in name.split("/")):
        return f"a part of it is longer than {MAX_PART} bytes"
    if any(not letter.isprintable() for letter in name):
        return "it has a character that cannot be printed"
    if "\\" in name or PureWindowsPath(name).drive:
        return "it has a backslash or a drive"
    if name.startswith("/"):
        return "it is absolute"
    if ".." in name.split("/"):
        return "it has '..'"
    if name == "." or PurePosixPath(name).as_posix() != name:
        return "it is not in its shortest form"
    return None


def sha256(path: Path) -> str:
    """Return a regular file's SHA-256, hexadecimal, read in chunks.

    Raises:
        CompressError: It cannot be read, or is not a regular file (any more).
    """
    state = hashlib.sha256()
    try:
        # A file may become a link or a pipe after the directory was listed.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
        with open(descriptor, "rb", buffering=0) as stream:  # noqa: PTH123 - a descriptor
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CompressError("it is not a regular file", where=path.name)
            while chunk := stream.read(_CHUNK):
                state.update(chunk)
    except OSError as error:
        raise CompressError(f"it cannot be read: {error.strerror}", where=path.name) from None
    return state.hexdigest()


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
    return kinds.get(stat.S_IFMT(mode), "special file")
