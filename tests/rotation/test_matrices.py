"""Rotations are orthogonal, the same every time, and equal to products with their matrices."""

from __future__ import annotations

import numpy as np
import pytest

from compress.rotation.matrices import LARGEST_BLOCK, Rotation, block_hadamard, block_of, hadamard

SIZES = [1, 2, 15, 64, 96, 576, 640, 2048]


@pytest.mark.parametrize("size", SIZES)
def test_matrix_is_orthogonal_and_flat(size: int) -> None:
    matrix = Rotation(size, "test").matrix().astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=2e-6)
    odd = size // (size & -size)
    # A channel that is alone ends up in all of them, none more than sqrt(odd) times the mean.
    assert np.abs(matrix).max() <= np.sqrt(odd / size) + 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_products_without_the_matrix_equal_those_with_it(size: int) -> None:
    rotation, random = Rotation(size, "test"), np.random.default_rng(size)
    matrix = rotation.matrix().astype(np.float64)
    rows = random.standard_normal((3, 2, size)).astype(np.float32)
    given = rows.copy()
    np.testing.assert_allclose(rotation.apply(rows), rows @ matrix, atol=1e-5)
    columns = random.standard_normal((size, 7)).astype(np.float32)
    expected = matrix.T @ columns
    np.testing.assert_allclose(rotation.apply_left(columns), expected, atol=1e-5)
    np.testing.assert_array_equal(rows, given)


def test_matrix_is_sylvesters() -> None:
    np.testing.assert_allclose(hadamard(4) * 2, [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    with pytest.raises(ValueError, match="power of two"):
        hadamard(12)


def test_purposes_differ_and_one_is_always_the_same() -> None:
    first = Rotation(64, "one").matrix()
    np.testing.assert_array_equal(first, Rotation(64, "one").matrix())
    assert np.abs(first - Rotation(64, "another").matrix()).max() > 0.1


def test_blocks_are_rotated_each_by_itself() -> None:
    rows = np.zeros((2, 64), np.float32)
    rows[0, 3], rows[1, 40] = 8, 4
    mixed = block_hadamard(rows, 32)
    np.testing.assert_allclose(np.abs(mixed[0, :32]), 8 / np.sqrt(32), rtol=1e-6)
    assert not mixed[0, 32:].any() and not mixed[1, :32].any()
    np.testing.assert_allclose(block_hadamard(mixed, 32), rows, atol=1e-6)


@pytest.mark.parametrize(("channels", "block"), [(1536, LARGEST_BLOCK), (160, 32), (8 * 3, 0), (48, 16), (7, 0)])
def test_block_is_the_largest_power_of_two_that_divides(channels: int, block: int) -> None:
    assert block_of(channels) == block
