"""The artifact's own graph run in pieces, for a memory that does not hold it whole: jobs of the artifact worker.

The graph is cut at its blocks (:mod:`compress.graph.cut`), and one piece at a time is a session of the same provider
with the same options. A piece reads its weights from the artifact's data file, where they are; nothing is copied. What
goes from piece to piece lies on the disk. The text is given, so decoding through the cache goes piece by piece as well:
each has the keys and values of its own block, and is run on all texts before the next one is loaded.

Jobs are ``logits`` and ``cached_logits`` of :mod:`compress.validation.worker`, with the same answers. What would have
to know a token before the next (greedy text, speed) has no meaning here.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.contracts import Provider
from compress.errors import CompressError
from compress.graph.cut import Piece, cut, extract
from compress.package.external import load_graph, save_graph
from compress.validation.decoding import KEEP, PAST, PRESENT, empty_cache
from compress.validation.logits import LogitsWriter
from compress.validation.protocol import Json

Progress = Callable[[float], None]
Arrays = dict[str, npt.NDArray[Any]]

#: ONNX Runtime only reads external data below the graph's own directory: so pieces lie beside it for a moment.
PIECE_NAME = ".piece.onnx"
_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", KEEP})
#: The arena doubles what it asks the system for, and keeps it until the session ends.
_FRUGAL = {"enable_cpu_mem_arena": "0", "enable_mem_pattern": "0"}


@dataclass
class _Text:
    """One text of one job: what is fed in turn, and where the logits go.

    Attributes:
        chunks: Token ids int64 ``[1, new]``, each fed behind those before it.
        keep: ``logits_to_keep`` of each chunk: 0 for all, k for the last k.
        rows: The first row of each chunk's logits in the job's output, ``None`` where they are not wanted.
        output: The job's.
    """

    chunks: list[npt.NDArray[np.int64]]
    keep: list[int]
    rows: list[int | None]
    output: _Output


@dataclass
class _Output:
    """A file of logits that is opened when the width of the vocabulary is known."""

    path: str
    rows: int
    stack: contextlib.ExitStack
    writer: LogitsWriter | None = None

    def write(self, row: int, logits: npt.NDArray[np.float32]) -> None:
        """Write rows float32 ``[rows, vocab]``."""
        if self.writer is None:
            self.writer = self.stack.enter_context(LogitsWriter(self.path, self.rows, logits.shape[1]))
        self.writer.write(row, 0, logits)

    def shape(self) -> list[int]:
        """Return the shape of what was written."""
        return [] if self.writer is None else list(self.writer.shape)


@dataclass
class InPieces:
    """What running the jobs left to say.

    Attributes:
        results: The answers of the jobs.
        pieces: How many there were.
        load_seconds: Of all their sessions.
        nodes: Of each provider's name in ONNX Runtime, ``NAME (TYPE)`` of every node that it was given, copies once.
    """

    results: list[Json] = field(default_factory=list)
    pieces: int = 0
    load_seconds: float = 0.0
    nodes: dict[str, list[str]] = field(default_factory=dict)


def run(
    model: Path,
    provider: Provider,
    options: Mapping[str, str],
    threads: int,
    provider_options: Mapping[str, str],
    jobs: Sequence[Json],
    progress: Progress,
) -> InPieces:
    """Cut a graph and run jobs on its pieces; without jobs they are only loaded.

    Args:
        model: The graph; a piece is written beside it for as long as its session takes to start.
        provider: Where pieces run.
        options: Session options.
        threads: Of a session.
        provider_options: The provider's.
        jobs: ``logits`` and ``cached_logits``.
        progress: Called with the fraction that is done.

    Raises:
        CompressError: The graph cannot be cut, is no decoder, or the provider takes only a few tokens at once.
    """
    if provider.tokens_at_once() is not None:
        raise CompressError(f"on {provider.name} a graph is not run in pieces", where=str(model))
    whole = load_graph(model)
    pieces = cut(whole)
    unknown = {name for piece in pieces for name in piece.inputs if name not in _INPUTS and not name.startswith(PAST)}
    if unknown or "logits" not in pieces[-1].outputs:
        raise CompressError("the graph is not a decoder", where=f"unknown inputs {sorted(unknown)}")
    done = InPieces(pieces=len(pieces))
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".compress-pieces-", dir=_beside(jobs))))
        outputs, texts = _texts(jobs, stack)
        types: dict[str, int] = {}
        for number, piece in enumerate(pieces):
            started = time.perf_counter()
            save_graph(extract(whole, piece, types), model.with_name(PIECE_NAME))
            try:
                session = provider.session(
                    model.with_name(PIECE_NAME), {**options, **_FRUGAL}, threads, provider_options
                )
            finally:
                model.with_name(PIECE_NAME).unlink(missing_ok=True)
            done.load_seconds += time.perf_counter() - started
            types |= {value.name: _element_type(value) for value in session.get_outputs()}
            copies = {whole.graph.node[index].name for index in piece.copies}
            for owner, names in _placed(session, copies):
                done.nodes.setdefault(owner, []).extend(names)
            for index, text in enumerate(texts):
                _run_text(session, piece, text, _States(place, index))
                progress((number + (index + 1) / len(texts)) / len(pieces))
            del session  # before the next one is there
        done.results = [{"shape": output.shape()} for output in outputs]
    return done


def _beside(jobs: Sequence[Json]) -> Path | None:
    """Return where states lie while they are needed: beside the outputs, where room was checked."""
    return Path(jobs[0]["output"]).parent if jobs else None


def _texts(jobs: Sequence[Json], stack: contextlib.ExitStack) -> tuple[list[_Output], list[_Text]]:
    outputs, texts = [], []
    for job in jobs:
        windows = np.load(job["windows"])
        count, length = windows.shape
        if job["kind"] == "logits":
            first, steps = length, 0
        elif job["kind"] == "cached_logits":
            first, steps = int(job["prefill"]), length - int(job["prefill"])
        else:
            raise CompressError(f"the job {job['kind']!r} needs the whole graph", where="request")
        wanted = steps or length
        output = _Output(job["output"], count * wanted, stack)
        outputs.append(output)
        for number, window in enumerate(windows):
            chunks = [window[None, :first], *(token[None, None] for token in window[first:])]
            row = number * wanted
            rows: list[int | None] = [None if steps else row, *range(row, row + steps)]
            texts.append(_Text(chunks, [1 if steps else 0, *[0] * steps], rows, output))
    return outputs, texts


class _States:
    """What a text's chunks hand from a piece to the next one, in a file."""

    def __init__(self, place: Path, index: int) -> None:
        self.path = place / f"{index}.npz"

    def read(self) -> list[Arrays]:
        """Return what the piece before handed on, by chunk; empty before the first."""
        if not self.path.exists():
            return []
        found: dict[int, Arrays] = {}
        with np.load(self.path) as file:
            for key in file.files:
                chunk, _, name = key.partition("|")
                found.setdefault(int(chunk), {})[name] = file[key]
        return [found[chunk] for chunk in sorted(found)]

    def write(self, chunks: Sequence[Arrays]) -> None:
        """Replace what is kept."""
        kept = {f"{chunk}|{name}": array for chunk, values in enumerate(chunks) for name, array in values.items()}
        np.savez(self.path, **kept)  # type: ignore[arg-type]


