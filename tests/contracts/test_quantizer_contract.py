"""What every quantizer keeps; one that is added to compress/quantize is tested here without an edit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from compress.contracts import QuantizedRows, Scheme
from compress.errors import UsageError
from compress.quantize import load_quantizer, quantizers
from compress.quantize.packing import pack_codes, pack_matmul_weight, pack_zero_points, weight_bytes

SCHEMES = [Scheme(bits, size, symmetric) for bits in (2, 4, 8) for size in (16, 64) for symmetric in (True, False)]

pytestmark = pytest.mark.parametrize("name", sorted(quantizers()))


def weights(rows: int, columns: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(rows + columns).normal(0, 0.05, (rows, columns)).astype(np.float32)


def restore(result: QuantizedRows, scheme: Scheme, columns: int) -> npt.NDArray[np.float64]:
    rows, blocks = result.scales.shape
    codes = result.codes.astype(np.float64).reshape(rows, blocks, scheme.block_size)
    zeros = np.full((rows, blocks), 1 << (scheme.bits - 1)) if result.zero_points is None else result.zero_points
    values = (codes - zeros.astype(np.float64)[..., None]) * result.scales[..., None]
    return values.reshape(rows, -1)[:, :columns]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("columns", [64, 33, 100])
def test_result_has_the_promised_shape_and_type(name: str, scheme: Scheme, columns: int) -> None:
    result = load_quantizer(name).quantize(weights(7, columns), scheme)
    blocks = scheme.blocks(columns)
    assert result.codes.dtype == np.uint8 and result.codes.shape == (7, blocks * scheme.block_size)
    assert result.scales.dtype == np.float32 and result.scales.shape == (7, blocks)
    assert int(result.codes.max()) < 2**scheme.bits
    assert (result.zero_points is None) == scheme.symmetric
    zeros: npt.NDArray[np.uint8] = np.full((7, blocks), 1 << (scheme.bits - 1), np.uint8)
    if result.zero_points is not None:
        assert result.zero_points.dtype == np.uint8 and result.zero_points.shape == (7, blocks)
        zeros = result.zero_points
        pack_zero_points(zeros, scheme)
    padding = result.codes[:, columns:]
    assert np.array_equal(padding, np.broadcast_to(zeros[:, -1:], padding.shape))
    assert pack_matmul_weight(result.codes, scheme).nbytes == weight_bytes(7, columns, scheme)
    assert pack_codes(result.codes, scheme.bits).flags.c_contiguous


@pytest.mark.parametrize(("bits", "most"), [(2, 0.25), (4, 0.015), (8, 1e-4)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_weight_survives(name: str, bits: int, most: float, symmetric: bool) -> None:
    """Relative squared error of normal weights; the negative control is the weight moved by one column."""
    scheme, weight = Scheme(bits, 32, symmetric), weights(32, 128)
    restored = restore(load_quantizer(name).quantize(weight, scheme), scheme, 128)
    power = float((weight.astype(np.float64) ** 2).sum())
    assert float(((weight - restored) ** 2).sum()) / power < most
    assert float(((weight - np.roll(restored, 1, axis=1)) ** 2).sum()) / power > 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_do_not_depend_on_each_other(name: str, scheme: Scheme) -> None:
    quantizer, weight = load_quantizer(name), weights(9, 100)
    importance = np.linspace(0.1, 2, 100, dtype=np.float32)
    whole = quantizer.quantize(weight, scheme, importance)
    for start, stop in ((0, 1), (1, 4), (4, 9)):
        part = quantizer.quantize(weight[start:stop], scheme, importance)
        assert np.array_equal(part.codes, whole.codes[start:stop])
        assert np.array_equal(part.scales, whole.scales[start:stop])
        if part.zero_points is not None and whole.zero_points is not None:
            assert np.array_equal(part.zero_points, whole.zero_points[start:stop])


def test_the_weight_is_not_written_to(name: str) -> None:
    weight = weights(5, 64)
    weight.setflags(write=False)
    load_quantizer(name).quantize(weight, Scheme(4, 32, symmetric=True))


def test_impossible_schemes_are_refused(name: str) -> None:
    for scheme in (Scheme(4, 512, symmetric=True), Scheme(3, 32, symmetric=True)):
        with pytest.raises(UsageError):
            load_quantizer(name).quantize(weights(2, 64), scheme)
