"""Tensor names with captures, and names folded for a reader."""

from __future__ import annotations

import ast
import random

import pytest

from tepatch.mapping.expressions import ExpressionError
from tepatch.mapping.names import fold, fold_numbers, listed, meant_by, parse_name


@pytest.mark.parametrize(
    ("text", "captures", "name"),
    [
        ("a.b-c_d/E.0", {}, "a.b-c_d/E.0"),
        ("a.{layer}.w", {"layer": 3}, "a.3.w"),
        ("a.{ layer }.w", {"layer": 3}, "a.3.w"),
        ("{a}.{b}.{a}", {"a": 1, "b": 2}, "1.2.1"),
        ("a.{layer + 1}.w", {"layer": 3}, "a.4.w"),
        ("a.{2 * layer}.{layer}", {"layer": 3}, "a.6.3"),
        ("layer{layer}_w{expert}", {"layer": 3, "expert": 4, "unused": 5}, "layer3_w4"),
    ],
)
def test_captures_are_filled_in(text: str, captures: dict[str, int], name: str) -> None:
    assert parse_name(text).fill(captures) == name


def test_a_name_knows_its_captures() -> None:
    assert parse_name("a.{layer + 1}.{expert}").captures == {"layer", "expert"}


@pytest.mark.parametrize(
    "text", ["", ".a", "a.", "a..b", "a b", "a*", "a.{b", "a.b}", "{}", "a.{1}", "a.{b c}", "a.{f(b)}", "a.{{b}}"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse_name(text)


def test_a_pattern_matches_whole_names_and_dots_are_dots() -> None:
    pattern = parse_name("a.{layer}.w").pattern
    assert pattern.match("a.12.w")
    for other in ("a.12.w2", "x.a.12.w", "a.12xw", "a.b.w", "a..w", "a.12.w\n"):
        assert not pattern.match(other)


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([], []),
        (["a"], ["a"]),
        (["a", "a"], ["a"]),
        (["m.3.w"], ["m.3.w"]),
        (["m.0.w", "m.1.w", "m.2.w", "b"], ["m.{0..2}.w", "b"]),
        (["m.0.w", "m.2.w", "m.3.w", "m.7.w"], ["m.{0,2..3,7}.w"]),
        (["m.1.w", "m.1.b"], ["m.1.w", "m.1.b"]),
        (["m.0.e.0.w", "m.1.e.0.w", "m.0.e.1.w"], ["m.{0..1}.e.0.w", "m.0.e.1.w"]),
        (["a", "b", "c", "d", "e", "f"], ["a", "b", "c", "d", "... and 2 more"]),
    ],
)
def test_names_are_folded_over_the_layer(names: list[str], folded: list[str]) -> None:
    assert fold(names) == folded


def test_numbers_are_folded_in_order() -> None:
    assert fold_numbers([9, 0, 1, 2, 7, 2, 10]) == "0..2,7,9..10"
    assert fold_numbers([]) == ""


def test_numbers_are_folded_only_if_they_come_back() -> None:
    assert fold(["a.00.w", "a.01.w", "a.\u0663.w"]) == ["a.00.w", "a.01.w", "a.\u0663.w"]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_listed_means_the_names_and_no_others(seed: int) -> None:
    rng = random.Random(seed)
    everything = [
        f"m.{a}.e.{b}.{leaf}" for a in range(4) for b in range(12) for leaf in ("w", "b", "v.00.x", "o'{0..1}")
    ]
    everything += [f"x.{a}.w" for a in range(30)] + ["head", "m.00.e.0.w"]
    names = rng.sample(everything, rng.randint(0, len(everything)))
    if seed % 2:
        names += [name for name in everything if name.startswith("m.2.") and name not in names]
    others = [name for name in everything if name not in names]
    patterns = ast.literal_eval(listed(names, others))
    meant = {name for name in everything if any(meant_by(each)(name) for each in patterns)}
    assert meant == set(names)


def test_many_names_are_listed_by_modules_that_nothing_else_is_in() -> None:
    vision = [f"vision.blocks.{n}.{part}.{leaf}" for n in range(3) for part in ("a", "b", "c") for leaf in ("w", "b")]
    biases = [f"layers.{n}.{part}.b" for n in range(3) for part in ("q", "k", "v", "o", "p")]
    weights = [name[:-1] + "w" for name in biases]
    assert listed(vision, weights) == "['vision']"
    assert (
        listed(vision[:4], weights)
        == "['vision.blocks.0.a.w', 'vision.blocks.0.a.b', 'vision.blocks.0.b.w', 'vision.blocks.0.b.b']"
    )
    assert listed(biases, weights) == str([f"layers.{{0..2}}.{part}.b" for part in ("q", "k", "v", "o", "p")])


@pytest.mark.parametrize("text", ["", ".", "a.{0..}.w", "a.{0...1}.w", "a.{1,}.w", "a.{}.w", "a.{x}.w", "a.{2..1}.w"])
def test_what_is_no_folded_name_means_nothing_else(text: str) -> None:
    assert not any(meant_by(text)(name) for name in ("a.0.w", "a.1.w", "a.2.w", "a"))
    assert meant_by("a.{0..1}")("a.{0..1}.w")  # a name may be spelt so
