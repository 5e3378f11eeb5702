"""Target ``qnn-context``: the graphs compiled for one Qualcomm chip, so that a phone need not do it when it starts.

Compiling needs no device: QNN's library does it on x86-64 Linux for any chip it knows. In the artifact::

    qnn/SM8750/model_ctx.onnx        one EPContext node with the graph's inputs and outputs
    qnn/SM8750/model_ctx_qnn.bin     what it refers to, by a relative name
    qnn/SM8750/decode_ctx.*          of a decoder: the same of the graph for one token
    qnn/SM8750/context.json          the chip, the versions, what was compiled

They appear when all is done: compiled beside, loaded back in a process of its own, its outputs compared with those of
the graph it was made from, then renamed. The chip's name is in the graph's metadata too: the simulator runs a binary of
any chip, a device only its own, so :class:`compress.providers.qnn.QnnProvider` refuses a binary for another chip.

A decoder's binaries do not share their weights: QNN compiles such a pair, but its simulator does not load it back, and
what was not loaded back is not packaged (``docs/decisions/0020``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from compress import providers, temporary
from compress.contracts import Encoder, Runtime, Structure
from compress.errors import CompressError, ProviderError, UsageError
from compress.package.qnn_samples import Samples, decoder_samples, encoder_samples, input_shapes
from compress.package.staging import sync
from compress.package.target import Needs, Package, Wish
from compress.package.tree import sha256
from compress.validation.protocol import Json, run_worker
from compress.validation.static_decoding import DECODE_NAME

TARGET = "qnn-context"
PROVIDER = "qnn"
FOLDER, RECORD = "qnn", "context.json"
TIMEOUT_SECONDS = 1800.0
#: HTP and the CPU round the same graph differently in the last bits: 0.9999 and more. A wrong kernel is far below (QNN
#: 2.51 multiplies exactly 16 rows behind a LayerNormalization by 8-bit weights wrongly: 0.3).
MIN_COSINE = 0.99
_WORKER = "package.qnn_context_worker"


@dataclass(frozen=True)
class Graph:
    """A graph of static shapes to compile, and inputs to compare outputs on: a sample a row, by input name."""

    model: Path
    samples: Samples

    @property
    def compiled(self) -> str:
        """Return the name of what comes out: ``model_ctx.onnx`` of ``model.onnx``."""
        return f"{self.model.stem}_ctx.onnx"


@dataclass(frozen=True)
class Context:
    """Compiled graphs.

    Attributes:
        models: The EPContext graphs, in the order of those they were made from.
        soc: The chip's name.
        nbytes: Bytes of all files.
        compile_seconds: What compiling took.
        load_seconds: What loading back took.
    """

    models: tuple[Path, ...]
    soc: str
    nbytes: int
    compile_seconds: float
    load_seconds: float


def applies(structure: Structure) -> bool:
    """Return whether the target can take such a model: any, once its shapes are numbers."""
    return True


def check(wish: Wish) -> None:
    """Find out before work starts whether QNN is here.

    Raises:
        ProviderError: It is not; how to install it.
    """
    providers.load(PROVIDER).runtime()


def needs(wish: Wish) -> Needs:
    """Return what it takes beside the model: a decoder's two graphs are compiled with their weights each."""
    graphs = 1 if isinstance(wish.structure, Encoder) else 2
    return Needs(disk=graphs * wish.plan.data_bytes)


def write(package: Package) -> None:
    """Compile the artifact's graphs for the chip that the profile's ``provider_options.soc_model`` names.

    Raises:
        UsageError: A graph has free dimensions, or no such chip is known.
        CompressError: HTP does not take a graph, or the compiled one answers something else.
    """
    from compress.providers.qnn import DEFAULT_SOC

    directory, structure = package.directory, package.structure
    soc = package.profile.provider_options.get("soc_model", DEFAULT_SOC)
    model, decode = directory / "model.onnx", directory / DECODE_NAME
    shapes, vocabulary = input_shapes(model), structure.vocab_size
    if isinstance(structure, Encoder):
        graphs = [Graph(model, encoder_samples(shapes, vocabulary))]
    else:
        runtime = providers.load(PROVIDER).runtime()
        on_cpu = partial(run_on_cpu, model, soc, runtime=runtime)
        several, one = decoder_samples(shapes, input_shapes(decode), vocabulary, on_cpu)
        graphs = [Graph(model, several), Graph(decode, one)]
    compile_context(graphs, directory / FOLDER, soc)


