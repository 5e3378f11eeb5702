"""The attention benchmark times what it says: two ways to the same output, over one cache or a copy of it."""

from __future__ import annotations

import benchmark_attention
import numpy as np
import pytest
from benchmark_attention import NODES, WAYS, model, shape_of, table, times

SHAPE = (4, 2, 16)


def output(materialized: bool) -> np.ndarray:
    import onnxruntime as ort

    heads, kv_heads, size = SHAPE
    session = ort.InferenceSession(model(*SHAPE, materialized=materialized), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    feeds = {
        item.name: random.standard_normal((1, kv_heads, 5, size), np.float32)
        for item in session.get_inputs()
        if item.name.startswith("past")
    }
    assert len(feeds) == 2 * NODES
    feeds |= {"x": random.standard_normal((1, 3, (heads + 2 * kv_heads) * size), np.float32)}
    feeds |= {"lengths": np.array([7], np.int32), "total": np.array(8, np.int32)}
    found: np.ndarray = session.run([f"y{NODES - 1}"], feeds)[0]
    return found


def test_both_ways_compute_the_same() -> None:
    tiled, held = output(materialized=False), output(materialized=True)
    assert tiled.shape == (1, 3, 4 * 16)
    np.testing.assert_allclose(held, tiled, atol=1e-5)
    assert np.abs(tiled).max() > 0.1


def test_every_run_is_timed_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_attention, "RUNS", ((4, 0), (1, 4)))
    monkeypatch.setattr(benchmark_attention, "SECONDS", 0.0)
    for way in WAYS.values():
        found = times(SHAPE, way, 1)
        assert len(found) == 2 and min(found) > 0


def test_a_ratio_is_the_median_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_attention, "RUNS", ((4, 0),))
    rounds = [
        {"tiled": [2e-6 * slow], "held whole": [1e-6 * slow], "tiled, cache copied": [3e-6 * slow]}
        for slow in (1.0, 5.0, 1.0)
    ]
    *_, row = table({SHAPE: rounds})
    assert row == "| 4, 2, 16 | 4 + 0 | 2 | 1 | 3 | 0.50 | 1.50 |"


@pytest.mark.parametrize("text", ["4,3,16", "4,2,15", "4,2", "0,1,16", "a,1,16"])
def test_heads_that_cannot_be_are_refused(text: str) -> None:
    assert shape_of("4,2,16") == SHAPE
    with pytest.raises(ValueError):
        shape_of(text)
