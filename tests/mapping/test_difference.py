"""What changed between two plans: every change is told, in words that a reader can check, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tepatch.planning import Plan
from tepatch.planning.difference import Change, PlanDiff, diff_plans
from tepatch.views import Pair

PlanOf = Callable[..., Plan]

SOURCES = {"q": (6, 4), "k": (2, 4), "v": (2, 4), "n": (4,), "extra": (3,)}
TARGETS = {"qkv": (10, 4), "norm": (4,)}
RULES = """ignore: [{extra: not needed}]
parameters:
  qkv: {concat: [q, k, v], sizes: [6, 2, 2]}
  norm: n
"""


@pytest.fixture
def base(plan_of: PlanOf) -> Plan:
    return plan_of(RULES, SOURCES, TARGETS)


@pytest.fixture
def changes(plan_of: PlanOf, base: Plan) -> Callable[..., list[tuple[str, str, str, tuple[str, ...]]]]:
    """The changes from the plan of ``RULES`` to that of another text, or of other shapes."""

    def make(
        text: str = RULES, sources: dict[str, Any] = SOURCES, targets: dict[str, Any] = TARGETS, **more: Any
    ) -> list[tuple[str, str, str, tuple[str, ...]]]:
        found = diff_plans(base, plan_of(text, sources, targets, **more))
        return [(each.of, each.name, each.kind, each.details) for each in found.changes]

    return make


def test_a_plan_is_the_same_as_itself(base: Plan) -> None:
    found = diff_plans(base, base)
    assert found.is_same
    assert str(found).endswith("the same: every parameter and every tensor")


def test_where_a_rule_stands_and_how_a_plan_is_named_is_no_change(plan_of: PlanOf, base: Plan) -> None:
    text = "# a comment\n" + RULES.replace("  norm: n\n", "").replace("parameters:\n", "parameters:\n  norm: n\n")
    other = replace(plan_of(text, SOURCES, TARGETS), patch="b", location="there", notes=("a note",))
    assert other.digest != base.digest
    assert diff_plans(base, other).is_same
    assert diff_plans(base, base.reverse()).is_same


def test_parts_that_change_places_are_told_with_both_places(changes: Any) -> None:
    text = RULES.replace("[q, k, v], sizes: [6, 2, 2]", "[q, v, k], sizes: [6, 2, 2]")
    details = ("v: rows 8..10 -> rows 6..8", "k: rows 6..8 -> rows 8..10")
    assert changes(text) == [("parameter", "qkv", "layout", details)]


def test_an_interleaved_layout_is_told_in_words(changes: Any) -> None:
    text = RULES.replace("concat: [q, k, v], sizes: [6, 2, 2]", "interleave: [q, k, v], sizes: [3, 1, 1], over: 2")
    details = (
        "q: rows 0..6 -> rows 0..3 of every 5",
        "k: rows 6..8 -> row 3 of every 5",
        "v: rows 8..10 -> row 4 of every 5",
    )
    assert changes(text) == [("parameter", "qkv", "layout", details)]


def test_a_transpose_of_a_square_is_a_change(plan_of: PlanOf) -> None:
    shapes = {"a": (4, 4)}
    old, new = (plan_of(f"parameters: {{a: {rule}}}", shapes, shapes) for rule in ("same", "{of: a, transpose: true}"))
    (change,) = diff_plans(old, new).changes
    assert change == Change("parameter", "a", "layout", ("a: all -> all, transposed",))


def test_two_orders_for_which_there_are_no_words_are_told_in_numbers(plan_of: PlanOf) -> None:
    text, shapes = "sizes: {h: %d}\nparameters: {a: {of: a, axes: (h r 2) i -> (h 2 r) i}}", {"a": (24, 2)}
    old, new = (plan_of(text % heads, shapes, shapes) for heads in (2, 3))
    (change,) = diff_plans(old, new).changes
    assert change.kind == "layout"
    assert change.details[0].startswith("a: sizes [2, ")


def test_other_sources_are_told(changes: Any) -> None:
    found = changes(
        RULES.replace("[q, k, v]", "[q, k, w]"), {"w" if name == "v" else name: s for name, s in SOURCES.items()}
    )
    assert found == [
        ("parameter", "qkv", "sources", ("no longer v", "now w")),
        ("tensor", "w", "added", ("[2, 4] BF16, used",)),
        ("tensor", "v", "removed", ("[2, 4] BF16, used",)),
    ]


def test_parameters_that_come_and_go_are_told_with_what_they_are_made_of(changes: Any) -> None:
    assert changes(RULES.replace("norm:", "other:"), SOURCES, {"qkv": (10, 4), "other": (4,)}) == [
        ("parameter", "other", "added", ("[4] BF16, filled from n",)),
        ("parameter", "norm", "removed", ("[4] BF16, filled from n",)),
    ]


def test_shapes_and_dtypes_are_told(changes: Any) -> None:
    assert changes(sources={**SOURCES, "n": (5,)}, targets={**TARGETS, "norm": (5,)}) == [
        ("parameter", "norm", "shape", ("[4] -> [5]",)),
        ("tensor", "n", "shape", ("[4] -> [5]",)),
    ]
    found = changes(target_dtype="F16")
    assert ("parameter", "norm", "dtype", ("BF16 -> F16",)) in found
    assert ("tensor", "n", "inexact", ("bit for bit -> BF16 is rounded to F16",)) in found
    assert ("tensor", "n", "dtype", ("BF16 -> F32",)) in changes(dtype="F32", target_dtype="BF16")


def test_value_operations_are_told_and_what_they_cost(changes: Any) -> None:
    assert changes(RULES.replace("norm: n", "norm: {of: n, offset: 1}")) == [
        ("parameter", "norm", "values", ("n: as they are -> 1.0 x + 1.0",)),
        ("tensor", "n", "inexact", ("bit for bit -> scaled or offset (1.0 x + 1.0)",)),
    ]


def test_constants_are_told(plan_of: PlanOf) -> None:
    old, new = (
        plan_of(f"parameters: {{a: {{of: a, pad: {{size: 3, value: {value}}}}}}}", {"a": (3, 2)}, {"a": (5, 2)})
        for value in (0, 1)
    )
    (change,) = diff_plans(old, new).changes
    assert change == Change("parameter", "a", "constants", ("rows 3..5 = 0.0 -> rows 3..5 = 1.0",))


def test_a_parameter_that_becomes_a_constant_is_told(changes: Any) -> None:
    text = RULES.replace("norm: n", "norm: {create: 1}").replace("[{extra", "[{n: gone}, {extra")
    assert changes(text) == [
        ("parameter", "norm", "state", ("filled -> created",)),
        ("parameter", "norm", "sources", ("no longer n",)),
        ("parameter", "norm", "constants", ("none -> all = 1.0",)),
        ("tensor", "n", "state", ("used -> ignored (gone)",)),
    ]


def test_other_ties_are_told(plan_of: PlanOf) -> None:
    shapes = {"a": (3,), "b": (3,)}
    text = "parameters: {a: same, b: same, c: same}"
    old, new = (plan_of(text, shapes, shapes, ties={"c": to}) for to in ("a", "b"))
    (change,) = diff_plans(old, new).changes
    assert change == Change("parameter", "c", "tied", ("tied to a -> tied to b",))
    untied = plan_of("parameters: {a: same, b: same, c: same}", {**shapes, "c": (3,)}, {**shapes, "c": (3,)})
    first = diff_plans(old, untied).changes[0]
    assert first == Change("parameter", "c", "state", ("tied to a -> filled",))


def test_another_reason_for_ignoring_is_told(changes: Any) -> None:
    assert changes(RULES.replace("not needed", "computed")) == [
        ("tensor", "extra", "state", ("ignored (not needed) -> ignored (computed)",))
    ]


def test_the_way_a_whole_was_cut_into_parts_is_no_change(base: Plan) -> None:
    flat = next(copy for copy in base.copies if copy.source == "q")
    halves = [replace(flat, pair=Pair((12,), (1,), (1,), 12 * half, 12 * half)) for half in (0, 1)]
    others = [copy for copy in base.copies if copy is not flat]
    assert diff_plans(base, replace(base, copies=(*halves, *others))).is_same
    moved = [replace(half, pair=half.pair._replace(source_offset=12 - half.pair.source_offset)) for half in halves]
    assert not diff_plans(base, replace(base, copies=(*moved, *others))).is_same
    apart = replace(halves[1], pair=halves[1].pair._replace(target_offset=28))
    assert not diff_plans(base, replace(base, copies=(halves[0], apart, *others))).is_same


# -- text and JSON --

LAYERS = """captures: {layer: 4, expert: 3}
parameters:
  model.layers.{layer}:
    qkv: {concat: [q, k]}
    out: /h.{layer}.o
    experts: {stack: 'e.{expert}.w', over: expert}
