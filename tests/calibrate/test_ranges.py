"""Ranges fixed by calibration, against NumPy's percentiles and onnxruntime's entropy calibrator."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from compress.calibrate.ranges import BINS, TAIL, Method, choose_range, scale_and_zero_point

Floats = npt.NDArray[np.float64]
METHODS: tuple[Method, ...] = ("percentile", "entropy", "minmax")


def values(kind: str, count: int = 200_000) -> Floats:
    random = np.random.default_rng(0)
    if kind == "outliers":
        return np.concatenate([random.normal(size=count), [-30.0, -28.0, 29.0, 30.0]])
    drawn: dict[str, Floats] = {
        "normal": random.normal(size=count),
        "laplace": random.laplace(size=count),
        "tails": random.standard_t(3, count),
        "skewed": random.gamma(2, 1, count) - 0.2,
    }
    return drawn[kind]


def chosen(data: Floats, method: Method) -> tuple[float, float]:
    low, high = float(data.min()), float(data.max())
    return choose_range(np.histogram(data, BINS, (low, high))[0], low, high, method)


def rounding_error(data: Floats, low: float, high: float) -> float:
    scale, zero = scale_and_zero_point(low, high)
    codes = np.clip(np.rint(data / scale) + zero, 0, 255)
    return float(np.mean((data - (codes - zero) * scale) ** 2))


@pytest.mark.parametrize("kind", ["normal", "laplace", "tails", "outliers", "skewed"])
def test_percentile_is_numpys_to_a_bin(kind: str) -> None:
    data = values(kind)
    low, high = chosen(data, "percentile")
    bin_width = (data.max() - data.min()) / BINS
    wanted = np.percentile(data, [100 * TAIL, 100 * (1 - TAIL)])
    assert abs(low - wanted[0]) <= bin_width and abs(high - wanted[1]) <= bin_width
    assert abs(high - data.max()) > 3 * bin_width, "the extreme would not do"
    assert np.mean((data < low) | (data > high)) <= 2 * TAIL


@pytest.mark.parametrize("kind", ["normal", "laplace", "tails", "outliers"])
def test_entropy_is_near_onnxruntimes(kind: str) -> None:
    """Theirs forgives empty levels more, and so keeps more of sparse tails: ours is 0.6 to 1.2 times as wide."""
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    data = values(kind)
    most = float(np.abs(data).max())
    low, high = choose_range(np.histogram(data, BINS, (-most, most))[0], -most, most, "entropy")
    counts, edges = np.histogram(data, BINS - 1, (-most, most))  # theirs needs a bin in the middle
    collector = calibrate.HistogramCollector("entropy", True, BINS, 128, 99.99, "same")
    theirs = collector.get_entropy_threshold((counts, edges, -most, most, most), 128)
    assert 0.6 < high / float(theirs[1]) < 1.2 and 0.6 < low / float(theirs[0]) < 1.2
    if kind != "normal":
        assert most > 1.3 * float(theirs[1]), "the extremes would not pass"


def test_entropy_gives_up_outliers_for_resolution() -> None:
    """Whom it serves: the values that are no outliers."""
    data = values("outliers")
    ordinary = data[np.abs(data) < 5]
    assert rounding_error(ordinary, *chosen(data, "entropy")) < 0.1 * rounding_error(ordinary, *chosen(data, "minmax"))
    assert rounding_error(ordinary, *chosen(data, "percentile")) < 0.1 * rounding_error(
        ordinary, *chosen(data, "minmax")
    )


def test_minmax_is_the_extremes() -> None:
    data = values("skewed")
    assert chosen(data, "minmax") == (data.min(), data.max())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        (np.zeros(BINS, np.int64), 0.0, 0.0),
        (np.zeros(BINS, np.int64), -1.0, 1.0),
        (np.eye(1, BINS, 0, dtype=np.int64)[0], -1.0, 1.0),
        (np.eye(1, BINS, BINS - 1, dtype=np.int64)[0], -1.0, 1.0),
        (np.eye(1, BINS, 700, dtype=np.int64)[0] * 10**12, -1.0, 1.0),
        (np.full(BINS, 1, np.int64), 2.0, 2.0),
        (np.full(BINS, 3, np.int64), 2.0, 5.0),
        (np.full(BINS, 3, np.int64), -5.0, -2.0),
        (np.full(BINS, 3, np.int64), -1e-45, 1e-45),
        (np.full(BINS, 3, np.int64), -3e38, 3e38),
        (np.array([5, 0, 5], np.int64), -1.0, 1.0),
    ],
)
def test_odd_histograms(counts: npt.NDArray[np.int64], low: float, high: float, method: Method) -> None:
    first, last = choose_range(counts, low, high, method)
    assert min(low, 0) <= first <= 0 <= last <= max(high, 0)
    scale, zero = scale_and_zero_point(first, last)
    assert scale > 0 and np.isfinite(scale) and (0 - int(zero)) * scale <= 0
    if last > first > -1e30 and last > 1e-30:
        assert first - scale <= (0 - int(zero)) * scale <= first + scale
        assert last - scale <= (255 - int(zero)) * scale <= last + scale


@pytest.mark.parametrize(("low", "high"), [(-1.7, 3.1), (0.0, 6.0), (-4.0, 0.0), (-0.17, 11.3), (-1e-4, 1e-4)])
def test_scale_and_zero_point_are_quantize_linears(low: float, high: float) -> None:
    """Zero stays zero, the ends are represented, and what the operator makes of values is what we expect."""
    import onnxruntime as ort

    scale, zero = scale_and_zero_point(low, high)
    assert scale.dtype == np.float32 and zero.dtype == np.uint8
    helper = onnx.helper
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "range",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])],
        [onnx.numpy_helper.from_array(np.array(scale), "s"), onnx.numpy_helper.from_array(np.array(zero), "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    data = np.concatenate([[0.0, low, high, 2 * low - 1, 2 * high + 1], np.linspace(low, high, 997)]).astype(np.float32)
    found = session.run(None, {"x": data})[0]
    assert found[0] == 0
    assert np.abs(found[5:] - data[5:]).max() <= 1.01 * scale
    assert abs(found[3] - low) <= scale and abs(found[4] - high) <= scale, "what is outside is clipped"
    assert len(np.unique(found)) == 256
