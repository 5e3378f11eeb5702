"""Target ``ort``: the model in ONNX Runtime's own format, and what a runtime built for it alone must have.

::

    model.ort                             graph and weights in one file; an ONNX Runtime without ONNX's parser loads it
    required_operators_and_types.config   for a reduced build: ``build.sh --include_ops_by_config FILE``

The format holds weights inside, so they are there a second time; constants are computed ahead (scales that
``model.onnx`` keeps in fewer bytes are float32 here). onnxruntime's own tool converts, in a process of its own; what
comes out is run there beside ``model.onnx`` before it is taken. The format holds 2 GB at most.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from compress.contracts import Structure
from compress.errors import CompressError, UsageError
from compress.package.staging import write_file
from compress.package.target import Needs, Package, Wish
from compress.sizes import format_size
from compress.validation.protocol import run_worker

TARGET = "ort"
NAME, OPERATORS_NAME = "model.ort", "required_operators_and_types.config"
#: Offsets in a flatbuffer are 32 bits, signed.
MAX_BYTES = (1 << 31) - 1
TIMEOUT_SECONDS = 1800.0
#: Of the largest output: constants that were computed ahead are rounded like those computed at run time.
TOLERANCE = 1e-5
#: Bytes that scales of 8 bits a block become when they are computed ahead, of what a block of 32 4-bit weights takes.
_GROWTH = 1.5
#: The session holds the weights as read, packed for its kernels, and in the file it writes.
_COPIES = 5
_WORKER_BYTES = 200_000_000
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
    if wish.plan.predicted_bytes > MAX_BYTES:
        raise UsageError(
            f"a .ort file holds 2 GB at most, and this model takes {format_size(wish.plan.predicted_bytes)}",
            where=where,
            hint='leave "ort" out of targets: ONNX Runtime on Android and iOS loads model.onnx with its data too',
        )


def needs(wish: Wish) -> Needs:
    """Return what it takes beside the model: the second copy of the weights, and memory to write it from."""
    size = wish.plan.data_bytes
    return Needs(disk=int(_GROWTH * size), memory=_WORKER_BYTES + _COPIES * size)


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
