"""Losses by position on disk: what is written is read, and a hostile file is told before it costs memory."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from compress.errors import CompressError
from compress.report.model import Positions
from compress.validation import drift, losses
from compress.validation.losses import NAME, Losses, read

SHAPE = (3, 5)


def made() -> Losses:
    random = np.random.default_rng(0)
    nll, kl = random.random((2, *SHAPE), np.float32)
    return Losses(nll, kl, "0" * 64)


def test_a_round_trip(tmp_path: Path) -> None:
    wanted = made()
    record = wanted.write(tmp_path)
    assert record is not None and record.file == NAME
    found = read(tmp_path / NAME, record, windows=3, tokens=15)
    assert np.array_equal(found.nll, wanted.nll) and np.array_equal(found.kl, wanted.kl)
    assert found.windows_sha256 == wanted.windows_sha256
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_measuring_drift_keeps_them() -> None:
    random = np.random.default_rng(1)
    windows = random.integers(0, 7, (2, 6))
    reference, artifact = random.standard_normal((2, 12, 7)).astype(np.float32)
    measured = drift.measure(reference, artifact, windows)
    assert measured.losses.kl.shape == measured.losses.nll.shape == (2, 5)
    assert measured.losses.kl.mean(dtype=np.float64) == pytest.approx(measured.kl_mean, rel=1e-6)
    perplexity = float(np.exp(measured.losses.nll.mean(dtype=np.float64)))
    assert perplexity == pytest.approx(measured.artifact_perplexity, rel=1e-6)
    assert measured.losses.windows_sha256 == losses.digest(windows)


def test_too_many_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = made().write(tmp_path)
    assert record is not None
    monkeypatch.setattr(losses, "MAX_POSITIONS", 14)
    with pytest.raises(CompressError, match="15 positions in 3 windows"):
        read(tmp_path / NAME, record, windows=3, tokens=15)
    assert made().write(tmp_path) is None and not (tmp_path / NAME).exists(), "an older run's would mislead"


def archive(nll: bytes | None, kl: bytes | None, *, method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as target:
        for name, content in (("nll.npy", nll), ("kl.npy", kl)):
            if content is not None:
                target.writestr(name, content)
    return stream.getvalue()


def npy(array: npt.NDArray[np.generic], *, pickled: bool = False) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=pickled)
    return stream.getvalue()


def header(text: str) -> bytes:
    """Return a header without data."""
    padded = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded


GOOD = npy(np.zeros(SHAPE, "<f4"))
PADDED = GOOD[:-60] + b"\0" * 60
HOSTILE: dict[str, Callable[[], bytes]] = {
    "no archive": lambda: b"PK\x03\x04 nonsense",
    "empty": lambda: b"",
    "a missing array": lambda: archive(GOOD, None),
    "another shape": lambda: archive(npy(np.zeros((5, 3), "<f4")), GOOD),
    "another type": lambda: archive(npy(np.zeros(SHAPE, "<i4")), GOOD),
    "big end first": lambda: archive(npy(np.zeros(SHAPE, ">f4")), GOOD),
    "pickled objects": lambda: archive(npy(np.array([["x" * 9] * 5] * 3, object), pickled=True), GOOD),
    "not finite": lambda: archive(npy(np.full(SHAPE, np.nan, "<f4")), GOOD),
    "a bomb": lambda: archive(npy(np.zeros((1 << 20,), "<f4")), GOOD, method=zipfile.ZIP_DEFLATED),
    "compressed": lambda: archive(GOOD, GOOD, method=zipfile.ZIP_DEFLATED),
    "a header of terabytes": lambda: archive(
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000)}") + b"\0" * 60, GOOD
    ),
    "a header that is code": lambda: archive(header("__import__('os').abort()") + b"\0" * 60, GOOD),
    "cut short": lambda: archive(GOOD[:-4], GOOD),
    "too large": lambda: archive(GOOD, GOOD) + b"\0" * 20_000,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case: str, tmp_path: Path) -> None:
    content = HOSTILE[case]()
    (tmp_path / NAME).write_bytes(content)
    record = Positions(sha256=hashlib.sha256(content).hexdigest(), windows_sha256="0" * 64)
    with pytest.raises(CompressError, match="the losses by position are damaged") as told:
        read(tmp_path / NAME, record, windows=3, tokens=15)
    assert told.value.where == str(tmp_path / NAME)


def test_the_control_is_read(tmp_path: Path) -> None:
    content = archive(GOOD, GOOD)
    (tmp_path / NAME).write_bytes(content)
    good = Positions(sha256=hashlib.sha256(content).hexdigest(), windows_sha256="0" * 64)
    assert read(tmp_path / NAME, good, windows=3, tokens=15).kl.shape == SHAPE
    with pytest.raises(CompressError, match="not the one that the report tells of"):
        read(tmp_path / NAME, good.model_copy(update={"sha256": "1" * 64}), windows=3, tokens=15)
    for windows, tokens in ((4, 15), (0, 15), (3, 0), (3, -15)):
        with pytest.raises(CompressError, match="the report tells of"):
            read(tmp_path / NAME, good, windows=windows, tokens=tokens)
