"""The bound of sums in another order: where it lies, what it is of, and that no order of adding passes it."""

from __future__ import annotations

import math

import pytest
import torch
from rounding import assert_close, forward_terms, gamma, gradient_terms, scores
from torch import Tensor
from transformers import LlamaConfig

LARGEST = torch.tensor([0.25, -4.0, 0.0], dtype=torch.float64)


def moved(by: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """``LARGEST`` with its smallest element moved by a part of the largest one."""
    return (LARGEST + torch.tensor([0.0, 0.0, 4.0 * by], dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("terms", "condition"), [(1, 1.0), (1000, 1.0), (1000, 7.5)])
def test_an_error_just_below_the_bound_passes_and_one_just_above_does_not(
    terms: int, condition: float, dtype: torch.dtype
) -> None:
    product = terms * torch.finfo(dtype).eps
    bound = condition * product / (1 - product)
    assert_close(moved(0.99 * bound, dtype), LARGEST, terms=terms, condition=condition)
    assert_close(moved(-0.99 * bound, dtype), LARGEST, terms=terms, condition=condition)
    for by in (1.01 * bound, -1.01 * bound):
        with pytest.raises(AssertionError, match=r"sums: off by .* of the largest element, 4"):
            assert_close(moved(by, dtype), LARGEST, terms=terms, condition=condition, name="sums")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_close_to_nothing(value: float) -> None:
    odd = torch.tensor([1.0, value])
    for found, expected in ((odd, torch.ones(2)), (torch.ones(2), odd), (odd, odd)):
        with pytest.raises(AssertionError):
            assert_close(found, expected, terms=1000, condition=1000)


def test_shapes_are_not_broadcast() -> None:
    for shape in ((2, 1), (3,), ()):
        with pytest.raises(AssertionError, match=r"rows: \[.*\], and not \[2\]"):
            assert_close(torch.ones(shape), torch.ones(2), terms=1, name="rows")
    assert_close(torch.ones(0, 2), torch.ones(0, 2), terms=1)


def test_a_dtype_is_that_of_the_reference_or_the_reference_is_in_float64() -> None:
    single, double = torch.ones(2), torch.ones(2, dtype=torch.float64)
    assert_close(single, double, terms=1)
    for found, expected in ((double, single), (single.bfloat16(), single), (single, single.bfloat16())):
        with pytest.raises(AssertionError, match=r"torch\.\w+, and not torch\.\w+"):
            assert_close(found, expected, terms=1)
    # The bound is that of the precision that was computed in.
    assert_close(single + 2**-23, double, terms=2)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(double + 2**-23, double, terms=2)


def test_zeros_have_to_be_zeros() -> None:
    assert_close(torch.zeros(3), torch.zeros(3), terms=10)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(torch.tensor([0.0, 1e-30, 0.0]), torch.zeros(3), terms=10)


def test_so_many_terms_that_nothing_can_be_said_are_refused() -> None:
    assert gamma(2**22) == 1
    for terms in (0, 2**23):
        with pytest.raises(AssertionError, match="too many"):
            gamma(terms)


def orders(terms: Tensor) -> list[Tensor]:
    """The sum of the first dimension as processors may add it, each in float32."""
    out = []
    for lanes in (1, 4, 8, 16):  # each lane by itself, and then the lanes
        sums = torch.zeros(lanes, *terms.shape[1:])
        for part in terms.split(lanes):
            sums[: len(part)] += part
        total = torch.zeros(terms.shape[1:])
        for lane in sums:
            total = total + lane
        out.append(total)
    while len(terms) > 1:  # in pairs
        half = len(terms) // 2
        terms = torch.cat([terms[:half] + terms[half : 2 * half], terms[2 * half :]])
    return [*out, terms[0]]


@pytest.mark.parametrize("length", [5, 64, 1000])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_a_product_is_within_the_bound_in_whatever_order_it_is_added(length: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(length)
    left, right = (torch.randn(length, 200, generator=generator) for _ in range(2))
    left = left * (10 ** (spread * torch.rand(length, 1, generator=generator)))
    exact = left.double() * right.double()
    condition = float(exact.abs().sum(0).max() / exact.sum(0).abs().max())
    sums = [*orders(left * right), *orders((left * right).flip(0))]
    for found in sums:
        assert_close(found, exact.sum(0), terms=length, condition=condition)
        assert_close(found, sums[0], terms=length, condition=condition)
        with pytest.raises(AssertionError, match="off by"):
            assert_close(found * (1 + 2 * condition * gamma(length)), exact.sum(0), terms=length, condition=condition)


def test_scores_are_those_of_the_largest_query_and_key() -> None:
    query, key = torch.tensor([[[1.0, -2.0]], [[0.0, 1.0]]]), torch.tensor([[[3.0, 4.0]], [[0.5, 0.0]]])
    assert scores(query, key, 0.5) == 1 + 2 * 0.5 * (3 + 8)


def test_the_terms_of_a_model_are_those_of_its_products() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}
    one, two = (LlamaConfig(**sizes, num_hidden_layers=layers) for layers in (1, 2))
    # Two norms, Q, scores, softmax and values, O, gate, down, what is done to single elements; a norm and the head.
    layer = 2 * 128 + 64 + 16 + 2 * 10 + 64 + 64 + 96 + 16
    assert forward_terms(one, 10) == layer + 128 + 64
    assert forward_terms(two, 10) == 2 * layer + 128 + 64
    assert forward_terms(one, 11) == forward_terms(one, 10) + 2
    assert 2 * forward_terms(two, 10) < gradient_terms(two, 10, 30) < 4 * forward_terms(two, 10)
    assert gradient_terms(two, 10, 30) == gradient_terms(two, 10, 20) + 10
