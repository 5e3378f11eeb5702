"""A decoder fed in pieces, because its provider cannot take more at once, answers as one that is fed whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from compress import providers
from compress.errors import CompressError, ProviderError
from compress.validation import worker
from compress.validation.decoding import CachedDecoder
from tiny_models import INT8_CACHE

TOKENS = np.random.default_rng(3).integers(3, 380, (1, 11)).astype(np.int64)


@pytest.fixture(scope="module", params=[(), INT8_CACHE], ids=["floats", "bytes"])
def artifact(tiny_artifact: Callable[..., Path], request: pytest.FixtureRequest) -> Path:
    """A tiny Llama in float32: its activations are not rounded, so that only the order of sums differs."""
    return tiny_artifact("llama", "float", *request.param) / "model.onnx"


@pytest.mark.parametrize("at_once", [1, 2, 4, 11, 64])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_pieces_give_the_logits_of_the_whole(artifact: Path, at_once: int, keep: int) -> None:
    session = providers.load("cpu").session(artifact, {}, 1)
    whole, pieces = CachedDecoder(session), CachedDecoder(session, at_once)
    for start, stop in ((0, 7), (7, 11)):
        expected = whole.feed(TOKENS[:, start:stop], keep)
        found = pieces.feed(TOKENS[:, start:stop], keep)
        assert found.shape == expected.shape == (1, keep or stop - start, expected.shape[2])
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert pieces.length == whole.length == stop
    # Positions that do not differ would prove nothing.
    assert keep == 1 or np.abs(expected[:, 0] - expected[:, -1]).max() > 0.1


def test_a_cache_kept_on_a_device_gives_the_same_logits(artifact: Path) -> None:
    """The host stands for the device: what is tested is the way there, by ONNX Runtime's vectors of values."""
    session = providers.load("cpu").session(artifact, {}, 1)
    handed, kept = CachedDecoder(session), CachedDecoder(session, device="cpu")
    for start, stop in ((0, 7), (7, 8), (8, 11)):
        expected, found = (decoder.feed(TOKENS[:, start:stop], 1) for decoder in (handed, kept))
        np.testing.assert_array_equal(found, expected)
    kept.reset()
    assert np.abs(kept.feed(TOKENS[:, 8:11], 1) - expected).max() > 0.1  # the control: without what came before


def test_no_run_is_given_more_than_its_limit(artifact: Path) -> None:
    session = providers.load("cpu").session(artifact, {}, 1)
    given: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(session, name)

        def run_with_ort_values(self, names: list[str], feeds: dict[str, object]) -> object:
            given.append(feeds["input_ids"].shape()[1])  # type: ignore[attr-defined]
            return session.run_with_ort_values(names, feeds)

    CachedDecoder(Counting(), 4).feed(TOKENS)
    CachedDecoder(Counting()).feed(TOKENS)
    assert given == [4, 4, 3, 11]


def test_a_cache_that_its_provider_gets_wrong_is_not_measured(
    tiny_artifact: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA the operator takes bytes, and multiplies others where past and present are two buffers."""
    np.save(tmp_path / "windows.npy", TOKENS)
    job = {"kind": "logits", "windows": str(tmp_path / "windows.npy"), "output": str(tmp_path / "logits.npy")}
    requests = [
        {"model": str(tiny_artifact("llama", "float", *more) / "model.onnx"), "provider": "cpu", "threads": 1}
        | {"jobs": [job]}
        for more in ((), INT8_CACHE)
    ]
    for request in requests:
        worker.handle(request, tmp_path)
    cpu, cuda = providers.load("cpu"), providers.load("cuda")
    monkeypatch.setattr(type(cpu), "supports_cache", lambda self, kept: cuda.supports_cache(kept))
    worker.handle(requests[0], tmp_path)
    with pytest.raises(ProviderError, match="int8 is read wrongly on cuda"):
        worker.handle(requests[1], tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_cache_that_is_written_into_gives_the_same_logits(artifact: Path, keep: int) -> None:
    session = providers.load("cpu").session(artifact, {}, 1)
    copied, shared = CachedDecoder(session), CachedDecoder(session, capacity=11)
    for _ in range(2):  # what the first sequence left in the buffers is not read by the second
        for start, stop in ((0, 7), (7, 8), (8, 11)):
            expected, found = (decoder.feed(TOKENS[:, start:stop], keep) for decoder in (copied, shared))
            np.testing.assert_array_equal(found, expected)
        with pytest.raises(CompressError, match="12 positions do not fit a cache of 11"):
            shared.feed(TOKENS[:, :1])
        for decoder in (copied, shared):
            decoder.keep(4)
        expected, found = (decoder.feed(TOKENS[:, 4:6], keep) for decoder in (copied, shared))
        np.testing.assert_array_equal(found, expected)
        assert np.abs(found - CachedDecoder(session).feed(TOKENS[:, 4:6], keep)).max() > 0.1  # the control: no past
        copied.reset()
        shared.reset()
    with pytest.raises(ValueError, match="on the host"):
        CachedDecoder(session, device="cpu", capacity=11)