"""


@pytest.fixture
def layers(plan_of: PlanOf) -> Callable[[str], Plan]:
    sources: dict[str, tuple[int, ...]] = {}
    targets: dict[str, tuple[int, ...]] = {}
    for layer in range(4):
        at = f"model.layers.{layer}."
        sources |= {f"{at}q": (4, 3), f"{at}k": (4, 3), f"h.{layer}.o": (3, 3)}
        sources |= {f"{at}e.{expert}.w": (2, 2) for expert in range(3)}
        targets |= {f"{at}qkv": (8, 3), f"{at}out": (3, 3), f"{at}experts": (3, 2, 2)}
    return lambda text: plan_of(text, sources, targets, location="here")


def test_the_text_says_what_layers_have_in_common_once(layers: Callable[[str], Plan]) -> None:
    new = LAYERS.replace("[q, k]", "[k, q]").replace("/h.{layer}.o", "{of: '/h.{layer}.o', transpose: true}")
    lines = str(diff_plans(layers(LAYERS), layers(new))).splitlines()
    assert lines[0].startswith("old: m.yaml <- here, mapping m.yaml (sha256 ")
    assert lines[2:] == [
        "8 parameters changed",
        "  laid out otherwise: model.layers.{0..3}.qkv",
        "    k: rows 4..8 -> rows 0..4",
        "    q: rows 0..4 -> rows 4..8",
        "  laid out otherwise: model.layers.{0..3}.out",
        "    h.{n}.o: all -> all, transposed",
    ]


def test_the_text_folds_experts_as_well(layers: Callable[[str], Plan]) -> None:
    new = LAYERS.replace("experts: {stack: 'e.{expert}.w', over: expert}", "experts: {create: 0}")
    new = "ignore: [{'model.layers.{layer}.e.{expert}.w': not wanted}]\n" + new
    lines = str(diff_plans(layers(LAYERS), layers(new))).splitlines()
    assert "    no longer e.{0..2}.w" in lines
    assert "  another state: model.layers.{0..3}.e.{0..2}.w" in lines
    assert "    used -> ignored (not wanted)" in lines


def test_a_long_change_is_cut_in_the_text_and_whole_in_the_json(plan_of: PlanOf) -> None:
    names = [f"part_{letter}" for letter in "abcdefghijkl"]
    sources, targets = dict.fromkeys(names, (1, 2)), {"t": (12, 2)}
    old, new = (plan_of(f"parameters: {{t: {{concat: {each}}}}}", sources, targets) for each in (names, names[::-1]))
    found = diff_plans(old, new)
    assert str(found).splitlines()[-1] == "    ... and 4 more"
    assert len(found.to_json()["changes"][0]["details"]) == 12


def test_the_json_has_every_change_under_its_full_name(layers: Callable[[str], Plan]) -> None:
    found = diff_plans(layers(LAYERS), layers(LAYERS.replace("[q, k]", "[k, q]")))
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (data["format"], data["same"]) == ("tepatch-plan-diff-1", False)
    assert data["old"]["location"] == "here"
    assert data["changes"][2] == {
        "of": "parameter",
        "name": "model.layers.2.qkv",
        "kind": "layout",
        "details": ["model.layers.2.k: rows 4..8 -> rows 0..4", "model.layers.2.q: rows 0..4 -> rows 4..8"],
    }
    assert PlanDiff(found.old, found.new, ()).to_json()["same"] is True
