"""Schemes that exist pass; the others are refused with the fix named."""

from __future__ import annotations

import numpy as np
import pytest

from compress.contracts import Activations, Scheme
from compress.errors import UsageError
from compress.quantize import load_quantizer, quantizers
from compress.quantize.finite import first_nonfinite
from compress.quantize.scheme import validate_scheme


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_supported_schemes_pass(bits: int, block_size: int) -> None:
    validate_scheme(Scheme(bits, block_size, symmetric=True))


@pytest.mark.parametrize(
    ("scheme", "message", "fix"),
    [
        (Scheme(4, 512, symmetric=True), "block size 512", "set block_size to 256"),
        (Scheme(4, 48, symmetric=True), "block size 48", "set block_size to 64"),
        (Scheme(4, 8, symmetric=True), "block size 8", "set block_size to 16"),
        (Scheme(4, 0, symmetric=True), "block size 0", "set block_size to 16"),
        (Scheme(4, -32, symmetric=True), "block size -32", "set block_size to 16"),
        (Scheme(3, 32, symmetric=True), "3-bit", "set bits to 4"),
        (Scheme(16, 32, symmetric=True), "16-bit", "set bits to 8"),
    ],
)
def test_impossible_schemes_name_the_fix(scheme: Scheme, message: str, fix: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        validate_scheme(scheme, where="quantize.linear")
    assert caught.value.hint == fix
    assert "quantize.linear" in caught.value.render()


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_integer_products_take_seven_or_eight_bits(bits: int, activations: Activations) -> None:
    validate_scheme(Scheme(bits, 0, symmetric=True, activations=activations))


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Scheme(4, 0, symmetric=True, activations="dynamic"), "7- or 8-bit weights, not 4"),
        (Scheme(32, 0, symmetric=True, activations="static"), "7- or 8-bit weights, not 32"),
        (Scheme(8, 32, symmetric=True, activations="dynamic"), "one scale an output channel"),
        (Scheme(8, 0, symmetric=False, activations="dynamic"), "one scale an output channel"),
    ],
)
def test_impossible_integer_products_name_the_fix(scheme: Scheme, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        validate_scheme(scheme, where="role up")
    assert caught.value.hint and "role up" in caught.value.render()


def test_a_scale_a_row_is_for_what_is_looked_up() -> None:
    rows = Scheme(8, 0, symmetric=True)
    validate_scheme(rows, whole_rows=True)
    assert rows.blocks(312) == 1
    with pytest.raises(UsageError, match="block size 0"):
        validate_scheme(rows)
    with pytest.raises(UsageError, match="7-bit"):
        validate_scheme(Scheme(7, 0, symmetric=True), whole_rows=True)


def test_quantizers_are_found_by_name() -> None:
    assert "rtn" in quantizers()
    assert load_quantizer("rtn").name == "rtn"
    with pytest.raises(UsageError, match="did you mean rtn"):
        load_quantizer("rnt")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [(0, 0), (123, 45), (1023, 128)])
def test_the_first_value_that_is_not_finite_is_found(bad: float, where: tuple[int, int]) -> None:
    weight = np.full((1024, 129), np.finfo(np.float32).max, np.float32)
    assert first_nonfinite(weight) is None
    weight[1023, 128] = np.inf
    weight[where] = bad
    assert first_nonfinite(weight) == where


def test_nothing_is_not_finite_in_an_empty_array() -> None:
    assert first_nonfinite(np.empty((0, 4), np.float32)) is None
