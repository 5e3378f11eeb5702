"""Artifacts behind URLs: the manifest last, everything read back, and nothing that verifies after a failure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fleet_desk import Desk

import compress
from compress.errors import CompressError, UsageError
from compress.fleet import outcome
from compress.fleet.store import Store, is_url
from compress.package.verify import verify


@pytest.fixture(autouse=True)
def memory() -> Iterator[Any]:
    """Yield the process's own file system, emptied."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory://bucket/fleet" if request.param == "memory" else f"file://{tmp_path}/far"


def fetched(url: str, name: str, to: Path) -> Path:
    """Copy an artifact back."""
    system, root = fsspec.url_to_fs(f"{url}/{name}")
    for path in system.find(root):
        target = to / name / Path(path).relative_to(root if root.startswith("/") else f"/{root}")
        target.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(path, str(target))
    return to / name


def test_an_artifact_arrives_whole(tiny_artifact: Callable[..., Path], url: str, tmp_path: Path) -> None:
    artifact, store = tiny_artifact("llama"), Store(url)
    store.upload(artifact, "llama-arm")
    assert verify(fetched(url, "llama-arm", tmp_path / "back")).ok
    found = outcome.read(artifact)
    assert store.holds("llama-arm") and store.still_there("llama-arm", found)
    assert not store.holds("llama") and not store.still_there("llama", found)
    system, root = fsspec.url_to_fs(url)
    system.pipe_file(f"{root}/llama-arm/model.onnx", b"short")
    assert not store.still_there("llama-arm", found)
    store.upload(artifact, "llama-arm")  # over what is there
    assert store.still_there("llama-arm", found)
    store.remove("llama-arm")
    assert not store.holds("llama-arm") and not system.exists(f"{root}/llama-arm/model.onnx")
    store.remove("llama-arm")  # nothing there is nothing wrong


@pytest.mark.parametrize("broken", ["raises", "cuts", "flips", "flips the manifest"])
@pytest.mark.parametrize("before", [False, True])
def test_a_failed_upload_leaves_nothing_that_verifies(
    broken: str, before: bool, tiny_artifact: Callable[..., Path], url: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    artifact, store = tiny_artifact("llama"), Store(url)
    if before:
        store.upload(artifact, "a")
    system: Any = store._system
    put, calls = type(system).put_file, [0]
    faulty = "manifest.json" if "manifest" in broken else "model.onnx.data"

    def put_file(self: Any, source: str, target: str, **how: Any) -> None:
        calls[0] += 1
        put(self, source, target, **how)
        if not target.endswith(faulty):
            return
        if broken == "raises":
            raise ConnectionResetError("the other side has gone")
        content = bytearray(self.cat_file(target))
        content[-1] ^= 1
        self.pipe_file(target, bytes(content[:-9] if broken == "cuts" else content))

    monkeypatch.setattr(type(system), "put_file", put_file)
    with pytest.raises(CompressError, match="gone" if broken == "raises" else f"{faulty} arrived with other bytes"):
        store.upload(artifact, "a")
    assert not store.holds("a")
    assert not verify(fetched(url, "a", tmp_path / "back")).ok
    monkeypatch.undo()
    store.upload(artifact, "a")  # the control: only the fault was in the way
    assert calls[0] and verify(fetched(url, "a", tmp_path / "again")).ok


@pytest.mark.parametrize(
    ("url", "what", "hint"),
    [
        ("s3://bucket/fleet", "s3:// needs a package", "pip install s3fs"),
        ("gs://bucket/fleet", "gs:// needs a package", "pip install gcsfs"),
        ("nosuch://bucket", "no file system is called 'nosuch'", "s3://"),
        ("simplecache::memory://a", "chained URLs", "inner URL"),
        ("ftp://me:secret@host/a", "the URL has a password", "environment variables"),
    ],
)
def test_places_that_cannot_be_written(url: str, what: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        Store(url)
    assert what in caught.value.what and hint in (caught.value.hint or "") and "secret" not in str(caught.value)


def test_what_is_a_url() -> None:
    assert is_url("s3://a/b") and is_url("memory://a") and is_url("abfs+x://a")
    assert not is_url("a/b") and not is_url("/a:/b") and not is_url("c:\\a") and not is_url("package:a/b")


def test_a_sweep_to_a_url_continues_from_there(desk: Desk, memory: Any) -> None:
    desk.model("a", x86_int8={"fail": 1})
    grid = desk.write("a", more='output = "memory://bucket/fleet"\nretries = 0')
    found = compress.sweep(grid)
    assert [job.status for job in found.jobs] == ["built", "failed"]
    assert sorted(path.removeprefix("/bucket/fleet/") for path in memory.find("/bucket/fleet")) == [
        "README.md", "a-arm-int4/manifest.json", "a-arm-int4/model.bin", "sweep.html", "sweep.json",
    ]  # fmt: skip
    (kept,) = (desk.place / "cache" / "sweeps").iterdir()
    assert not (kept / "artifacts" / "a-arm-int4").exists() and (kept / "logs" / "a-arm-int4.log").exists()
    (kept / "sweep.json").unlink()  # as on another machine
    again = compress.sweep(grid)
    assert desk.starts() == ["a-arm-int4", "a-x86-int8", "a-x86-int8"] and again.exit_code == 0
    assert json.loads(memory.cat_file("/bucket/fleet/sweep.json"))["complete"] is True
    memory.rm_file("/bucket/fleet/a-arm-int4/model.bin")
    assert compress.sweep(grid).exit_code == 0 and desk.starts()[3:] == ["a-arm-int4"]


def test_an_upload_that_fails_is_a_failed_job_whose_artifact_is_kept(
    desk: Desk, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.model("a")
    grid = desk.write("a", profiles=("arm-int4",), more='output = "memory://bucket"')
    whole = type(memory).put_file

    def refuse(self: Any, source: str, target: str, **how: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(type(memory), "put_file", refuse)
    found = compress.sweep(grid)
    assert found.exit_code == 1 and "the upload failed: PermissionError: not yours" in (found.jobs[0].error or "")
    assert not memory.exists("/bucket/a-arm-int4/manifest.json")
    monkeypatch.setattr(type(memory), "put_file", whole)
    assert compress.sweep(grid).exit_code == 0 and desk.starts() == ["a-arm-int4"]  # sent, not made again


def test_a_place_that_cannot_be_written_is_told_before_work(desk: Desk) -> None:
    desk.model("a")
    (desk.place / "file").write_text("")
    with pytest.raises(CompressError, match="the output cannot be (read|written)"):
        compress.sweep(desk.write("a"), f"file://{desk.place}/file/below")
    with pytest.raises(UsageError, match="the output is not a directory"):
        compress.sweep(desk.grid, desk.place / "file")
    assert desk.starts() == []
