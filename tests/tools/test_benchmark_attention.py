"""The attention benchmark times what it says: ways to the same output, over one cache or a copy, floats or bytes."""

from __future__ import annotations

import benchmark_attention
import numpy as np
import pytest
from benchmark_attention import NODES, WAYS, Way, model, shape_of, table, times

SHAPE = (4, 2, 16)


def output(way: Way) -> np.ndarray:
    import onnxruntime as ort

    heads, kv_heads, size = SHAPE
    session = ort.InferenceSession(model(*SHAPE, way), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    past = [item.name for item in session.get_inputs() if item.name.startswith("past")]
    held = {name: random.integers(-127, 128, (1, kv_heads, 5, size)).astype(np.int8) for name in past}
    feeds = held if way.integers else {name: array / np.float32(127) for name, array in held.items()}
    assert len(feeds) == 2 * NODES
    feeds["x"] = random.uniform(-0.5, 0.5, (1, 3, (heads + 2 * kv_heads) * size)).astype(np.float32)
    feeds |= {"lengths": np.array([7], np.int32), "total": np.array(8, np.int32)}
    found: np.ndarray = session.run([f"y{NODES - 1}"], feeds)[0]
    return found


def test_all_ways_compute_the_same() -> None:
    tiled = output(WAYS["tiled"])
    assert tiled.shape == (1, 3, 4 * 16) and np.abs(tiled).max() > 0.1
    for way in WAYS.values():
        # What is behind a cache of bytes was rounded to a 127th.
        off = np.abs(output(way) - tiled).max()
        assert off < (5e-3 if way.integers else 1e-5)
        assert way.integers == (off > 1e-5)


def test_every_run_is_timed_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_attention, "RUNS", ((4, 0), (1, 4)))
    monkeypatch.setattr(benchmark_attention, "SECONDS", 0.0)
    for way in WAYS.values():
        found = times(SHAPE, way, 1)
        assert len(found) == 2 and min(found) > 0


def test_a_ratio_is_the_median_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_attention, "RUNS", ((4, 0),))
    rounds = [{name: [(place + 2) * 1e-6 * slow] for place, name in enumerate(WAYS)} for slow in (1.0, 5.0, 1.0)]
    *_, row = table({SHAPE: rounds})
    assert row == "| 4, 2, 16 | 4 + 0 | 2 | 3 | 4 | 5 | 6 | 1.50 | 2.00 | 2.50 | 3.00 |"


@pytest.mark.parametrize("text", ["4,3,16", "4,2,15", "4,2", "0,1,16", "a,1,16"])
def test_heads_that_cannot_be_are_refused(text: str) -> None:
    assert shape_of("4,2,16") == SHAPE
    with pytest.raises(ValueError):
        shape_of(text)
