"""What validation needs to know of an artifact directory: its graph, session options and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.package.external import data_files
from compress.package.onnx_check import check_places
from compress.package.tree import name_fault
from compress.profile import names_a_file
from compress.source.files import MAX_CONFIG_BYTES, contained, read_json_object
from compress.tasks import architecture_of, task_of
from compress.validation.static_decoding import DECODE_NAME

DECODING = "text-generation"
MAX_VOCABULARY = 1 << 24


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk.

    Attributes:
        directory: Where it is, with its tokenizer.
        model: The graph.
        session_options: ONNX Runtime options it has to be loaded with, as text.
        vocab_size: Rows of the token table, and of the output head that has one.
        context_length: The most positions the model knows, ``None`` if its config does not say.
        task: Its task's name in :mod:`compress.tasks`.
        config: Its ``config.json``.
        provider_options: Options that providers are started with, as text, by provider.
        in_pieces: It is run a block at a time (:mod:`compress.validation.in_pieces`).
    """

    directory: Path
    model: Path
    session_options: dict[str, str]
    vocab_size: int
    context_length: int | None
    task: str = DECODING
    config: Mapping[str, Any] = field(default_factory=dict)
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    in_pieces: bool = False

    @property
    def pad_id(self) -> int:
        """The token that fills up short sequences; what it is makes no difference behind an attention mask."""
        pad = self.config.get("pad_token_id")
        return pad if isinstance(pad, int) and 0 <= pad < self.vocab_size else 0

    @property
    def bytes(self) -> int:
        """Size of the graph and its weights on disk."""
        return model_bytes(self.model)


def open_artifact(directory: Path) -> Artifact:
    """Read ``genai_config.json`` (graph file and session options, if there is one) and ``config.json``.

    A decoder has the former; without it, the config's architecture says what the task is.

    Raises:
        CompressError: Something is missing, damaged, or points outside the directory.
        UnsupportedModelError: The architecture has a head that no task here has.
    """
    if not directory.is_dir():
        raise CompressError("there is no such artifact directory", where=str(directory))
    config = _read(directory / "config.json")
    decoder: Any = {}
    if (directory / "genai_config.json").exists():
        model = _read(directory / "genai_config.json").get("model")
        decoder = model.get("decoder", {}) if isinstance(model, dict) else model
        if not isinstance(decoder, dict):
            raise CompressError("model.decoder is not a mapping", where="genai_config.json")
    filename = decoder.get("filename", "model.onnx")
    if not isinstance(filename, str) or Path(filename).name != filename or name_fault(filename):
        raise CompressError(f"the graph's file name {filename!r:.80} is not a plain name", where="genai_config.json")
    if not (directory / filename).is_file():
        raise CompressError(f"the artifact has no {filename}", where=str(directory))
    contained(directory, filename, named_by="genai_config.json")
    for graph in (directory / filename, directory / DECODE_NAME):
        if graph.is_file():
            check_places(graph)
    vocab = config.get("vocab_size")
    if type(vocab) is not int or not 0 < vocab <= MAX_VOCABULARY:
        raise CompressError("the config does not say the vocabulary's size", where=str(directory / "config.json"))
    context = config.get("max_position_embeddings", config.get("n_positions"))
    genai = (directory / "genai_config.json").exists()
    return Artifact(
        directory,
        directory / filename,
        _options(decoder.get("session_options", {})),
        vocab,
        context if type(context) is int and context > 0 else None,
        DECODING if genai or architecture_of(config) is None else task_of(config).name,
        config,
    )


def model_bytes(model: Path) -> int:
    """Return the bytes of a graph and what belongs to it: its external data, a static decoder's other graph.

    What both refer to counts once; what a packaging target made of them besides does not count.
    """
    graphs = [path for path in (model, model.with_name(DECODE_NAME)) if path.is_file()]
    data = {path for graph in graphs for path in data_files(graph)}
    return sum(path.stat().st_size for path in (*graphs, *data))


def _options(options: object) -> dict[str, str]:
    """Return the scalar session options as text; ``provider_options`` and other lists belong to genai."""
    if not isinstance(options, dict):
        raise CompressError("session_options is not a mapping", where="genai_config.json")
    for key, value in options.items():
        if names_a_file(key, value):
            raise CompressError(
                f"the session option {key!r} names a file; ONNX Runtime would read or write it",
                where="genai_config.json",
                hint="do not use this artifact: no export writes such an option",
            )
    return {
        str(key): str(int(value)) if isinstance(value, bool) else str(value)
        for key, value in options.items()
        if isinstance(value, str | int | float)
    }


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path, MAX_CONFIG_BYTES, str(path))
