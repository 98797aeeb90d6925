"""The one table of dtypes says what torch says."""

from __future__ import annotations

import pytest
import torch

from tepatch.dtypes import (
    FLOATS,
    ITEM_SIZES,
    dtype_code,
    is_convertible,
    is_exact,
    item_size,
    significand_bits,
    torch_dtype,
)


@pytest.mark.parametrize(
    ("source", "target", "exact"),
    [
        ("BF16", "BF16", True),
        ("BF16", "F32", True),
        ("F16", "F32", True),
        ("F32", "F64", True),
        ("F32", "BF16", False),
        ("F32", "F16", False),
        ("BF16", "F16", False),
        ("F16", "BF16", False),
        ("I64", "I64", True),
        ("I64", "F64", False),
        ("F8_E4M3", "F8_E4M3", True),
        ("F8_E4M3", "BF16", False),
    ],
)
def test_a_conversion_is_exact_if_it_loses_neither_precision_nor_range(source: str, target: str, exact: bool) -> None:
    assert is_exact(source, target) is exact


@pytest.mark.parametrize("code", FLOATS)
def test_significands_are_those_of_torch(code: str) -> None:
    dtype = torch_dtype(code)
    assert dtype is not None
    assert torch.finfo(dtype).eps == 2.0 ** (1 - significand_bits(code))


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_a_conversion_is_exact_if_the_extreme_values_come_back(source: str, target: str) -> None:
    dtype = torch_dtype(source)
    assert dtype is not None
    limits = torch.finfo(dtype)
    extremes = torch.tensor([limits.max, limits.tiny, 1 + limits.eps, 1 - limits.eps / 2], dtype=dtype)
    comes_back = torch.equal(extremes.to(torch_dtype(target)).to(dtype), extremes)
    assert is_exact(source, target) is comes_back


def test_floats_convert_to_each_other_and_nothing_else_does() -> None:
    convertible = {(a, b) for a in ITEM_SIZES for b in ITEM_SIZES if a != b and is_convertible(a, b)}
    assert convertible == {(a, b) for a in FLOATS for b in FLOATS if a != b}


def test_an_element_of_an_unknown_dtype_counts_as_one_byte() -> None:
    assert (item_size("BF16"), item_size("C64"), item_size("F4")) == (2, 8, 1)


def test_a_dtype_without_a_counterpart_is_told() -> None:
    assert torch_dtype("F4") is None
    assert dtype_code(torch.complex128) is None
