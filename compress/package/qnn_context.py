"""Target ``qnn-context``: the graph compiled for one Qualcomm chip, so that a phone need not do it when it starts.

Compiling needs no device: QNN's library does it on x86-64 Linux for any chip it knows. In the artifact::

    qnn/SM8750/model_ctx.onnx        one EPContext node with the graph's inputs and outputs
    qnn/SM8750/model_ctx_qnn.bin     what it refers to, by a relative name
    qnn/SM8750/context.json          the chip, the versions, what was compiled

They appear when all is done: compiled beside, loaded back in a process of its own, its outputs compared with those of
the graph it was made from, then renamed. The chip's name is in the graph's metadata too: the simulator runs a binary of
any chip, a device only its own, so :class:`compress.providers.qnn.QnnProvider` refuses a binary for another chip.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from compress import providers
from compress.contracts import Checkpoint, Encoder, Runtime, Structure
from compress.errors import CompressError, ProviderError, UsageError
from compress.package.manifest import digest
from compress.package.staging import sync
from compress.validate.protocol import Json, run_worker

TARGET = "qnn-context"
PROVIDER = "qnn"
FOLDER, NAME, RECORD = "qnn", "model_ctx.onnx", "context.json"
TIMEOUT_SECONDS = 1800.0
#: HTP and the CPU round the same graph differently in the last bits: 0.9999 and more. A wrong kernel is far below (QNN
#: 2.51 multiplies exactly 16 rows behind a LayerNormalization by 8-bit weights wrongly: 0.3).
MIN_COSINE = 0.99
_WORKER = "package.qnn_context_worker"


@dataclass(frozen=True)
class Context:
    """A compiled graph.

    Attributes:
        model: The EPContext graph.
        soc: The chip's name.
        nbytes: Bytes of all its files.
        compile_seconds: What compiling took.
        load_seconds: What loading it back took.
    """

    model: Path
    soc: str
    nbytes: int
    compile_seconds: float
    load_seconds: float


def applies(structure: Structure) -> bool:
    """Return whether the target can take such a model: an encoder, whose graph is one file."""
    return isinstance(structure, Encoder)


def check(checkpoint: Checkpoint) -> None:
    """Find out before work starts whether QNN is here.

    Raises:
        ProviderError: It is not; how to install it.
    """
    providers.load(PROVIDER).runtime()


def write(
    directory: Path,
    encoder: Structure,
    checkpoint: Checkpoint,
    *,
    inputs: tuple[str, ...],
    options: Mapping[str, str] | None = None,
) -> None:
    """Compile ``model.onnx`` for the chip that the profile's ``provider_options.soc_model`` names.

    Raises:
        UsageError: The graph has free dimensions, or no such chip is known.
        CompressError: HTP does not take the graph, or the compiled one answers something else.
    """
    from compress.providers.qnn import DEFAULT_SOC

    model = directory / "model.onnx"
    samples = encoder_samples(input_shapes(model), encoder.vocab_size)
    compile_context(model, directory / FOLDER, (options or {}).get("soc_model", DEFAULT_SOC), samples)


def input_shapes(model: Path) -> dict[str, tuple[int, ...]]:
    """Return the inputs of a graph with their shapes.

    Raises:
        UsageError: A dimension is free.
    """
    import onnx_ir as ir

    found: dict[str, tuple[int, ...]] = {}
    for value in ir.load(model).graph.inputs:
        if value.shape is None or not value.shape.is_static():
            raise UsageError(
                f"input {value.name} has a free dimension: an NPU's graph has none",
                where=str(model),
                hint="--set graph.static_length=128",
            )
        found[str(value.name)] = value.shape.numpy()
    return found


def encoder_samples(shapes: Mapping[str, tuple[int, ...]], vocab_size: int) -> dict[str, npt.NDArray[np.int64]]:
    """Return two seeded texts as inputs: a row each, one without padding and one that is half padding."""
    generator = np.random.default_rng(0)
    found = {name: np.zeros((2, *shape), np.int64) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if name == "input_ids":
            found[name][:] = generator.integers(0, vocab_size, (2, *shape))
        elif name == "attention_mask":
            found[name][0] = 1
            found[name][1, :, : -(-shape[-1] // 2)] = 1
    return found


def compile_context(
    model: Path,
    folder: Path,
    soc: str,
    samples: Mapping[str, npt.NDArray[Any]],
    *,
    runtime: Runtime | None = None,
) -> Context:
    """Compile a graph of static shapes for a chip and put the result into ``folder`` under the chip's name.

    Args:
        model: The graph.
        folder: Made if it is missing; the chip's own folder must not be there yet.
        soc: A chip of ``compress.providers.qnn.SOC_MODELS``, by name.
        samples: Inputs to compare outputs on: a sample a row, by input name.
        runtime: The Python that has QNN; by default the provider's.

    Raises:
        UsageError: No such chip is known, or its folder is there.
        ProviderError: QNN is not here, or HTP computes something else than the CPU does.
        CompressError: A node cannot run on HTP, or the compiled graph answers something else than the graph.
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
        names = ("samples.npz", "graph.npz", "context.npz", "cpu.npz")
        given, own, back, plain = (beside / name for name in names)
        np.savez(given, **dict(samples))  # type: ignore[arg-type]
        compiled = _ask("compile", started, model=model, soc=soc, output=beside / NAME)
        _ask("run", started, model=model, soc=soc, samples=given, output=own)
        _ask("run", started, model=model, soc=soc, samples=given, output=plain, provider="cpu")
        _agree(plain, own, model)
        loaded = _ask("run", started, model=beside / NAME, soc=soc, samples=given, output=back)
        _compare(own, back, soc)
        for path in (given, own, back, plain):
            path.unlink()
        record = {
            "soc_model": soc,
            "graph": {"name": model.name, "sha256": digest(model)},
            "versions": loaded["versions"],
            "compared": {"samples": len(next(iter(samples.values()))), "outputs": "equal"},
        }
        (beside / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for path in beside.iterdir():
            sync(path)
        nbytes = sum(path.stat().st_size for path in beside.iterdir())
        beside.rename(final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    seconds = float(compiled["results"][0]["seconds"])
    return Context(final / NAME, soc, nbytes, seconds, float(loaded["load_seconds"]))


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
