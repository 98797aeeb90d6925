"""What can be asked for as a precision, and what is said about it, without Transformer Engine."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from tepatch.errors import BackendError, PlanError
from tepatch.te.nvidia.precision import (
    RECIPES,
    Precision,
    describe,
    read_precision,
    recipe_in_force,
    resolve,
    size_problems,
)

HIGH = Precision("bf16")


class MXFP8BlockScaling:
    """A recipe by its name, which is what the sizes go by."""


FP8, MXFP8 = Precision("fp8", object()), Precision("mxfp8", MXFP8BlockScaling())


@pytest.mark.parametrize("name", [None, "bf16", *RECIPES])
def test_a_name_is_for_every_layer(name: str | None) -> None:
    assert read_precision(name).for_layers(3) == [name] * 3


def test_layers_are_named_from_both_ends() -> None:
    request = read_precision({"default": "fp8", 0: "bf16", -1: "fp8-block"})
    assert request.for_layers(4) == ["bf16", "fp8", "fp8", "fp8-block"]
    assert request.for_layers(2) == ["bf16", "fp8-block"]


def test_layers_kept_out_of_a_surrounding_autocast_need_no_default() -> None:
    assert read_precision({0: "bf16"}).for_layers(2) == ["bf16", None]


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ("FP8", "no precision of this name"),
        (8, "not a precision"),
        ({"default": "fp8", 1: "fp9"}, "layer 1: no precision of this name"),
        ({"default": "fp8", "first": "bf16"}, "a key is neither the number of a layer nor 'default'"),
        ({"default": "fp8", True: "bf16"}, "a key is neither the number of a layer nor 'default'"),
        ({0: "fp8"}, "some layers are quantized, and it is not said what the others compute in"),
        ({"default": "fp8", 0: None}, "some layers are quantized, and it is not said what the others compute in"),
    ],
)
def test_what_is_no_precision_is_refused(asked: Any, what: str) -> None:
    with pytest.raises(PlanError) as caught:
        read_precision(asked)
    assert [problem.what for problem in caught.value.problems] == [what]
    assert caught.value.problems[0].where == "precision"
    assert caught.value.problems[0].expected


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        read_precision({"default": "fp9", 1: "fp8", 2: "int8", "last": "bf16"})
    assert len(caught.value.problems) == 3


def test_layers_that_are_not_there_or_named_twice_are_refused() -> None:
    request = read_precision({"default": "fp8", 0: "bf16", -3: "bf16", 3: "bf16", -4: "bf16"})
    with pytest.raises(PlanError) as caught:
        request.for_layers(3)
    assert [problem.what for problem in caught.value.problems] == [
        "layer 0 is named twice",
        "there is no layer 3",
        "there is no layer -4",
    ]
    assert caught.value.problems[1].expected == "0 to 2, or -1 to -3 from the end"


def test_the_reference_modules_compute_in_nothing_else() -> None:
    assert resolve([None, "bf16"], has_te=False) == [None, HIGH]
    with pytest.raises(BackendError, match="reference modules") as caught:
        resolve(["bf16", "fp8"], has_te=False)
    assert caught.value.problems[0].found == "'fp8'"


def test_nothing_is_in_force_where_transformer_engine_was_never_imported() -> None:
    assert recipe_in_force() is None
    with HIGH.context():
        assert recipe_in_force() is None


def test_sizes_that_do_not_fit_are_named_with_the_fields_of_the_config() -> None:
    config = SimpleNamespace(hidden_size=64, intermediate_size=100, num_layers=2, flag=True)
    shapes = [
        ("layers.0.qkv.weight", (128, 64), FP8),
        ("layers.0.mlp.fc1_weight", (200, 64), FP8),
        ("layers.0.mlp.fc2_weight", (64, 100), FP8),
        ("layers.1.mlp.fc2_weight", (64, 100), HIGH),
    ]
    (problem,) = size_problems(shapes, config)
    assert problem.details == ("layers.0.mlp.fc1_weight [200, 64]", "layers.0.mlp.fc2_weight [64, 100]")
    assert problem.expected == "both sizes of a weight divisible by 16"
    assert problem.found == "config.intermediate_size = 100"


def test_mxfp8_needs_multiples_of_32() -> None:
    shapes = [("weight", (48, 64))]
    assert not size_problems((*each, FP8) for each in shapes)
    (problem,) = size_problems((*each, MXFP8) for each in shapes)
    assert problem.expected == "both sizes of a weight divisible by 32"


def test_copies_of_a_precision_are_the_same_one() -> None:
    assert copy.deepcopy(FP8) is FP8


@pytest.mark.parametrize(
    ("precisions", "text"),
    [
        ([None, None], ""),
        ([HIGH, HIGH], "bf16"),
        ([MXFP8] * 3, "mxfp8 (MXFP8BlockScaling)"),
        ([HIGH, MXFP8, MXFP8, MXFP8, HIGH], "mxfp8 (MXFP8BlockScaling); bf16 in layers 0, 4"),
        ([MXFP8, MXFP8, MXFP8, HIGH, HIGH], "mxfp8 (MXFP8BlockScaling); bf16 in layers 3 to 4"),
        ([None, None, HIGH], "as the autocast around it says; bf16 in layer 2"),
    ],
)
def test_precisions_are_described_in_one_line(precisions: list[Precision | None], text: str) -> None:
    assert describe(precisions) == text
