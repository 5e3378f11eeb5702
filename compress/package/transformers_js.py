"""Target ``transformers-js``: the directory loads in transformers.js, in a browser or in Node, as it is.

::

    config.json                      gets "transformers.js_config": which file, in how many pieces
    tokenizer_config.json            gets the chat template, which transformers.js looks for nowhere else
    onnx/model_q4.onnx               the graph; the suffix says how its weights are stored
    onnx/model_q4.onnx_data[_1 ...]  the weights, in pieces that a browser can hold in one buffer

The weights are there once: ``model.onnx`` refers to the same files. So whatever copies, packs or uploads the directory
takes them once too, which hard links would not survive.
"""

from __future__ import annotations

import json
from pathlib import Path

from compress.contracts import Structure
from compress.errors import UsageError
from compress.package.external import (
    Extent,
    chunks,
    data_files,
    external_tensors,
    load_graph,
    place,
    relocated,
    save_graph,
    split,
)
from compress.package.portable_tokenizer import make_portable
from compress.package.staging import write_file
from compress.package.target import Needs, Package, Wish
from compress.profile import Profile
from compress.source.files import MAX_CONFIG_BYTES, read_json_object

TARGET = "transformers-js"
FOLDER = "onnx"
CONFIG_KEY = "transformers.js_config"
#: A browser's buffer has 2^31 bytes at most; decimal, so that a rounding anywhere does not matter.
MAX_PIECE_BYTES = 2_000_000_000
#: transformers.js's name of a way to store weights (``dtype``) and its suffix, by bits.
_DTYPES = {2: ("q2", "_q2"), 4: ("q4", "_q4"), 7: ("q8", "_quantized"), 8: ("q8", "_quantized"), 32: ("fp32", "")}
_HALF_DTYPES = {2: ("q2f16", "_q2f16"), 4: ("q4f16", "_q4f16"), 32: ("fp16", "_fp16")}


def applies(structure: Structure) -> bool:
    """Return whether the target can take such a model: any."""
    return True


def check(wish: Wish) -> None:
    """Refuse what transformers.js has no name or no way for.

    Raises:
        UsageError: The shapes are static, or no ``dtype`` stands for what the profile stores.
    """
    if wish.profile.graph.static_length is not None:
        raise UsageError(
            "transformers.js feeds graphs of any length, and the profile's has one (graph.static_length)",
            where=f"profile {wish.profile.name}",
            hint='leave "transformers-js" out of targets',
        )
    if wish.plan.cache_type == "int8":
        raise UsageError(
            "transformers.js begins with an empty cache of floats, and the profile's keeps bytes (graph.cache_type)",
            where=f"profile {wish.profile.name}",
            hint='leave "transformers-js" out of targets',
        )
    dtype(wish.profile)


def needs(wish: Wish) -> Needs:
    """Return what it takes beside the model: while weights are cut into pieces, one of them exists twice."""
    size = wish.plan.data_bytes
    return Needs(disk=MAX_PIECE_BYTES if size > MAX_PIECE_BYTES else 0)


def dtype(profile: Profile) -> tuple[str, str]:
    """Return transformers.js's ``dtype`` and file suffix of what a profile stores: ``("q4", "_q4")``.

    Raises:
        UsageError: There is none.
    """
    half = profile.graph.float_type == "float16"
    known = _HALF_DTYPES if half else _DTYPES
    bits = profile.quantize.bits
    if bits not in known:
        raise UsageError(
            f"transformers.js has no dtype for weights of {bits} bits between {profile.graph.float_type} activations",
            where=f"profile {profile.name}",
            hint="--set graph.float_type=float32" if half else f"quantize.bits one of {sorted(known)}",
        )
    return known[bits]


def write(package: Package) -> None:
    """Move the weights into ``onnx/``, write the graph there, and say so in the config."""
    name, suffix = dtype(package.profile)
    file = f"model{suffix}.onnx"
    pieces = _move(package.directory, file)
    make_portable(package.directory, inline_template=True)
    path = package.directory / "config.json"
    config = read_json_object(path, MAX_CONFIG_BYTES, "config.json")
    own: dict[str, object] = {"dtype": name}
    if pieces:
        own["use_external_data_format"] = {file: pieces}
    write_file(path, json.dumps({**config, CONFIG_KEY: own}, indent=2) + "\n")


def _move(directory: Path, file: str) -> int:
    """Move the data of ``model.onnx`` into ``onnx/``, and return how many pieces it has there."""
    root = directory / "model.onnx"
    model = load_graph(root)
    folder = directory / FOLDER
    folder.mkdir()
    extents = [place(tensor)[1] for tensor in external_tensors(model)]
    if not extents:
        save_graph(model, folder / file)
        return 0
    (data,) = data_files(root)
    pieces = chunks(extents, MAX_PIECE_BYTES)
    # What lies behind the last tensor is padding; it goes with the last piece.
    pieces[-1] = Extent(pieces[-1].start, max(pieces[-1].stop, data.stat().st_size))
    names = [f"{file}_data" + (f"_{index}" if index else "") for index in range(len(pieces))]
    split(data, pieces, [folder / name for name in names])
    save_graph(relocated(model, dict(zip(names, pieces, strict=True))), folder / file)
    rooted = [f"{FOLDER}/{name}" for name in names]
    save_graph(relocated(model, dict(zip(rooted, pieces, strict=True))), root)
    return len(pieces)
