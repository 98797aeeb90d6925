"""Layouts that do not fit a parameter: each is told once, at its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tepatch.errors import Problem

Problems = Callable[..., list[Problem]]


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, "\n".join(map(str, problems))
    return problems[0]


@pytest.mark.parametrize(
    ("rule", "target", "what"),
    [
        ("{concat: [a, b]}", (5,), "5 does not split into 2 equal parts: give 'sizes'"),
        ("{concat: [a, b], sizes: [n, 3]}", (8,), "sizes n=2 + 3=3 make 5, the target has 8"),
        ("{concat: [a, b], sizes: [0, 8]}", (8,), "a part of size 0"),
        ("{concat: [a, b], sizes: [-1, 9]}", (8,), "'-1' must be a whole number"),
        ("{concat: [a, b], sizes: [1.5, 6.5]}", (8,), "'1.5' must be a whole number"),
        ("{concat: [a, b], sizes: [n / 1, 6]}", (8,), "'n / 1' must be a whole number"),
        ("{concat: [a, b], sizes: [n == 2, 7]}", (8,), "'n == 2' must be a whole number"),
        ("{concat: [a, b], dim: 1}", (8,), "there is no dimension 1 in a part of 1 dimensions"),
        ("{concat: [a, b], dim: -2}", (8,), "there is no dimension -2 in a part of 1 dimensions"),
        ("{interleave: [a, b], over: 3}", (8,), "8 positions do not make 3 groups"),
        ("{interleave: [a, b], over: 0}", (8,), "8 positions do not make 0 groups"),
        ("{interleave: [a, b], over: 4, sizes: [1, 2]}", (8,), "sizes 1=1 + 2=2 make 3, the target has 2"),
        ("{interleave: [a, b], block: 3}", (8,), "8 is not a multiple of 2 blocks of 3"),
        ("{interleave: [a, b], block: 0}", (8,), "8 is not a multiple of 2 blocks of 0"),
        ("{stack: 'a.{e}', over: e}", (4, 2), "stack over 'e' makes 3, the target has 4 in dimension 0"),
        ("{stack: 'a.{e}', over: e, dim: 2}", (3, 2), "there is no dimension 2 in a part of 2 dimensions"),
        ("{of: a, transpose: true}", (8,), "transpose needs two dimensions"),
        ("{of: a, axes: a b}", (8,), "axes 'a b' name 2 dimensions, the target has 1"),
        ("{of: a, axes: (half m)}", (8,), "axis 'half' needs a whole number, not 0.5"),
        ("{of: a, axes: (zero m)}", (8,), "axis 'zero' of '(zero m)' can not have size 0"),
        ("{of: a, pad: {size: 9}}", (8,), "pad: 9 real positions do not fit into 8"),
        ("{of: a, pad: {size: 3, dim: 1}}", (8,), "there is no dimension 1 in a part of 1 dimensions"),
        ("{of: a, take: {out_of: 9, start: 0, size: 7}}", (8,), "take: 7 positions for a part of 8"),
        ("{of: a, take: {out_of: 9, start: 2, size: 8}}", (8,), "take: positions 2 to 10 out of 9"),
        ("{of: a, take: {out_of: 9, start: 0, size: 8, dim: 1}}", (8,), "there is no dimension 1 in a part of 1"),
        ("{of: a, take: {out_of: 3, index: 3}}", (8,), "take: positions 3 to 4 out of 3"),
        ("{of: a, take: {out_of: 3, index: 0, dim: 2}}", (8,), "there is no dimension 2 in a part of 2 dimensions"),
        ("{of: a, take: {out_of: 3, start: 0, size: 1}}", (), "there is no dimension 0 in a part of 0 dimensions"),
        ("{of: a, scale: 0}", (8,), "a scale of 0 has no inverse"),
        ("{of: a, scale: name}", (8,), "'name' must be a finite number"),
        ("{of: a, offset: n == 2}", (8,), "'n == 2' must be a finite number"),
        ("{of: a, offset: 1e308 * 10}", (8,), "'1e308 * 10' must be a finite number"),
        ("{concat: [{of: c, axes: (m k) -> (k m)}, b], sizes: [5, 3]}", (8,), "the sizes of axes k, m in"),
        ("{of: {concat: [a, b], sizes: [5, 3]}, axes: (two m) -> (m two)}", (8,), "positions 0 to 5 begin or end"),
    ],
)
def test_a_layout_that_does_not_fit_is_told_once(
    rule: str, target: tuple[int, ...], what: str, plan_problems: Problems
) -> None:
    text = f"captures: {{e: 3}}\nsizes: {{half: 1 / 2, zero: 0, two: 2}}\nparameters:\n  t: {rule}"
    sources = dict.fromkeys(("a", "b", "c", "a.0", "a.1", "a.2"), (4,))
    used = {name: shape for name, shape in sources.items() if name in rule or name.startswith("a.")}
    used = used if "stack" in rule else {name: shape for name, shape in used.items() if "." not in name}
    problem = plan_problems(text, used, {"t": target}, n=2, name="x")[0]
    assert problem.what.startswith(what)
    assert problem.where.startswith("m.yaml:5:")


def test_a_layout_that_fits_no_layer_is_told_once_and_nothing_else(llama: Callable[..., Any]) -> None:
    case = llama()
    case.config["num_key_value_heads"] = 3
    problem = case.problem()
    assert problem.where == "llama.yaml:19:5"
    assert problem.what == "sizes q=64 + kv=24 + kv=24 make 112, the target has 96"


def test_alternatives_have_a_bound(plan_problems: Problems) -> None:
    parts = ", ".join(f"{{any_of: [a{i}, b{i}]}}" for i in range(7))
    problem = only(plan_problems(f"parameters:\n  t: {{concat: [{parts}]}}", {}, {"t": (7,)}))
    assert problem.what == "'any_of' makes more than 64 combinations"


def test_alternatives_in_nested_parts_are_bounded_before_they_are_made(plan_problems: Problems) -> None:
    inner = "{concat: [" + ", ".join(f"{{any_of: [a{i}, b{i}]}}" for i in range(30)) + "]}"
    problem = only(plan_problems(f"parameters:\n  t: {{concat: [{inner}, c]}}", {}, {"t": (60,)}))
    assert problem.what == "'any_of' makes more than 64 combinations"
