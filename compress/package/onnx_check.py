"""Is a graph that somebody else may have written well formed, and does all it refers to lie in the artifact?

The graph itself is read, its external data is not: only where the bytes of each tensor shall be is compared with how
large the files are. ONNX Runtime, too, refuses a place outside the directory, but only once the model is loaded.

ONNX's parser and checker are C++ that a hostile graph may crash. :func:`check_graphs` runs them in a process of its own
(this module, as a worker), under limits of time and memory that follow from the graphs' sizes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from compress.errors import CompressError, WorkerError
from compress.limits import limit
from compress.package.tree import Tree, name_fault, scan
from compress.validation.protocol import Json, run_worker, serve

if TYPE_CHECKING:
    import onnx

GRAPH_SUFFIX = ".onnx"
#: What is read as something else than weights: bytes that are two things at once are nobody's honest data.
NOT_DATA = (".onnx", ".ort", ".json", ".jinja", ".sig")
#: More of the same kind in one graph says nothing new.
MAX_FAULTS = 20
#: What the checker may take: of processor time and of memory, for any graph and for a graph's bytes.
BASE_SECONDS, BYTES_A_SECOND = 8.0, 4e6
BASE_MEMORY, MEMORY_A_BYTE = 512 << 20, 8
# Bits an element, where they are not what the type's name ends with.
_BITS = {
    "FLOAT": 32, "DOUBLE": 64, "BOOL": 8, "COMPLEX64": 64, "COMPLEX128": 128, "BFLOAT16": 16, "FLOAT4E2M1": 4,
    "FLOAT6E2M3": 6, "FLOAT6E3M2": 6, "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8,
    "FLOAT8E8M0": 8,
}  # fmt: skip


def check_graphs(directory: Path, names: Sequence[str], tree: Tree) -> list[tuple[str, str, str]]:
    """Check graphs of an artifact, apart from this process.

    Args:
        directory: The artifact.
        names: The graphs' names in it; regular files.
        tree: What is in the artifact.

    Returns:
        A graph's name, kind and sentence for each fault, as :func:`check_graph` finds them; a graph that crashes the
        checker, or that it does not finish, is one.
    """
    if not names:
        return []
    size = sum(tree.files[name] for name in names)
    seconds = BASE_SECONDS + size / BYTES_A_SECOND
    request = {
        "directory": str(directory.resolve()),
        "names": list(names),
        "tree": vars(tree),
        "seconds": seconds,
        "memory": BASE_MEMORY + MEMORY_A_BYTE * size,
    }
    try:
        answer = run_worker("package.onnx_check", request, timeout=60 + 12 * seconds)
    except WorkerError as error:
        if len(names) == 1:
            return [(names[0], "onnx", f"the ONNX checker did not survive the graph: {error.what}")]
        return [fault for name in names for fault in check_graphs(directory, [name], tree)]
    return [(name, kind, message) for name, kind, message in answer["results"]]


def handle(request: Json, job: Path) -> Json:
    """Check the graphs of a request."""
    import onnx  # noqa: F401 - now, so that the limits do not include it

    limit(request["seconds"], request["memory"])
    directory, tree = Path(request["directory"]), Tree(**request["tree"])
    return {"results": [(name, *fault) for name in request["names"] for fault in check_graph(directory, name, tree)]}


def check_places(graph: Path) -> None:
    """Refuse a graph that refers to a place outside its own directory, or beyond the end of a file.

    For what is going to load the graph; it is read, and nothing else is checked.

    Raises:
        CompressError: With the first place that is wrong, or what keeps the graph from being read.
    """
    import onnx

    try:
        model = onnx.load(graph, load_external_data=False)
    except Exception as error:  # noqa: BLE001 - protobuf's class for this has moved before
        raise CompressError(f"the graph cannot be read: {_first_line(error)}", where=str(graph)) from error
    wrong = _outside(model, PurePosixPath(), scan(graph.parent))
    if wrong:
        raise CompressError(wrong[0], where=str(graph), hint="compress verify ARTIFACT tells all that is wrong")


def check_graph(directory: Path, name: str, tree: Tree) -> list[tuple[str, str]]:
    """Check a graph of an artifact.

    Args:
        directory: The artifact.
        name: The graph's name in it; a regular file.
        tree: What is in the artifact.

    Returns:
        Kinds (``onnx``, ``external-data``) and sentences, none where all is well.
    """
    import onnx
    from google.protobuf.message import DecodeError

    path = directory / name
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError, MemoryError) as error:
        return [("onnx", f"the graph cannot be read: {_first_line(error)}")]
    outside = _outside(model, PurePosixPath(name).parent, tree)
    if outside:
        # The checker would open the files that are named; those that are wrong it need not touch.
        return [("external-data", fault) for fault in outside[:MAX_FAULTS]]
    del model
    try:
        # By path: a checked model may have more than the 2 GB that a message in memory can.
        onnx.checker.check_model(str(path), full_check=False)
    except (onnx.checker.ValidationError, RuntimeError, ValueError, MemoryError) as error:
        return [("onnx", f"the ONNX checker refuses the graph: {_first_line(error)}")]
    return []


def _outside(model: onnx.ModelProto, folder: PurePosixPath, tree: Tree) -> list[str]:
    """Return what is wrong with the places that a graph refers to."""
    import onnx

    faults = []
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            fault = _tensor_fault(tensor, folder, tree)
            if fault is not None:
                faults.append(f"tensor {tensor.name!r}: {fault}")
    for node in _nodes(model):
        if node.op_type == "EPContext":
            fault = _context_fault(node, folder, tree)
            if fault is not None:
                faults.append(f"node {node.name!r}: {fault}")
    return faults


def _tensor_fault(tensor: onnx.TensorProto, folder: PurePosixPath, tree: Tree) -> str | None:
    fields: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key in fields:
            return f"its {entry.key} is given twice"
        fields[entry.key] = entry.value
    fault = _place_fault(fields.get("location", ""), folder, tree)
    if fault is not None:
        return fault
    name = (folder / fields["location"]).as_posix()
    if name.endswith(NOT_DATA):
        return f"{fields['location']!r} is no file of weights"
    wanted = _nbytes(tensor)
    numbers = {key: fields[key] for key in ("offset", "length") if key in fields}
    if not all(len(value) < 20 and value.isascii() and value.isdigit() for value in numbers.values()):
        return "its offset or length is no number of bytes"
    offset = int(numbers.get("offset", "0"))
    length = int(numbers["length"]) if "length" in numbers else wanted
    if length is None:
        return "its length is not known"
    if wanted is not None and length != wanted:
        return f"it has {length} bytes, its shape and type need {wanted}"
    size = tree.files[name]
    if offset + length > size:
        return f"bytes {offset} to {offset + length} are beyond the end of {name!r}, which has {size}"
    return None


def _context_fault(node: onnx.NodeProto, folder: PurePosixPath, tree: Tree) -> str | None:
    """Return what is wrong with the binary that a compiled graph names, ``None`` where it holds it itself."""
    values = {attribute.name: attribute for attribute in node.attribute}
    embedded = values["embed_mode"].i if "embed_mode" in values else 1
    if embedded or "ep_cache_context" not in values:
        return None
    return _place_fault(values["ep_cache_context"].s.decode("utf-8", "backslashreplace"), folder, tree)


def _place_fault(location: str | bytes, folder: PurePosixPath, tree: Tree) -> str | None:
    if isinstance(location, bytes):  # what protobuf makes of a string that is not UTF-8
        return "its place is not text"
    fault = name_fault(location)
    if fault is not None:
        return f"its place {location!r} is refused: {fault}"
    name = (folder / location).as_posix()
    if any(link == name or name.startswith(f"{link}/") for link in tree.links):
        return f"its place {location!r} is a symbolic link"
    if name not in tree.files:
        return f"its place {location!r} is missing"
    return None


def _nbytes(tensor: onnx.TensorProto) -> int | None:
    """Return how many bytes a tensor of this shape and type has, ``None`` where the type does not say."""
    import onnx

    try:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    except ValueError:
        return None
    digits = kind.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    bits: int | None = _BITS.get(kind) or (int(digits) if digits.isdigit() else None)
    if bits is None or any(size < 0 for size in tensor.dims):
        return None
    return (math.prod(map(int, tensor.dims)) * bits + 7) // 8


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield every node, those of subgraphs and functions too."""
    for graph in _graphs(model):
        yield from graph.node
    for function in model.functions:
        yield from function.node


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor: initializers, sparse ones' two halves, and attributes' values."""
    for graph in _graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in _nodes(model):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """Yield every graph, whatever node it lies in. No recursion: how deep they lie is the file's choice."""
    waiting = [model.graph, *(graph for item in model.training_info for graph in (item.initialization, item.algorithm))]
    inside = [node for function in model.functions for node in function.node]
    while waiting or inside:
        if waiting:
            graph = waiting.pop()
            yield graph
            inside.extend(graph.node)
        for attribute in inside.pop().attribute if inside else ():
            if attribute.HasField("g"):
                waiting.append(attribute.g)
            waiting.extend(attribute.graphs)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    sys.exit(serve(handle))