def run_on_cpu(model: Path, soc: str, samples: Samples, *, runtime: Runtime) -> Samples:
    """Return a graph's outputs on samples, a sample a row, from ONNX Runtime's CPU provider."""
    with temporary.directory("compress-qnn-") as place:
        given, output = Path(place) / "samples.npz", Path(place) / "outputs.npz"
        np.savez(given, **samples)  # type: ignore[arg-type]
        _ask("run", runtime, model=model, soc=soc, samples=given, output=output, provider="cpu")
        with np.load(output) as stored:
            return {name: stored[name] for name in stored.files}


def compile_context(graphs: Sequence[Graph], folder: Path, soc: str, *, runtime: Runtime | None = None) -> Context:
    """Compile graphs of static shapes for a chip and put the result into ``folder`` under the chip's name.

    Args:
        graphs: What to compile; at least one.
        folder: Made if it is missing; the chip's own folder must not be there yet.
        soc: A chip of ``compress.providers.qnn.SOC_MODELS``, by name.
        runtime: The Python that has QNN; by default the provider's.

    Raises:
        UsageError: No such chip is known, or its folder is there.
        ProviderError: QNN is not here, or HTP computes something else than the CPU does.
        CompressError: A node cannot run on HTP, or a compiled graph answers something else than the graph.
    """
    from compress.providers.qnn import soc_name

    soc = soc_name(soc)
    final, beside = folder / soc, folder / f".{soc}.partial"
    if final.exists():
        raise UsageError("there is a context binary for this chip already", where=str(final), hint="remove it first")
    started = runtime or providers.load(PROVIDER).runtime()
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        answers = [_compile(graph, beside, soc, started) for graph in graphs]
        record = {
            "soc_model": soc,
            "graphs": [{"name": graph.model.name, "sha256": sha256(graph.model)} for graph in graphs],
            "versions": answers[0][1]["versions"],
            "compared": {"samples": sum(_count(graph) for graph in graphs), "outputs": "equal"},
        }
        (beside / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in beside.iterdir():
            sync(path)
        nbytes = sum(path.stat().st_size for path in beside.iterdir())
        beside.rename(final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    compile_seconds = sum(float(compiled["results"][0]["seconds"]) for compiled, _ in answers)
    load_seconds = sum(float(loaded["load_seconds"]) for _, loaded in answers)
    return Context(tuple(final / graph.compiled for graph in graphs), soc, nbytes, compile_seconds, load_seconds)


def _compile(graph: Graph, beside: Path, soc: str, runtime: Runtime) -> tuple[Json, Json]:
    """Compile one graph, compare it with itself and with the CPU; returns the answers of compiling and loading back."""
    model, output = graph.model, beside / graph.compiled
    names = ("samples.npz", "graph.npz", "context.npz", "cpu.npz")
    given, own, back, plain = (beside / name for name in names)
    np.savez(given, **graph.samples)  # type: ignore[arg-type]
    compiled = _ask("compile", runtime, model=model, soc=soc, output=output)
    _ask("run", runtime, model=model, soc=soc, samples=given, output=own)
    _ask("run", runtime, model=model, soc=soc, samples=given, output=plain, provider="cpu")
    _agree(plain, own, model)
    loaded = _ask("run", runtime, model=output, soc=soc, samples=given, output=back)
    _compare(own, back, soc)
    for path in (given, own, back, plain):
        path.unlink()
    return compiled, loaded


def _count(graph: Graph) -> int:
    return len(next(iter(graph.samples.values())))


def _ask(action: str, runtime: Runtime, **paths: object) -> Json:
    request = {"action": action, "threads": 1, **{name: str(value) for name, value in paths.items()}}
    return run_worker(_WORKER, request, timeout=TIMEOUT_SECONDS, runtime=runtime)


def _agree(plain: Path, own: Path, model: Path) -> None:
    with np.load(plain) as cpu, np.load(own) as htp:
        for name in cpu.files:
            a, b = (stored[name].ravel().astype(np.float64) for stored in (cpu, htp))
            cosine = float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30))
            if not cosine >= MIN_COSINE:
                raise ProviderError(
                    f"HTP computes something else than the CPU does: cosine {cosine:.3f} of {name}",
                    where=str(model),
                    hint="another --set graph.static_length may avoid the kernel that is wrong",
                )


def _compare(own: Path, back: Path, soc: str) -> None:
    with np.load(own) as graph, np.load(back) as context:
        if set(graph.files) != set(context.files):
            raise CompressError("the compiled graph has other outputs than the graph", where=soc)
        for name in graph.files:
            if not np.array_equal(graph[name], context[name]):
                worst = float(np.abs(graph[name].astype(np.float64) - context[name]).max())
                raise CompressError(
                    f"the compiled graph answers something else: {name} differs by {worst:.3g}",
                    where=soc,
                    hint="compile with the onnxruntime-qnn that runs it, and report the model",
                )