def _element_type(value: Any) -> int:  # noqa: ANN401
    """Return the ONNX number of a session value's type, which it tells as ``tensor(float)``."""
    from onnx import TensorProto

    return int(TensorProto.DataType.Value(value.type.removeprefix("tensor(").removesuffix(")").upper()))


def _run_text(session: Any, piece: Piece, text: _Text, states: _States) -> None:  # noqa: ANN401
    """Feed a text's chunks to a piece in turn, its cache growing, and keep what later pieces need."""
    given = states.read() or [{} for _ in text.chunks]
    past = {value.name: value for value in session.get_inputs() if value.name.startswith(PAST)}
    cache = {name: empty_cache(value, 1) for name, value in past.items()}
    keep_shape = next((value.shape for value in _declared(session) if value.name == KEEP), None)
    names = [*piece.handed, *piece.outputs]
    length, handed = 0, []
    for chunk, ids in enumerate(text.chunks):
        new = ids.shape[1]
        feeds: Arrays = {
            "input_ids": ids,
            "attention_mask": np.ones((1, length + new), np.int64),
            "position_ids": np.arange(length, length + new, dtype=np.int64)[None],
        }
        if keep_shape is not None:
            feeds[KEEP] = np.full([1] * len(keep_shape), text.keep[chunk], np.int64)
        feeds = {name: value for name, value in feeds.items() if name in piece.inputs}
        feeds |= {name: given[chunk][name] for name in piece.given} | cache
        made = dict(zip(names, session.run(names, feeds), strict=True))
        length += new
        cache = {name: made[PRESENT + name.removeprefix(PAST)] for name in past}
        row = text.rows[chunk]
        if "logits" in made and row is not None:
            text.output.write(row, made["logits"][0].astype(np.float32, copy=False))
        handed.append({n: given[chunk][n] for n in piece.passed} | {n: made[n] for n in piece.handed})
    states.write(handed)


def _declared(session: Any) -> Iterator[Any]:  # noqa: ANN401 - onnxruntime has no stubs
    yield from session.get_overridable_initializers()
    yield from session.get_inputs()


def _placed(session: Any, copies: set[str]) -> Iterator[tuple[str, list[str]]]:  # noqa: ANN401
    """Yield providers and the nodes that they were given, but for those that an earlier piece has."""
    for subgraph in session.get_provider_graph_assignment_info():
        nodes = [node for node in subgraph.get_nodes() if node.name not in copies or not node.name]
        yield subgraph.ep_name, [f"{node.name} ({node.op_type})" for node in nodes]
