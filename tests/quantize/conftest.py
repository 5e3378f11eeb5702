"""Slow, independent versions of what compress.quantize does, and weights to try it on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from compress.contracts import QuantizedRows, Scheme


def dequantize(result: QuantizedRows, scheme: Scheme, columns: int) -> npt.NDArray[np.float64]:
    """Return float64 ``[rows, columns]`` from codes, scales and zero points, by the definition."""
    zero = np.full(result.scales.shape, 2 ** (scheme.bits - 1)) if result.zero_points is None else result.zero_points
    blocks = result.codes.astype(np.float64).reshape(*result.scales.shape, scheme.block_size)
    values = (blocks - zero.astype(np.float64)[..., None]) * result.scales.astype(np.float64)[..., None]
    return values.reshape(len(result.codes), -1)[:, :columns]


@pytest.fixture(name="dequantize", scope="session")
def dequantize_fixture() -> Callable[[QuantizedRows, Scheme, int], npt.NDArray[np.float64]]:
    """Give tests the slow dequantizer (test folders are no packages to import from)."""
    return dequantize


@pytest.fixture
def trained_like() -> npt.NDArray[np.float32]:
    """Return ``[48, 192]`` with the tails and the outlier channels that trained weights have."""
    generator = np.random.default_rng(20)
    weight = generator.standard_t(5, size=(48, 192)) * np.exp(generator.normal(0, 0.4, size=(1, 192)))
    weight[:, 17] *= 6
    return (weight * 0.02).astype(np.float32)
