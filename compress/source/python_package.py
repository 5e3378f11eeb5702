"""A model that lies in an installed Python package: ``package:NAME`` or ``package:NAME/PATH/IN/PACKAGE``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path, PurePosixPath

from compress.errors import SourceError, UsageError
from compress.source.base import OpenCheckpoint

PREFIX = "package:"


def locate(reference: str) -> tuple[str, str, Path]:
    """Find the model of a ``package:`` reference, without importing the package.

    Returns:
        The package's import name, the path inside it (``""`` for the package itself), and the path on this machine.

    Raises:
        SourceError: The package is not installed, or has no such file.
    """
    name, _, inner = reference.removeprefix(PREFIX).partition("/")
    inner = inner.strip("/")
    if not name.isidentifier():
        raise SourceError(f"{name!r} is not a package's import name", where=reference, hint="write package:NAME/PATH")
    # The top-level name only: looking up a submodule would import its parent.
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        distribution = name.replace("_", "-")
        raise SourceError(
            f"the package {name!r} is not installed",
            where=reference,
            hint=f"pip install {distribution} (the models of the demonstration: pip install 'compress[demo]')",
        )
    roots = [Path(location).resolve() for location in spec.submodule_search_locations]
    parts = PurePosixPath(inner).parts
    for root in roots:
        path = root.joinpath(*parts).resolve()
        if ".." in parts or not path.is_relative_to(root):
            raise SourceError("the path leads outside the package", where=reference)
        if path.exists():
            return name, inner, path
    held = sorted(path.name for root in roots for path in root.glob("*") if path.is_dir() or path.suffix == ".gguf")
    held = [entry for entry in held if not entry.startswith(("__", "."))]
    raise SourceError(
        f"the package {name!r} holds no {inner!r}",
        where=reference,
        hint=f"it holds: {', '.join(held[:10]) or 'no model'}",
    )


def version_of(name: str) -> str | None:
    """Return the version of the distribution that provides an import name, or ``None`` for one without metadata."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        distributions = importlib.metadata.packages_distributions().get(name)
        return importlib.metadata.version(distributions[0]) if distributions else None


class PythonPackage:
    """The source kind ``package``."""

    name = "package"
    describes = "package:NAME/PATH"
    priority = 10

    def matches(self, reference: str) -> bool:
        """Return whether the reference begins with ``package:``."""
        return reference.startswith(PREFIX)

    def open(
        self, reference: str, *, revision: str | None, cache_dir: Path | None, config_only: bool
    ) -> OpenCheckpoint:
        """Open what lies there with the source kind that reads it; the package's version is the revision."""
        if revision is not None:
            raise UsageError("a package's version is the one installed", where=reference, hint="leave the revision out")
        name, inner, path = locate(reference)
        from compress.source import sources

        source = next(source for source in sources() if source.matches(str(path)))
        checkpoint = source.open(str(path), revision=None, cache_dir=cache_dir, config_only=config_only)
        checkpoint.reference = reference
        checkpoint.kind = self.name
        checkpoint.identifier = f"{name}/{inner}" if inner else name
        checkpoint.revision = version_of(name)
        return checkpoint


SOURCE = PythonPackage()
