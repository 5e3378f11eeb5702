"""Every source kind keeps the Checkpoint contract. A new kind adds `tests/source/sample_KIND.py`, and nothing here."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from compress.contracts import Checkpoint
from compress.errors import CompressError, SourceError
from compress.source import OpenCheckpoint, open_checkpoint, require_tokenizer, sources

SAMPLES = Path(__file__).resolve().parent.parent / "source"
KINDS = [source.name for source in sources()]

Sample = tuple[OpenCheckpoint, dict[str, np.ndarray]]


@pytest.fixture(params=KINDS)
def sample(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Sample]:
    monkeypatch.syspath_prepend(str(SAMPLES))
    module = importlib.import_module(f"sample_{request.param}")
    reference, expected = module.make(tmp_path, tiny_model, monkeypatch)
    with open_checkpoint(reference) as checkpoint:
        yield checkpoint, expected


def test_there_are_kinds_and_their_order_is_settled() -> None:
    assert {"directory", "hub", "gguf", "package"} <= set(KINDS)
    priorities = [source.priority for source in sources()]
    assert priorities == sorted(set(priorities)), "two kinds of one priority would be asked in no certain order"


def test_attributes(sample: Sample, request: pytest.FixtureRequest) -> None:
    checkpoint, _ = sample
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.kind == request.node.callspec.params["sample"]
    assert checkpoint.has_weights
    assert checkpoint.config["model_type"]
    assert not checkpoint.identifier.startswith("/"), "the manifest shows no local path"
    with pytest.raises(CompressError):
        open_checkpoint(checkpoint.reference + "-which-does-not-exist.gguf")


def test_headers_agree_with_what_is_read(sample: Sample) -> None:
    checkpoint, expected = sample
    headers = checkpoint.tensors()
    assert set(headers) == set(expected)
    for name, info in headers.items():
        values = checkpoint.read(name)
        assert info.name == name
        assert info.shape == values.shape == expected[name].shape
        assert info.nbytes > 0
        assert values.dtype == np.float32
        assert values.flags.c_contiguous and values.flags.writeable and values.flags.owndata
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_rows_are_slices_of_the_whole(sample: Sample) -> None:
    checkpoint, _ = sample
    for name, info in checkpoint.tensors().items():
        whole = checkpoint.read(name)
        rows = info.shape[0]
        for start, stop in ((0, rows), (0, 0), (rows, rows), (0, 1), (1, rows - 1), (rows // 3, rows // 2 + 1), (5, 6)):
            part = checkpoint.read(name, start, stop)
            assert part.dtype == np.float32 and part.flags.c_contiguous
            assert part.shape == (stop - start, *info.shape[1:])
            np.testing.assert_array_equal(part, whole[start:stop], err_msg=f"{name} {start}:{stop}")
        np.testing.assert_array_equal(checkpoint.read(name, 3), whole[3:])


def test_each_read_is_the_callers_own(sample: Sample) -> None:
    checkpoint, _ = sample
    name = next(iter(checkpoint.tensors()))
    first = checkpoint.read(name)
    first[:] = 0
    assert np.any(checkpoint.read(name))


def test_unknown_tensors_and_rows_are_errors(sample: Sample) -> None:
    checkpoint, _ = sample
    name, info = next(iter(checkpoint.tensors().items()))
    with pytest.raises(SourceError, match="no tensor"):
        checkpoint.read(name + "x")
    for start, stop in ((0, info.shape[0] + 1), (-1, 1), (2, 1), (info.shape[0] + 1, None)):
        with pytest.raises(SourceError, match="do not exist"):
            checkpoint.read(name, start, stop)


def test_digests(sample: Sample) -> None:
    checkpoint, _ = sample
    files = checkpoint.files()
    assert files and len({file.name for file in files}) == len(files)
    assert checkpoint.files() == files
    reference = Path(checkpoint.reference)
    beside = [reference] if reference.is_file() else checkpoint.directory.iterdir()
    known = {path.name: path for path in beside}
    for file in files:
        data = known[file.name].read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_directory_and_sidecars(sample: Sample) -> None:
    checkpoint, _ = sample
    require_tokenizer(checkpoint)
    side = checkpoint.sidecars()
    assert "config.json" not in side
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(side)
    assert all(path.is_file() for path in side.values())
    written = json.loads((checkpoint.directory / "config.json").read_text())
    assert written == json.loads(json.dumps(dict(checkpoint.config)))
    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(checkpoint.directory).model_type == checkpoint.config["model_type"]
    assert AutoTokenizer.from_pretrained(checkpoint.directory)("a word").input_ids


def test_closed_checkpoints_cannot_be_read(sample: Sample) -> None:
    checkpoint, _ = sample
    name = next(iter(checkpoint.tensors()))
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(SourceError, match="closed"):
        checkpoint.read(name)
