"""What all source kinds share: the life of a checkpoint, its digests and its side files, and the plug-in protocol."""

from __future__ import annotations

import importlib.util
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from compress import temporary
from compress.contracts import Checkpoint, FloatArray, SourceFile, TensorInfo
from compress.errors import SourceError, UnsupportedModelError
from compress.source.files import MAX_CONFIG_BYTES, check_regular, contained, read_json_object, sha256_of
from compress.source.sentence_transformers import SENTENCE_NAMES

CONFIG_NAME = "config.json"
#: Side files are copied into an artifact and read whole by other libraries.
MAX_SIDECAR_BYTES = 128 << 20
_MAX_MODEL_TYPE = 64
TOKENIZER_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
# Some lie in a folder of the model's directory: names with a `/`.
SIDECAR_NAMES = (
    *TOKENIZER_NAMES,
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    *SENTENCE_NAMES,
)
# Each alternative is a set of files from which transformers builds a tokenizer.
VOCABULARIES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("spiece.model",),
)


class OpenCheckpoint(Checkpoint, Protocol):
    """A :class:`Checkpoint` as :func:`compress.source.open_checkpoint` gives it: it can be closed.

    Attributes:
        has_weights: False when only the config was found (or fetched): ``tensors()`` is empty then.
    """

    has_weights: bool

    def close(self) -> None:
        """Release file descriptors and temporary files; reading afterwards raises ``SourceError``."""
        ...

    def __enter__(self) -> Self:
        """Return the checkpoint itself."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        ...


class Source(Protocol):
    """A kind of model reference. A module of this package that defines ``SOURCE`` adds one; nothing registers it.

    Attributes:
        name: The kind, as the manifest shows it.
        describes: How a reference of this kind looks, for error messages.
        priority: The lowest one that matches a reference opens it.
    """

    name: str
    describes: str
    priority: int

    def matches(self, reference: str) -> bool:
        """Return whether the reference is of this kind; must be cheap, and contact nothing."""
        ...

    def open(
        self, reference: str, *, revision: str | None, cache_dir: Path | None, config_only: bool
    ) -> OpenCheckpoint:
        """Open the checkpoint.

        Args:
            reference: What the user asked for.
            revision: A branch, tag or commit, where the kind has such a thing.
            cache_dir: Where downloads and derived files may be kept.
            config_only: Weights may be missing; do not fetch them.

        Raises:
            SourceError: The model is missing or damaged.
        """
        ...


class BaseCheckpoint:
    """The parts of a checkpoint that do not depend on the weights' format."""

    def __init__(
        self,
        *,
        reference: str,
        kind: str,
        identifier: str,
        revision: str | None,
        config: Mapping[str, Any],
        directory: Path | None,
    ) -> None:
        self.reference = reference
        self.kind = kind
        self.identifier = identifier
        self.revision = revision
        self.config = config
        self._directory = directory
        self.has_weights = True
        self._files: tuple[SourceFile, ...] | None = None
        self._temporary: weakref.finalize[..., Any] | None = None

    @property
    def directory(self) -> Path:
        """A local directory with ``config.json`` and the tokenizer; one that has to be made is made on first use.

        Raises:
            SourceError: It cannot be made.
        """
        if self._directory is None:
            self._directory = self._make_directory()
        return self._directory

    @directory.setter
    def directory(self, path: Path) -> None:
        self._directory = path

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor's header by name."""
        raise NotImplementedError

    def read(self, name: str, start: int = 0, stop: int | None = None) -> FloatArray:
        """Return rows ``[start, stop)`` along axis 0 as a new C-contiguous float32 array."""
        raise NotImplementedError

    def files(self) -> Sequence[SourceFile]:
        """Return the source's files with their SHA-256, sorted by name; computed once."""
        if self._files is None:
            paths = self._paths()
            self._files = tuple(
                SourceFile(name, paths[name].stat().st_size, sha256_of(paths[name])) for name in sorted(paths)
            )
        return self._files

    def stamps(self) -> Mapping[str, tuple[int, ...]]:
        """Return what tells whether a file of the source was written to: size, time of change, by name (no reading)."""
        found = {name: path.stat() for name, path in self._paths().items()}
        return {name: (item.st_size, item.st_mtime_ns, item.st_ctime_ns) for name, item in found.items()}

    def sidecars(self) -> Mapping[str, Path]:
        """Return the tokenizer, template, generation and sentence-transformers files there are, by name."""
        return find_sidecars(self.directory)

    def close(self) -> None:
        """Release what is held."""
        if self._temporary is not None:
            self._temporary()

    def __enter__(self) -> Self:
        """Return the checkpoint itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _paths(self) -> Mapping[str, Path]:
        """Return the files that make up the source, by the name the manifest shows."""
        raise NotImplementedError

    def _make_directory(self) -> Path:
        """Make ``directory``; a kind that has none at first overrides this."""
        raise NotImplementedError

    def _temporary_directory(self) -> Path:
        """Make a directory that lives as long as the checkpoint."""
        path = temporary.make("compress-source-")
        self._temporary = weakref.finalize(self, shutil.rmtree, path, True)
        return path


def find_sidecars(directory: Path) -> dict[str, Path]:
    """Return the files of ``directory`` that an artifact takes over unchanged, by name (``config.json`` is not one).

    A name is relative to the directory, with ``/`` before a file in a folder (``1_Pooling/config.json``).

    Raises:
        SourceError: One of them is a link out of the directory, not a regular file, or larger than any.
    """
    found = {
        name: contained(directory, name)
        for name in SIDECAR_NAMES
        if (directory / name).is_symlink() or (directory / name).exists()
    }
    for name, path in found.items():
        check_regular(path, MAX_SIDECAR_BYTES, name)
    return found


def require_tokenizer(checkpoint: Checkpoint) -> None:
    """Check that a tokenizer can be built from the checkpoint's side files.

    Raises:
        SourceError: None can; names what is missing.
    """
    present = checkpoint.sidecars()
    if any(all(name in present for name in names) for names in VOCABULARIES):
        return
    alternatives = ", ".join(" with ".join(names) for names in VOCABULARIES)
    raise SourceError(
        f"the tokenizer is missing: none of {alternatives}",
        where=checkpoint.identifier,
        hint="copy the tokenizer's files of the original model beside its config.json",
    )


def load_config(directory: Path) -> dict[str, Any]:
    """Read and check ``config.json``.

    Raises:
        SourceError: It is missing, not a JSON object, or says that the weights are quantized already.
        UnsupportedModelError: The model needs Python code of its own.
    """
    path = directory / CONFIG_NAME
    if not path.exists() and not path.is_symlink():
        raise SourceError(
            "config.json is missing", where=directory.name, hint="give the directory that holds the model's config.json"
        )
    config = read_json_object(contained(directory, CONFIG_NAME), MAX_CONFIG_BYTES)
    check_config(config, where=CONFIG_NAME)
    return config


def check_config(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse what no config may say here: quantized weights, or a model that is Python code of its own.

    Raises:
        SourceError: The weights are quantized already, or ``model_type`` is missing.
        UnsupportedModelError: ``auto_map`` names code, and transformers has no model of this type.
    """
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        raise SourceError(
            f"the checkpoint is already quantized ({_quantization_method(quantization)})",
            where=where,
            hint="start from the float16, bfloat16 or float32 checkpoint it was made from",
        )
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise SourceError("config.json names no model_type", where=where, hint="give a Hugging Face transformers model")
    if config.get("auto_map") and not _transformers_has(model_type):
        raise UnsupportedModelError(
            f"the model type {model_type!r} needs Python code that comes with the model (auto_map), which is never run",
            where=where,
            hint="use a model whose architecture is part of transformers",
        )


def _quantization_method(quantization: object) -> str:
    if not isinstance(quantization, Mapping):
        return "unknown method"
    method = quantization.get("quant_method") or quantization.get("quant_algo")
    if not method and (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        method = "bitsandbytes"
    bits = quantization.get("bits")
    return f"{method or 'unknown method'}{f', {bits} bits' if isinstance(bits, int) else ''}"


def _transformers_has(model_type: str) -> bool:
    """Look for the model's package in transformers without importing it (seconds); without transformers, assume so."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return True
    folder = model_type.replace("-", "_")
    return (
        len(folder) <= _MAX_MODEL_TYPE
        and folder.isidentifier()
        and any((Path(root) / "models" / folder).is_dir() for root in spec.submodule_search_locations)
    )
