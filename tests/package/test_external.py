"""Moving and cutting a graph's external data: no tensor is cut, no byte is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError
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


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 60)), min_size=1, max_size=20), st.integers(60, 300))
def test_pieces_hold_whole_tensors(spans: list[tuple[int, int]], most: int) -> None:
    first = min(start for start, _ in spans)
    extents = [Extent(start - first, start - first + length) for start, length in spans]
    try:
        pieces = chunks(extents, most)
    except CompressError:
        assert runs_longer_than(extents, most), "only tensors that share bytes may be too large together"
        return
    assert not runs_longer_than(extents, most)
    assert pieces[0].start == 0
    assert all(piece.stop - piece.start <= most for piece in pieces)
    assert all(first.stop <= second.start for first, second in zip(pieces, pieces[1:], strict=False))
    for extent in extents:
        assert sum(piece.start <= extent.start and extent.stop <= piece.stop for piece in pieces) == 1


def runs_longer_than(extents: list[Extent], most: int) -> bool:
    start = stop = 0
    for extent in sorted(extents, key=lambda item: item.start):
        if extent.start >= stop:
            start = extent.start
        stop = max(stop, extent.stop)
        if stop - start > most:
            return True
    return False


def graph_of(directory: Path, sizes: list[int], padding: int = 16) -> dict[str, bytes]:
    """Write ``model.onnx`` with a tensor a size in ``model.onnx.data``; returns the tensors' bytes."""
    generator, offset, kept, tensors, data = np.random.default_rng(3), 0, {}, [], b""
    for index, size in enumerate(sizes):
        kept[f"w{index}"] = generator.bytes(size)
        tensor = onnx.TensorProto(name=f"w{index}", data_type=onnx.TensorProto.UINT8, dims=[size])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": "model.onnx.data", "offset": offset, "length": size}.items():
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
        data += kept[f"w{index}"] + bytes(padding)
        offset = len(data)
    (directory / "model.onnx.data").write_bytes(data)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], initializer=tensors))
    save_graph(model, directory / "model.onnx")
    return kept


def read(graph: Path) -> dict[str, bytes]:
    found = {}
    for tensor in external_tensors(load_graph(graph)):
        name, extent = place(tensor)
        found[tensor.name] = (graph.parent / name).read_bytes()[extent.start : extent.stop]
    return found


@pytest.mark.parametrize("most", [70, 120, 1000])
def test_a_cut_file_has_every_byte(most: int, tmp_path: Path) -> None:
    kept = graph_of(tmp_path, [40, 60, 10, 33, 70])
    model = load_graph(tmp_path / "model.onnx")
    pieces = chunks([place(tensor)[1] for tensor in external_tensors(model)], most)
    assert len(pieces) == {70: 4, 120: 3, 1000: 1}[most]
    names = [f"part{index}" for index in range(len(pieces))]
    split(tmp_path / "model.onnx.data", pieces, [tmp_path / name for name in names])
    save_graph(relocated(model, dict(zip(names, pieces, strict=True))), tmp_path / "model.onnx")
    assert read(tmp_path / "model.onnx") == kept
    assert [path.name for path in data_files(tmp_path / "model.onnx")] == names
    assert not (tmp_path / "model.onnx.data").exists()


def test_a_tensor_larger_than_a_piece_is_refused() -> None:
    with pytest.raises(CompressError, match="101 bytes does not fit a piece of 100"):
        chunks([Extent(0, 10), Extent(10, 111)], 100)


@pytest.mark.parametrize("location", ["../weights", "/etc/passwd", "a/../../b", "..\\b", ""])
def test_data_outside_the_directory_is_refused(location: str, tmp_path: Path) -> None:
    graph_of(tmp_path, [8])
    model = load_graph(tmp_path / "model.onnx")
    model.graph.initializer[0].external_data[0].value = location
    save_graph(model, tmp_path / "model.onnx")
    with pytest.raises(CompressError, match="not in its directory"):
        data_files(tmp_path / "model.onnx")


@pytest.mark.parametrize(("key", "value"), [("offset", "-1"), ("length", "x"), ("length", "-5")])
def test_numbers_that_are_none_are_refused(key: str, value: str, tmp_path: Path) -> None:
    graph_of(tmp_path, [8])
    model = load_graph(tmp_path / "model.onnx")
    for entry in model.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    save_graph(model, tmp_path / "model.onnx")
    with pytest.raises(CompressError, match="has no place"):
        data_files(tmp_path / "model.onnx")


def test_a_damaged_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff not a graph")
    with pytest.raises(CompressError, match="cannot be read"):
        load_graph(tmp_path / "model.onnx")
