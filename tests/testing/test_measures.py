"""What counts as equal: each bound by itself, on numbers made for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tepatch.plugins import default_host
from tepatch.testing.cases import Bench, Case
from tepatch.testing.checkpoints import differences
from tepatch.testing.parity import hold_to_rounding, numbers
from tepatch.testing.results import Broken, NotApplicable

TRUTH = torch.linspace(1, 2, 100, dtype=torch.float64)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(default_host().patch("llama"), Case("any", LlamaConfig()), tmp_path)


def off(relative: float) -> torch.Tensor:
    """Numbers whose relative error is ``relative``."""
    return TRUTH * (1 + relative)


def test_an_error_is_measured_by_that_of_hugging_face(bench: Bench) -> None:
    figures = hold_to_rounding(bench, TRUTH, off(1e-6), off(3.9e-6)).figures
    assert figures["ours"] == pytest.approx(3.9e-6)
    assert figures["theirs"] == pytest.approx(1e-6)
    assert figures["largest"] == pytest.approx(2.9e-6, rel=1e-3)
    with pytest.raises(Broken, match=r"4.10e-06, and may be 4.0 times Hugging Face's own, 1.00e-06"):
        hold_to_rounding(bench, TRUTH, off(1e-6), off(4.1e-6))


def test_bfloat16_on_a_gpu_may_have_little_more_than_the_error_of_hugging_face(bench: Bench) -> None:
    bench = replace(bench, is_gpu=True)
    hold_to_rounding(bench, TRUTH, off(1e-2), off(1.04e-2))
    with pytest.raises(Broken, match=r"may be 1.05 times"):
        hold_to_rounding(bench, TRUTH, off(1e-2), off(1.06e-2))


def test_one_number_that_is_far_off_is_seen_among_many(bench: Bench) -> None:
    ours = off(1e-4)
    ours[7] += 5e-4
    with pytest.raises(Broken, match=r"the largest difference is 2.\d+e-04 of the largest number"):
        hold_to_rounding(bench, TRUTH, off(1e-4), ours)


@pytest.mark.parametrize(
    ("truth", "ours", "message"),
    [
        (TRUTH, TRUTH[:50], "50 numbers, and 100"),
        (TRUTH, TRUTH * torch.nan, "the relative error is nan"),
        (TRUTH * torch.nan, TRUTH, "nothing to compare with"),
        (TRUTH[:0], TRUTH[:0], "nothing to compare with"),
    ],
)
def test_what_can_not_be_compared_is_no_agreement(
    truth: torch.Tensor, ours: torch.Tensor, message: str, bench: Bench
) -> None:
    with pytest.raises(Broken, match=message):
        hold_to_rounding(bench, truth, truth, ours)


def test_outputs_are_all_floating_point_tensors_at_real_tokens() -> None:
    by_token, pooled = torch.arange(6.0).view(2, 3), torch.tensor([7.0, 8.0])
    out = {"loss": torch.ones(()), "logits": by_token, "pooled": pooled, "ids": torch.ones(2).long()}
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert numbers(out).tolist() == [0, 1, 2, 3, 4, 5, 7, 8]
    assert numbers(out, mask).tolist() == [0, 2, 5, 7, 8]
    assert numbers(out, mask, is_pooled=False).tolist() == [0, 2, 5]
    with pytest.raises(NotApplicable):
        numbers({"pooled": pooled}, mask, is_pooled=False)


def test_checkpoints_differ_in_names_shapes_dtypes_and_bits() -> None:
    same = {"a": torch.ones(2), "b": torch.zeros(2), "c": torch.ones(3), "d": torch.ones(1)}
    assert differences(same, {name: tensor.clone() for name, tensor in same.items()}, but={}) == []
    found = {"a": torch.ones(2, dtype=torch.float64), "b": -torch.zeros(2), "d": torch.zeros(1), "e": torch.ones(1)}
    assert differences(found, same, but={"d": "rounded"}) == [
        "a: torch.float64 [2], was torch.float32 [2]",
        "b: other values",
        "c: missing",
        "e: nobody's",
    ]
