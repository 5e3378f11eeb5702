"""Rows of a safetensors file: types, bounded memory, and files that lie."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from compress.errors import SourceError
from compress.source import files
from compress.source.safetensors_file import SafetensorsFile


def write(path: Path, header: dict[str, object], data: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_bfloat16_is_exact_for_every_bit_pattern(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    path = write(tmp_path / "x.safetensors", {"w": entry("BF16", [256, 256], 0, 1 << 17)}, bits.tobytes())
    got = SafetensorsFile(path).read("w").reshape(-1).view(np.uint32)
    np.testing.assert_array_equal(got, bits.astype(np.uint32) << 16)


def test_float16_is_exact_for_every_bit_pattern(tmp_path: Path) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    save_file({"w": values}, tmp_path / "x.safetensors")
    # Widening a signalling NaN makes it quiet; as a value it is the same.
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(SafetensorsFile(tmp_path / "x.safetensors").read("w"), values.astype(np.float32))


@pytest.mark.parametrize("columns", [1, 3, 4099])
def test_chunks_join(tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.source.safetensors_file.CHUNK_ELEMENTS", 1000)
    values = np.random.default_rng(1).standard_normal((97, columns)).astype(np.float16)
    save_file({"w": values}, tmp_path / "x.safetensors")
    got = SafetensorsFile(tmp_path / "x.safetensors").read("w", 11, 91)
    np.testing.assert_array_equal(got, values[11:91].astype(np.float32))


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    save_file({"s": np.array(2.5, np.float32), "e": np.zeros((0, 4), np.float32)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.read("s").shape == () and file.read("s") == 2.5
    assert file.read("e").shape == (0, 4)
    with pytest.raises(SourceError, match="do not exist"):
        file.read("s", 1)


def test_temporaries_are_bounded(tmp_path: Path) -> None:
    save_file({"w": np.ones((4096, 2048), np.float16)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    tracemalloc.start()
    try:
        rows = file.read("w", 0, 1024)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows.nbytes <= peak < rows.nbytes + (2 << 20)


def test_without_positioned_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    monkeypatch.setattr(files, "DIGEST_CHUNK", 100)
    values = np.random.default_rng(1).standard_normal((40, 30)).astype(np.float32)
    save_file({"w": values}, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(SafetensorsFile(tmp_path / "x.safetensors").read("w", 3, 30), values[3:30])


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": np.ones((100, 10), np.float32)}, path)
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 100)
    assert file.read("w", 0, 50).sum() == 500
    with pytest.raises(SourceError, match=r"100 bytes short of tensor 'w'") as caught:
        file.read("w")
    assert caught.value.where == "x.safetensors"


GOOD = {"w": entry("F32", [2, 2], 0, 16)}
HOSTILE = {
    "empty": b"",
    "seven bytes": b"1234567",
    "length past the end": struct.pack("<Q", 1 << 40) + b"{}",
    "pickle": b"\x80\x04\x95" + b"x" * 100,
    "not JSON": struct.pack("<Q", 4) + b"{{{{",
}
HEADERS = {
    "truncated data": (GOOD, 15),
    "data behind the last tensor": (GOOD, 24),
    "shape disagrees with offsets": ({"w": entry("F32", [2, 3], 0, 16)}, 16),
    "offsets overlap": ({"w": entry("F32", [2], 0, 8), "v": entry("F32", [2], 4, 12)}, 12),
    "hole": ({"w": entry("F32", [2], 0, 8), "v": entry("F32", [2], 12, 20)}, 20),
    "negative offset": ({"w": entry("F32", [2], -8, 0)}, 0),
    "overflowing shape": ({"w": entry("F32", [1 << 62, 1 << 62], 0, 16)}, 16),
    "unknown type": ({"w": entry("Q99", [4], 0, 16)}, 16),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 16]}}, 16),
    "list": ([1, 2], 0),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_not_safetensors(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(SourceError, match="safetensors") as caught:
        SafetensorsFile(path)
    assert caught.value.where == "x.safetensors" and caught.value.hint


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(tmp_path: Path, name: str) -> None:
    header, size = HEADERS[name]
    path = write(tmp_path / "x.safetensors", header, bytes(size))  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="safetensors"):
        SafetensorsFile(path)


def test_the_same_bytes_without_the_lie_open(tmp_path: Path) -> None:
    assert SafetensorsFile(write(tmp_path / "x.safetensors", GOOD, bytes(16))).read("w").shape == (2, 2)


def test_a_tensor_named_twice(tmp_path: Path) -> None:
    one = json.dumps(GOOD)[1:-1]
    text = ("{" + one + "," + one + "}").encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(SourceError):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_an_integer_tensor_is_not_read_as_floats(tmp_path: Path) -> None:
    save_file({"position_ids": np.arange(4)}, tmp_path / "x.safetensors")
    with pytest.raises(SourceError, match="I64, which is not a float type"):
        SafetensorsFile(tmp_path / "x.safetensors").read("position_ids")


def test_descriptors_are_closed_when_the_object_goes(tmp_path: Path) -> None:
    save_file({"w": np.ones(4, np.float32)}, tmp_path / "x.safetensors")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        SafetensorsFile(tmp_path / "x.safetensors").read("w")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
