"""Target ``ort``: the model in ONNX Runtime's own format, and what a runtime built for it alone must have.

::

    model.ort                             graph and weights in one file; an ONNX Runtime without ONNX's parser loads it
    required_operators_and_types.config   for a reduced build: ``build.sh --include_ops_by_config FILE``

The format holds weights inside, so they are there a second time; constants are computed ahead (scales that
``model.onnx`` keeps in fewer bytes are float32 here). onnxruntime's own tool converts, in a process of its own; what
comes out is run there beside ``model.onnx`` before it is taken. The format holds 2 GB at most.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

from compress.contracts import Structure
from compress.errors import CompressError, UsageError
from compress.package.staging import write_file
from compress.package.target import Needs, Package, Wish
from compress.planning import Plan
from compress.sizes import format_size
from compress.validation.protocol import run_worker

TARGET = "ort"
NAME, OPERATORS_NAME = "model.ort", "required_operators_and_types.config"
#: Offsets in a flatbuffer are 32 bits, signed.
MAX_BYTES = (1 << 31) - 1
TIMEOUT_SECONDS = 1800.0
#: Of the largest output: constants that were computed ahead are rounded like those computed at run time.
TOLERANCE = 1e-5
_FLOAT_BYTES = 4
#: Peak of the worker, fitted to two measurements on Linux x86-64, SmolLM2 (105 MB of .ort, 577 MB) and TinyLlama's
#: geometry (699 MB, 2,318 MB): the weights as read, packed for kernels, and in the file that is written.
_COPIES = 3
_WORKER_BYTES = 270_000_000
_WORKER = "package.ort_worker"


def applies(structure: Structure) -> bool:
    """Return whether the target can take such a model: any."""
    return True


def check(wish: Wish) -> None:
    """Refuse what the format cannot hold.

    Raises:
        UsageError: The model is larger than 2 GB, or its graph is two (static shapes of a decoder).
    """
    where = f"profile {wish.profile.name}"
    if wish.profile.graph.static_length is not None:
        raise UsageError(
            "a .ort file is for runtimes that take any length, and the profile's graph has one (graph.static_length)",
            where=where,
            hint='leave "ort" out of targets',
        )
    size = predicted_bytes(wish.plan)
    if size > MAX_BYTES:
        raise UsageError(
            f"a .ort file holds 2 GB at most, and this model would take {format_size(size)} there",
            where=where,
            hint='leave "ort" out of targets: ONNX Runtime on Android and iOS loads model.onnx with its data too',
        )


def needs(wish: Wish) -> Needs:
    """Return what it takes beside the model: the second copy of the weights, and memory to write it from."""
    size = predicted_bytes(wish.plan)
    return Needs(disk=size, memory=_WORKER_BYTES + _COPIES * size)


def predicted_bytes(plan: Plan) -> int:
    """Return how large the file will be: as the graph and its weights, but for what is computed ahead.

    Scales become float32. A tied table's codes are there twice, in the shapes that the table and the head read.
    """
    size = plan.predicted_bytes
    for fate in plan.fates:
        scales, codes = fate.part("scales"), fate.part("codes")
        if scales is not None and scales.dtype != "float32":
            size += _FLOAT_BYTES * math.prod(scales.shape) - scales.nbytes
        if fate.tied and codes is not None:
            size += codes.nbytes
    return size


def write(package: Package) -> None:
    """Convert ``model.onnx``.

    Raises:
        CompressError: The tool fails, or the result answers something else than ``model.onnx``.
    """
    with tempfile.TemporaryDirectory(prefix=".ort-", dir=package.directory) as place:
        made = run_worker(
            _WORKER,
            {"model": str(package.directory / "model.onnx"), "folder": place, "threads": 1},
            timeout=TIMEOUT_SECONDS,
        )["results"][0]
        if not made["worst"] <= TOLERANCE * made["largest"]:
            raise CompressError(
                f"model.ort answers something else than model.onnx: {made['output']} differs by {made['worst']:.3g}",
                where=str(package.directory),
                hint='leave "ort" out of targets, and report the model',
            )
        shutil.move(Path(place) / NAME, package.directory / NAME)
        operators = (Path(place) / OPERATORS_NAME).read_text(encoding="utf-8")
    # The tool names the file it read, by its whole path.
    lines = [line for line in operators.splitlines() if not line.startswith("#")]
    write_file(package.directory / OPERATORS_NAME, "\n".join([f"# What {NAME} needs.", *lines]) + "\n")
