"""The latency model: sums of parts, interpolation between measured sizes, and a cache that is never trusted blindly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import WorkerError
from compress.latency import Geometry, LatencyModel, Workload
from compress.latency import model as latency
from compress.latency.geometry import BlockStorage
from compress.latency.model import neighbours, points_of
from compress.latency.parts import Attention, Empty, Ends, FeedForward, Point, Product, Stored, Style
from compress.latency.store import Store
from compress.latency.worker import groups, handle
from compress.prune.amounts import Amounts
from compress.prune.search import Curves, Steps, candidates, choose

FLOAT, INT8 = Stored(), Stored(8, dynamic=True)
STYLE = Style(decoder=False, rms=False, bias=True, gated=False, tanh=False, rotary=False)
RUN_SECONDS = 1e-5


def geometry(inner: int = 1536, heads: int = 12, layers: int = 6, stored: Stored = FLOAT) -> Geometry:
    storage = ((BlockStorage(stored, stored, stored, stored), layers),)
    ends = Ends(False, False, 384, ((384, 32), (384, 32)), pooled=True)
    return Geometry(STYLE, 384, inner, heads, 1, 32, storage, ends, None, 0, 42_000_000)


def made_up(point: Point) -> float:
    """Return a time that is linear in each size, as the sum of its copies and a start."""
    part, tokens = point.part, point.workload.tokens
    one = 0.0
    if isinstance(part, FeedForward):
        one = 1e-8 * part.inner * tokens * (0.4 if part.up.dynamic else 1)
    elif isinstance(part, Attention):
        one = 2e-7 * part.kv_heads * tokens
    elif isinstance(part, Product):
        one = 1e-9 * part.outputs
    elif isinstance(part, Ends):
        return 3e-4
    return RUN_SECONDS + point.copies * one


class Measured:
    """Measures by :func:`made_up` and remembers what it was asked."""

    def __init__(self, of: Callable[[Point], float] = made_up) -> None:
        self.calls: list[list[Point]] = []
        self._of = of

    def __call__(self, points: list[Point], threads: int, progress: Callable[[float], None]) -> list[float]:
        self.calls.append(points)
        progress(1.0)
        return [self._of(point) for point in points]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def test_a_run_is_the_sum_of_its_parts() -> None:
    model = LatencyModel(1, measure=Measured())
    found = model.breakdown(geometry(), Workload())
    assert found["feed_forward"] == pytest.approx(6 * 1e-8 * 1536 * 128)
    assert found["attention"] == pytest.approx(6 * 2e-7 * 12 * 128)
    assert (found["ends"], found["head"]) == (3e-4, 0)
    assert model.seconds(geometry(), Workload()) == pytest.approx(sum(found.values()))


def test_what_starting_a_run_costs_is_counted_once() -> None:
    # The negative control of the subtraction: with it left out, a start a chain would be spread over its copies.
    model = LatencyModel(1, measure=Measured(lambda point: 1.0 if isinstance(point.part, Empty) else 1.0))
    found = model.breakdown(geometry(), Workload())
    assert found == {"attention": 0, "feed_forward": 0, "head": 0, "ends": 1.0}


def test_sizes_between_are_interpolated_and_measured_ones_are_exact() -> None:
    measured = Measured(lambda point: getattr(point.part, "inner", 0) ** 2 * point.copies * 1e-9)
    model = LatencyModel(1, measure=measured)
    exact = {size: model.breakdown(geometry(size), Workload())["feed_forward"] for size in (1024, 1280, 1152)}
    assert exact[1024] == pytest.approx(6e-9 * 1024**2)
    # On the chord of a curved time, not on the curve: between the two measured sizes.
    assert exact[1152] == pytest.approx((exact[1024] + exact[1280]) / 2)
    asked = {point.part.inner for call in measured.calls for point in call if isinstance(point.part, FeedForward)}
    assert asked == {1024, 1280}


@given(st.integers(1, 20000), st.sampled_from(["inner", "kv_heads", "outputs"]))
def test_interpolation_is_a_weighted_mean_of_what_is_around(size: int, kind: str) -> None:
    part: Any = {
        "inner": FeedForward(STYLE, 384, size, FLOAT, FLOAT),
        "kv_heads": Attention(STYLE, 384, size, 1, 32, FLOAT, FLOAT),
        "outputs": Product(size, 384, FLOAT),
    }[kind]
    around = [(weight, getattr(other, kind)) for weight, other in neighbours(part)]
    assert 1 <= len(around) <= 2
    assert math.isclose(sum(weight for weight, _ in around), 1)
    assert all(weight > 0 for weight, _ in around)
    assert math.isclose(sum(weight * other for weight, other in around), size)
    low, high = min(other for _, other in around), max(other for _, other in around)
    assert low <= size <= high <= 1.25 * low + 1e-9 or low == high
    assert all(replace(part, **{kind: getattr(other, kind)}) == other for _, other in neighbours(part))


def test_an_octave_has_four_measured_sizes() -> None:
    sizes = {
        other.inner
        for size in range(1024, 2048)
        for _, other in neighbours(FeedForward(STYLE, 384, size, FLOAT, FLOAT))
        if isinstance(other, FeedForward)
    }
    assert sizes == {1024, 1280, 1536, 1792, 2048}


def test_a_second_prediction_measures_nothing() -> None:
    first, second = Measured(), Measured()
    before = LatencyModel(1, measure=first).seconds(geometry(), Workload())
    after = LatencyModel(1, measure=second)
    assert after.seconds(geometry(), Workload()) == before
    assert len(first.calls) == 1 and not second.calls
    # What is missing is measured alone.
    after.seconds(geometry(1024), Workload())
    assert [[type(point.part) for point in call] for call in second.calls] == [[FeedForward]]


def test_what_differs_is_not_taken_for_the_same() -> None:
    model = LatencyModel(1, measure=Measured())
    whole = model.seconds(geometry(), Workload())
    assert model.seconds(geometry(stored=INT8), Workload()) < whole
    assert model.seconds(geometry(), Workload(tokens=16)) < whole
    assert model.seconds(geometry(layers=4), Workload()) < whole
    others = Measured()
    LatencyModel(2, measure=others).seconds(geometry(), Workload())
    assert others.calls, "another number of threads has times of its own"


def test_machines_and_versions_have_files_of_their_own() -> None:
    described = {"cpu": "a", "onnxruntime": "1.31.1", "method": 1}
    paths = {Store(1, described).path, Store(2, described).path}
    for change in ({"cpu": "b"}, {"onnxruntime": "1.31.2"}, {"method": 2}):
        paths.add(Store(1, {**described, **change}).path)
    assert len(paths) == 5
    assert Store(1, dict(reversed(described.items()))).path in paths


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"points": {}}',
        '{"machine": {}, "points": {"a": 1.0}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_cache_is_measured_again(content: str) -> None:
    store = Store(1)
    store.add({"a": 1.0})
    assert store.read() == {"a": 1.0}
    store.path.write_text(content)
    assert store.read() == {}
    measured = Measured()
    LatencyModel(1, measure=measured).seconds(geometry(), Workload())
    assert measured.calls
    assert len(Store(1).read()) == len(measured.calls[0])


def test_times_that_are_none_are_not_read() -> None:
    store = Store(1)
    store.add({"good": 0.5})
    document = json.loads(store.path.read_text())
    document["points"] |= {"a": "0.5", "b": -1.0, "c": float("nan"), "d": float("inf"), "e": None, "f": True}
    store.path.write_text(json.dumps(document))
    assert store.read() == {"good": 0.5}


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "file"))
    assert LatencyModel(1, measure=Measured()).seconds(geometry(), Workload()) > 0


def test_two_processes_keep_each_others_points() -> None:
    first, second = Store(1), Store(1)
    first.add({"a": 1.0})
    second.add({"b": 2.0})
    assert first.read() == {"a": 1.0, "b": 2.0}
    assert [path.suffix for path in first.path.parent.iterdir()] == [".json"]


def test_chains_are_long_and_small_enough() -> None:
    for stored in (FLOAT, INT8):
        for point in points_of(geometry(stored=stored), Workload()):
            held = point.part.nbytes * point.copies
            assert held <= latency.MAX_FOOTPRINT
            if isinstance(point.part, FeedForward | Attention):
                assert 6 <= point.copies <= 32
                assert held + point.others == pytest.approx(42e6, rel=0.5)
    huge = replace(geometry(), hidden=8192, inner=32768, footprint=1 << 34)
    (point,) = (p for p in points_of(huge, Workload()) if isinstance(p.part, FeedForward))
    assert point.copies == 1


def test_models_of_nearly_one_size_share_their_points() -> None:
    first, second = (points_of(replace(geometry(), footprint=size), Workload()) for size in (42_000_000, 43_000_000))
    assert first == second
    assert first != points_of(replace(geometry(), footprint=84_000_000), Workload())


def test_pruning_by_the_model_asks_for_everything_at_once() -> None:
    measured = Measured()
    full = Amounts(1536, 12, 12, 6)
    curves = Curves(inner={512: 0.5}, heads={6: 0.5}, layers={3: 1.0})
    steps = Steps(inner=256, heads=3)
    model = LatencyModel(1, measure=measured)
    predict = model.predictor(geometry(), Workload(), candidates(curves, full, steps))
    choice = choose(curves, full, predict, speedup=1.4, steps=steps)
    assert len(measured.calls) == 1
    assert choice.best.speedup >= 1.4
    small = choice.best.amounts
    again = model.seconds(geometry(small.inner, small.heads, small.layers), Workload())
    assert choice.best.seconds == pytest.approx(again)


def test_one_linear_alone() -> None:
    model = LatencyModel(1, measure=Measured())
    assert model.product(Product(4096, 384, FLOAT), Workload(1, 1)) == pytest.approx(4096e-9)


# --------------------------------------------------------------------------------------------------------------- worker


def small(parts: int = 1) -> list[Point]:
    ff = FeedForward(STYLE, 32, 64, FLOAT, FLOAT)
    return [Point(replace(ff, inner=64 + 16 * i), Workload(1, 4), 2, 1024) for i in range(parts)]


def test_the_worker_measures_in_a_process_of_its_own() -> None:
    seen: list[float] = []
    times = latency.measure([*small(), Point(Empty(), Workload(1, 1), 1, 0)], 1, seen.append)
    assert len(times) == 2
    assert all(0 < seconds < 1 for seconds in times)


def test_a_graph_that_cannot_be_built_is_a_workers_error() -> None:
    broken = Point(FeedForward(STYLE, 32, 64, Stored(4, 0), FLOAT), Workload(1, 4), 1, 0)
    with pytest.raises(WorkerError, match="latency.worker worker failed: ZeroDivisionError"):
        latency.measure([broken], 1, lambda fraction: None)


def test_every_round_of_every_point_is_answered(tmp_path: Path) -> None:
    points = small(10)
    request = {"points": [point.as_request() for point in points], "threads": 1, "rounds": 3, "seconds": 0.0}
    answer = handle(request, tmp_path)
    assert [len(times) for times in answer["results"]] == [3] * 10
    assert float((tmp_path / "progress").read_text()) == 1


def test_few_sessions_are_open_at_once() -> None:
    assert [len(group) for group in groups(small(20))] == [8, 8, 4]
    large = [replace(point, copies=20_000) for point in small(3)]
    assert [len(group) for group in groups(large)] == [1, 1, 1]
    assert [point for group in groups(small(20)) for point in group] == small(20)
