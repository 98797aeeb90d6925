"""Stored plans: what was saved comes back as it was, and whatever was changed by hand is found and named."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tepatch.errors import PlanError, Problem
from tepatch.planning import Plan
from tepatch.planning import stored as stored_plans
from tepatch.planning.stored import plan_from_json, read_plan

PlanOf = Callable[..., Plan]

TEXT = """captures: {layer: 2, expert: 2}
ignore:
  - old.{layer}: no longer needed
parameters:
  embed: {of: embed, pad: {size: 5, value: 1}}
  head: same
  zero: {create: 0}
  never: {when: false == true, of: nothing}
  layers.{layer}:
    norm: {same: true, offset: 1}
    qkv: {interleave: [q, k], sizes: [4, 2], over: 2}
    experts: {stack: {concat: ['e.{expert}.w1', 'e.{expert}.w3']}, over: expert}
"""
SOURCES = {
    "embed": (5, 2),
    "head": (6, 2),
    "old.0": (1,),
    **{f"layers.{i}.norm": (2,) for i in range(2)},
    **{f"layers.{i}.q": (8, 2) for i in range(2)},
    **{f"layers.{i}.k": (4, 2) for i in range(2)},
    **{f"layers.{i}.e.{e}.{w}": (3, 2) for i in range(2) for e in range(2) for w in ("w1", "w3")},
}
TARGETS = {
    "embed": (6, 2),
    "zero": (3,),
    **{f"layers.{i}.norm": (2,) for i in range(2)},
    **{f"layers.{i}.qkv": (12, 2) for i in range(2)},
    **{f"layers.{i}.experts": (2, 6, 2) for i in range(2)},
}


@pytest.fixture
def everything(plan_of: PlanOf) -> Plan:
    """A plan in which every state occurs."""
    return plan_of(TEXT, SOURCES, TARGETS, ties={"head": "embed"}, location="here")


@pytest.fixture
def data(everything: Plan) -> dict[str, Any]:
    """The same as data of JSON, free to be damaged."""
    return dict(json.loads(json.dumps(everything.to_json())))


def problems(data: object) -> list[Problem]:
    with pytest.raises(PlanError) as caught:
        plan_from_json(data)
    return list(caught.value.problems)


# -- there and back --


def test_a_plan_comes_back_as_it_was(everything: Plan, data: dict[str, Any]) -> None:
    assert plan_from_json(everything.to_json()) == everything
    back = plan_from_json(data)
    assert back == everything
    assert list(back.targets) == list(everything.targets)
    assert back.to_json() == everything.to_json()
    assert str(back) == str(everything)


def test_a_plan_for_saving_comes_back_as_one(everything: Plan) -> None:
    assert plan_from_json(everything.reverse().to_json()) == everything.reverse()


def test_a_plan_that_was_stored_before_plans_had_a_direction_loads(everything: Plan, data: dict[str, Any]) -> None:
    del data["direction"]
    assert plan_from_json(data) == everything


def test_tensors_without_elements_or_dimensions_come_back(plan_of: PlanOf) -> None:
    shapes = {"none": (0, 4), "also": (4, 0), "one": ()}
    plan = plan_of("parameters: {none: same, also: same, one: same}", shapes, shapes)
    assert plan_from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_file_comes_back_as_it_was(everything: Plan, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(everything.to_json(), indent=2))
    assert read_plan(path) == everything
    assert read_plan(str(path)) == everything


def test_a_plan_of_126_layers_is_read_in_a_moment(llama: Callable[..., Any]) -> None:
    case = llama(layers=126, hidden=16384, inner=53248, heads=128, groups=8, d=128, vocab=128256)
    data = json.loads(json.dumps(case.plan().to_json()))
    started = time.process_time()  # other tests may keep the machine busy
    assert plan_from_json(data) == case.plan()
    assert time.process_time() - started < 3


# -- fields that are not what they must be --

WRONG = [
    (["patch"], 3, "patch", "must be a string"),
    (["digest"], None, "digest", "must be a string"),
    (["notes"], "text", "notes", "must be a JSON array"),
    (["notes"], ["a", 2], "notes[1]", "must be a string"),
    (["direction"], "up", "direction", "is none"),
    (["rules"], {}, "rules", "must be a JSON array"),
    (["rules", 1], [], "rules[1]", "must be a JSON object"),
    (["rules", 1, "state"], "maybe", "rules[1].state", "is none"),
    (["rules", 1, "count"], True, "rules[1].count", "must be a whole number"),
    (["rules", 1, "count"], -1, "rules[1].count", "must be a whole number"),
    (["rules", 1, "sources"], [1], "rules[1].sources[0]", "must be a string"),
    (["layouts", 2, "sizes"], 4, "layouts[2].sizes", "must be a JSON array of whole numbers"),
    (["layouts", 2, "sizes", 0], 1.5, "layouts[2].sizes[0]", "must be a whole number"),
    (["layouts", 2, "sizes", 0], 1 << 63, "layouts[2].sizes[0]", "must be a whole number"),
    (["layouts", 2, "sizes"], [1] * 65, "layouts[2].sizes", "has more than 64 entries"),
    (["layouts", 2, "source"], None, "layouts[2].source", "must be a JSON object"),
    (["layouts", 2, "source", "strides"], [1, 1, 1, 1], "layouts[2].source.strides", "needs one stride for each"),
    (["layouts", 2, "target", "strides", 0], 0, "layouts[2].target.strides", "a stride of 0"),
    (["layouts", 2, "target", "offset"], "1", "layouts[2].target.offset", "must be a whole number"),
    (["copies", 3], 7, "copies[3]", "must be a JSON object"),
    (["copies", 3, "layout"], 99, "copies[3].layout", "refers to none of"),
    (["copies", 3, "layout"], True, "copies[3].layout", "refers to none of"),
    (["copies", 3, "rule"], -1, "copies[3].rule", "refers to none of 7"),
    (["copies", 3, "source"], None, "copies[3].source", "must be a string"),
    (["copies", 1, "affine"], [1], "copies[1].affine", "must be [scale, offset]"),
    (["copies", 1, "affine"], ["1", 0], "copies[1].affine[0]", "must be a finite number"),
    (["copies", 1, "affine"], [0, 1], "copies[1].affine[0]", "a scale of 0 has no inverse"),
    (["copies", 1, "affine"], [float("nan"), 1], "copies[1].affine[0]", "must be a finite number"),
    (["fills", 0, "value"], None, "fills[0].value", "must be a finite number"),
    (["fills", 0, "value"], True, "fills[0].value", "must be a finite number"),
    (["sources", "embed"], None, 'sources["embed"]', "must be a JSON object"),
    (["sources", "embed", "shape"], "5", 'sources["embed"].shape', "must be a JSON array of whole numbers"),
    (["sources", "old.0", "shape"], [1 << 40, 1 << 40], 'sources["old.0"].shape', "has more elements than"),
    (["sources", "embed", "dtype"], "bf16\x1b", 'sources["embed"].dtype', "is not the code of a dtype"),
    (["sources", "embed", "state"], [], 'sources["embed"].state', "is none"),
    (["sources", "old.0", "note"], 1, 'sources["old.0"].note', "must be a string"),
    (["targets", "embed", "rule"], 7, 'targets["embed"].rule', "refers to none of 7"),
    (["targets", "head", "tied_to"], 1, 'targets["head"].tied_to', "must be a string"),
    (["targets"], [], "targets", "must be a JSON object"),
    # What the planner proved.
    (["copies", 3, "source"], "gone", "copies[3].source", "is not one of sources"),
    (["copies", 3, "source"], "old.0", "copies[3].source", "old.0 is ignored there"),
    (["copies", 3, "target"], "head", "copies[3].target", "head is tied there"),
    (["fills", 0, "target"], "gone", "fills[0].target", "is not one of targets"),
    (["layouts", 0, "sizes", 0], 11, "copies[0].layout", "reaches outside its source [5, 2]"),
    (["layouts", 0, "target", "offset"], 3, "copies[0].layout", "reaches outside its target [6, 2]"),
    (["layouts", 0, "sizes", 0], 9, 'sources["embed"]', "its parts do not tile it"),
    (["layouts", 0, "target", "offset"], 1, 'targets["embed"]', "its parts do not tile it"),
    (["sources", "embed", "dtype"], "I64", "copies[0]", "I64 can not become BF16"),
    (["sources", "head", "note"], "gone", 'sources["head"].note', "is not a parameter that it can be a copy of"),
    (["sources", "head", "shape"], [6, 3], 'sources["head"]', "can not be a copy of embed"),
    (["sources", "old.0", "state"], "used", 'sources["old.0"]', "its parts do not tile it"),
    (["targets", "head", "tied_to"], "zero", 'targets["head"].tied_to', "is not a parameter that it can be"),
    (["targets", "head", "tied_to"], "", 'targets["head"].tied_to', "belongs to a parameter that is tied"),
    (["targets", "zero", "state"], "filled", 'targets["zero"].state', "is filled by no copy"),
    (["rules", 1, "count"], 2, "rules[1].count", "is not the number of its parameters"),
    (["rules", 0, "state"], "off", "rules[0].state", "is off, but parameters name this rule"),
    (["source_bytes"], 1, "source_bytes", "is not what follows from the rest"),
    (["target_bytes"], "1", "target_bytes", "is not what follows from the rest"),
    (["inexact"], {}, "inexact", "is not what follows from the rest"),
    (["inexact"], [], "inexact", "is not what follows from the rest"),
]


@pytest.mark.parametrize(("path", "value", "where", "what"), WRONG)
def test_what_was_changed_is_named_by_its_place(
    path: list[Any], value: object, where: str, what: str, data: dict[str, Any]
) -> None:
    inner: Any = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    found = problems(data)
    assert any(each.where == where and each.what.startswith(what) for each in found), "\n".join(map(str, found))
    assert "\x1b" not in "".join(map(str, found))


@pytest.mark.parametrize(
    ("path", "where"),
    [
        (["digest"], "digest"),
        (["inexact"], "inexact"),
        (["rules", 0, "where"], "rules[0].where"),
        (["layouts", 0, "source"], "layouts[0].source"),
        (["layouts", 0, "target", "offset"], "layouts[0].target.offset"),
        (["copies", 0, "rule"], "copies[0].rule"),
        (["fills", 0, "value"], "fills[0].value"),
        (["sources", "embed", "shape"], 'sources["embed"].shape'),
        (["targets", "embed", "dtype"], 'targets["embed"].dtype'),
    ],
)
def test_a_field_that_is_missing_or_too_many_is_named(path: list[Any], where: str, data: dict[str, Any]) -> None:
    inner: Any = data
    for key in path[:-1]:
        inner = inner[key]
    value = inner.pop(path[-1])
    assert (where, "is missing") in {(each.where, each.what) for each in problems(data)}
    inner[path[-1]] = value
    inner["more"] = 1
    assert {each.what for each in problems(data)} == {"'more' has no meaning here"}


def test_two_sources_that_fill_the_same_place_are_found(data: dict[str, Any]) -> None:
    first, second = (each for each in data["copies"] if each["target"] == "layers.0.qkv")
    second["source"] = first["source"]
    found = [each.where for each in problems(data)]
    assert 'sources["layers.0.q"]' in found or any(each.startswith("copies[") for each in found)


def test_a_name_that_can_not_be_printed_is_refused(data: dict[str, Any]) -> None:
    data["sources"]["a\x1b[31m"] = data["sources"]["old.0"]
    (problem,) = problems(data)
    assert problem.where == 'sources["a\\u001b[31m"]'


@pytest.mark.parametrize(
    ("path", "where"),
    [
        *((([key]), key) for key in ("patch", "mapping", "digest", "location")),
        (["notes"], "notes[0]"),
        (["rules", 0, "where"], "rules[0].where"),
        (["sources", "old.0", "note"], 'sources["old.0"].note'),
    ],
)
def test_text_that_a_terminal_would_obey_is_refused(path: list[Any], where: str, data: dict[str, Any]) -> None:
    inner: Any = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = ["\x1b]0;x\x07"] if path == ["notes"] else "\x1b]0;x\x07"
    (problem,) = problems(data)
    assert (problem.where, problem.what) == (where, "holds characters that can not be printed")
    assert "\x1b" not in str(problem)


def test_a_reason_in_several_lines_comes_back(plan_of: PlanOf) -> None:
    text = TEXT.replace("no longer needed", '"no longer\\nneeded"')
    plan = plan_of(text, SOURCES, TARGETS, ties={"head": "embed"}, location="here")
    assert "\n" in plan.sources["old.0"].note
    assert plan_from_json(plan.to_json()) == plan


def test_many_problems_are_counted(data: dict[str, Any]) -> None:
    data["notes"] = [1] * 1000
    found = problems(data)
    assert len(found) == stored_plans.MAX_PROBLEMS + 1
    assert found[-1].what == "... and 980 more problems"


@pytest.mark.parametrize("value", [None, [], "plan", 3])
def test_what_is_not_an_object_is_no_plan(value: object) -> None:
    assert problems(value)[0].what == "must be a JSON object"


def test_another_format_is_refused(data: dict[str, Any]) -> None:
    data["format"] = "tepatch-plan-2"
    (problem,) = problems(data)
    assert (problem.where, problem.found) == ("format", "tepatch-plan-2")


def test_an_error_that_was_saved_as_a_plan_is_told_as_such() -> None:
    (problem,) = problems({"error": {"type": "PlanError", "heading": "", "problems": []}})
    assert problem.what == "holds the errors of a plan that could not be made, and no plan"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def test_whatever_is_put_in_anywhere_gives_a_plan_or_a_plan_error(data: dict[str, Any]) -> None:
    def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        keys = node.keys() if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        return [path, *(each for key in keys for each in places(node[key], (*path, key)))]

    everywhere = [path for path in places(data) if path]

    @given(st.sampled_from(everywhere), values)
    def check(path: tuple[Any, ...], value: object) -> None:
        damaged = copy.deepcopy(data)
        inner: Any = damaged
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        try:
            plan = plan_from_json(damaged)
        except PlanError:
            return
        assert plan_from_json(plan.to_json()) == plan

    check()


# -- files --


@pytest.mark.parametrize(
    ("text", "what", "found"),
    [
        (b"{", "is not JSON in UTF-8", "Expecting property name"),
        (b'{"format": "tepatch-plan-1", "format": 2}', "is not JSON in UTF-8", "'format' stands twice in one object"),
        (b'{"value": NaN}', "is not JSON in UTF-8", "NaN is no JSON"),
        (b'"\xff"', "is not JSON in UTF-8", "'utf-8' codec"),
        (b"[" * 200_000, "is not JSON that can be read", "too many brackets"),
        (b"1" * 10_000, "is not JSON in UTF-8", "Exceeds the limit"),
    ],
)
def test_a_file_that_is_not_json_is_refused(text: bytes, what: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_bytes(text)
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    (problem,) = caught.value.problems
    assert (problem.where, problem.what) == (str(path), what)
    assert problem.found.startswith(found)


def test_a_file_that_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "absent", "can not be read"), (tmp_path, "is not a regular file")):
        with pytest.raises(PlanError) as caught:
            read_plan(path)
        assert (caught.value.problems[0].where, caught.value.problems[0].what) == (str(path), what)


def test_a_file_that_is_too_large_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_plans, "MAX_BYTES", 100)
    (tmp_path / "old.json").write_text(" " * 101)
    with pytest.raises(PlanError, match="is larger than 100 bytes"):
        read_plan(tmp_path / "old.json")


def test_the_problems_of_a_file_are_headed_by_its_name(data: dict[str, Any], tmp_path: Path) -> None:
    data["patch"] = 1
    (tmp_path / "old.json").write_text(json.dumps(data))
    with pytest.raises(PlanError) as caught:
        read_plan(tmp_path / "old.json")
    assert caught.value.heading == f"{tmp_path / 'old.json'} is not a plan that can be used"
    assert [problem.where for problem in caught.value.problems] == ["patch"]
