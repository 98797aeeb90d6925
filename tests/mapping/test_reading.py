"""What a mapping file may say: every slip is told at its place, and all of them at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tepatch.errors import Problem
from tepatch.mapping import parse_mapping, read_mapping
from tepatch.mapping.rules import Leaf, Parts
from tepatch.planning import Plan

Refused = Callable[..., list[Problem]]

HEAD = "captures: {layer: num_layers, expert: num_experts}\nsizes: {d: head_dim}\nparameters:\n"


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, "\n".join(map(str, problems))
    return problems[0]


def test_a_file_is_read_with_the_places_of_its_rules(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("version: 1\ncaptures: {layer: 2}\nparameters:\n  a.weight: same\n  b.{layer}:\n    x: y\n")
    mapping = read_mapping(path)
    assert mapping.name == "small.yaml"
    assert [(rule.where, rule.target.text) for rule in mapping.rules] == [
        ("small.yaml:4:3", "a.weight"),
        ("small.yaml:6:5", "b.{layer}.x"),
    ]


def test_the_digest_is_of_the_text() -> None:
    texts = ["version: 1\nparameters: {a: b}\n", "version: 1\nparameters: {a: c}\n"]
    assert parse_mapping(texts[0]).digest == parse_mapping(texts[0], name="other").digest
    assert parse_mapping(texts[0]).digest != parse_mapping(texts[1]).digest


# -- version and form --


@pytest.mark.parametrize(("version", "found"), [("2", "2"), ("one", "'one'"), ("true", "True"), ("1.0", "1.0")])
def test_another_version_is_refused_before_anything_else(refused: Refused, version: str, found: str) -> None:
    problem = only(refused("nonsense: 1\n", version=f"version: {version}\n"))
    assert problem.where == "m.yaml:1:10"
    assert (problem.expected, problem.found) == ("version: 1", found)


def test_a_file_without_a_version_is_refused(refused: Refused) -> None:
    assert only(refused("parameters: {}\n", version="")).found == "'no version'"


def test_a_file_that_is_no_mapping_is_refused(refused: Refused) -> None:
    assert only(refused("- a\n- b\n", version="")).what == "a mapping file is a YAML mapping"


def test_an_unknown_section_is_told_with_the_one_that_was_meant(refused: Refused) -> None:
    problem = only(refused("captrues: {layer: 2}\nparameters: {}\n"))
    assert (problem.where, problem.what) == ("m.yaml:2:1", "unknown key 'captrues'")
    assert problem.fix == "did you mean 'captures'?"


def test_a_section_like_no_other_is_told_with_all_that_there_are(refused: Refused) -> None:
    assert only(refused("zzz: 1\nparameters: {}\n")).fix.startswith("known: version, extends, captures")


def test_a_file_without_parameters_is_refused(refused: Refused) -> None:
    problem = only(refused("captures: {layer: 2}\n"))
    assert (problem.where, problem.what) == ("m.yaml:1:1", "'parameters' is missing")


@pytest.mark.parametrize(
    ("rule", "key", "fix"),
    [
        ("{concat: [b, c], szies: [1, 2]}", "szies", "did you mean 'sizes'?"),
        ("{of: b, ofset: 1}", "ofset", "did you mean 'offset'?"),
        ("{of: b, take: {out_of: 4, indx: 1}}", "indx", "did you mean 'index'?"),
        ("{of: b, pad: {size: 4, vlaue: 1}}", "vlaue", "did you mean 'value'?"),
        ("{create: 0, take: {out_of: 4, index: 1}}", "take", "known: when, axes"),
        ("{concat: [b, c], stack: d}", "stack", "known: when, axes"),
    ],
)
def test_an_unknown_key_of_an_operation_is_told(refused: Refused, rule: str, key: str, fix: str) -> None:
    problem = only(refused(f"parameters:\n  a: {rule}\n"))
    assert problem.what == f"unknown key '{key}'"
    assert problem.fix.startswith(fix)


@pytest.mark.parametrize(
    "rule",
    [
        "{conact: [b, c]}",
        "{conact: [b, c], dim: 1}",
        "{conact: b, dim: 1}",
        "{concat: [b, {conact: [c, d]}]}",
        "{any_of: [b, {conact: [c, d], dim: 1}]}",
    ],
)
def test_a_misspelt_operation_is_told_with_the_one_that_was_meant(refused: Refused, rule: str) -> None:
    problem = only(refused(f"parameters:\n  a.weight: {rule}\n"))
    assert problem.what == "not an operation"
    assert problem.fix == "'conact' is not an operation; did you mean 'concat'?"


def test_a_misspelt_constant_is_told(refused: Refused) -> None:
    assert only(refused("parameters:\n  a.bias: {creat: 0}\n")).fix.endswith("did you mean 'create'?")


def test_an_operand_that_is_no_operation_at_all_is_told(refused: Refused) -> None:
    problem = only(refused("parameters:\n  a: {concat: [b, {x: y}]}\n"))
    assert (problem.what, problem.fix) == ("not an operation", "no key is an operation")
    assert problem.expected == "a tensor name, or one of of, same, concat, interleave, stack, any_of, create"


@pytest.mark.parametrize("name", ["scale", "stacked", "tied", "block", "sizes", "offset", "other"])
def test_a_scope_may_be_called_nearly_like_an_operation(name: str) -> None:
    mapping = parse_mapping(f"version: 1\nparameters:\n  a:\n    {name}: same\n    weight: same\n")
    assert {rule.target.text for rule in mapping.rules} == {f"a.{name}", "a.weight"}


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("parameters: {a: 5}", "m.yaml:2:17", "'a': Input should be a valid string"),
        ("parameters: {a: {concat: [b]}}", "m.yaml:2:26", "'concat': List should have at least 2 items"),
        ("parameters: {a: {concat: b}}", "m.yaml:2:26", "'concat': Input should be a valid list"),
        ("parameters: {a: {any_of: [b]}}", "m.yaml:2:26", "'any_of': List should have at least 2 items"),
        ("parameters: {a: {concat: [b, c], dim: x}}", "m.yaml:2:39", "'dim': Input should be a valid integer"),
        ("parameters: {a: {same: false}}", "m.yaml:2:24", "'same': Input should be True"),
        ("parameters: {a: {of: b, transpose: 1}}", "m.yaml:2:36", "'transpose': Input should be a valid boolean"),
        ("parameters: {a: {create: x}}", "m.yaml:2:26", "'create': Input should be a valid number"),
        ("parameters: {a: {create: '1'}}", "m.yaml:2:27", "'create': Input should be a valid number"),
        ("parameters: {a: {create: 1e999}}", "m.yaml:2:26", "'create': Input should be a finite number"),
        ("parameters: {a: {of: b, when: true}}", "m.yaml:2:31", "'when': must be a number or an expression"),
        ("parameters: {a: {of: b, scale: [1]}}", "m.yaml:2:32", "'scale': must be a number or an expression"),
        ("parameters: {a: {concat: [b, c], sizes: [x, [1]]}}", "m.yaml:2:45", "item 2 of 'sizes': must be a number"),
        ("parameters: {a: []}", "m.yaml:2:17", "'a': List should have at least 1 item"),
        ("parameters: [a]", "m.yaml:2:13", "'parameters': Input should be a valid dictionary"),
        ("captures: {layer: [1]}\nparameters: {}", "m.yaml:2:19", "'layer': must be a number or an expression"),
        ("requires: [x > 1]\nparameters: {}", "m.yaml:2:12", "item 1 of 'requires': Input should be a valid dict"),
        ("ignore: {a: b}\nparameters: {}", "m.yaml:2:9", "'ignore': Input should be a valid list"),
        ("extends: 5\nparameters: {}", "m.yaml:2:10", "'extends': Input should be a valid string"),
    ],
)
def test_a_value_of_the_wrong_kind_is_told_once_at_its_place(
    refused: Refused, text: str, where: str, what: str
) -> None:
    problem = only(refused(text + "\n"))
    assert problem.where == where
    assert problem.what.startswith(what)


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        ("{of: b, when: }", "when"),
        ("{of: b, pad: }", "pad"),
        ("{of: b, scale: null}", "scale"),
        ("{of: b, take: {out_of: 3, index: 1, start: }}", "start"),
        ("{concat: [b, c], sizes: }", "sizes"),
    ],
)
def test_a_key_with_nothing_behind_it_is_refused(refused: Refused, rule: str, key: str) -> None:
    assert f"'{key}' has no value" in [problem.what for problem in refused(f"parameters:\n  a: {rule}\n")]


@pytest.mark.parametrize(
    ("rule", "what"),
    [("{stack: b}", "'over' is missing"), ("{of: b, take: {index: 1}}", "'out_of' is missing")],
)
def test_a_missing_key_of_an_operation_is_told(refused: Refused, rule: str, what: str) -> None:
    problem = only(refused(f"captures: {{layer: 2}}\nparameters:\n  a: {rule}\n"))
    assert problem.what == what
    assert problem.where.startswith("m.yaml:4:")


# -- names, captures, scopes --


@pytest.mark.parametrize("name", ["a b", "a..b", "a.", "a.*", "a[0]", "a.{layer", "a.}", "/"])
def test_a_source_that_is_no_tensor_name_is_refused(refused: Refused, name: str) -> None:
    problem = only(refused(f"{HEAD}  x.{{layer}}: '{name}'\n"))
    assert "is not a tensor name" in problem.what
    assert problem.where.startswith("m.yaml:5:")


def test_a_target_that_is_no_parameter_name_is_refused(refused: Refused) -> None:
    assert "is not a tensor name" in only(refused(f"{HEAD}  a..b: c\n")).what


@pytest.mark.parametrize(
    ("rule", "what", "fix"),
    [
        ("x.{layers}: y", "'{layers}' in 'x.{layers}' is not a capture", "define it under 'captures'"),
        ("x: y.{layers}", "'{layers}' in 'y.{layers}' is not a capture", "define it under 'captures'"),
        ("x: 'y.{layer}'", "'{layer}' in 'y.{layer}' is not bound by the target", "name it in the target or"),
        ("x.{layer}: 'y.{expert}'", "'{expert}' in 'y.{expert}' is not bound by the target", "name it in the target"),
        ("x.{d}: y", "'{d}' in 'x.{d}' is not a capture", "define it under 'captures'"),
    ],
)
def test_a_capture_must_be_bound(refused: Refused, rule: str, what: str, fix: str) -> None:
    problem = refused(f"{HEAD}  {rule}\n")[0]
    assert problem.what == what
    assert problem.fix.startswith(fix)


def test_an_ignored_name_may_use_only_captures(refused: Refused) -> None:
    problem = only(refused("ignore:\n  - a.{layer}: why\nparameters: {}\n"))
    assert (problem.where, problem.what) == ("m.yaml:3:5", "'{layer}' in 'a.{layer}' is not a capture")


def test_an_ignored_name_must_be_a_name(refused: Refused) -> None:
    assert "is not a tensor name" in only(refused("ignore:\n  - a b: why\nparameters: {}\n")).what


def test_braces_without_a_capture_are_refused(refused: Refused) -> None:
    assert "'{1}' names no capture" in only(refused(f"{HEAD}  x: 'y.{{1}}'\n")).what


def test_a_name_can_not_be_a_capture_and_a_size(refused: Refused) -> None:
    problem = only(refused("captures: {n: 2}\nsizes: {n: 3}\nparameters: {}\n"))
    assert (problem.where, problem.what) == ("m.yaml:3:9", "'n' is a capture and a size: give one another name")


@pytest.mark.parametrize("name", ["a-b", "1st", "true", "none"])
def test_a_size_must_have_a_name_that_expressions_can_use(refused: Refused, name: str) -> None:
    assert only(refused(f"sizes: {{{name}: 3}}\nparameters: {{}}\n")).what.startswith(f"'{name}' is not a name")


def test_a_second_rule_for_a_target_is_refused_with_the_place_of_the_first(refused: Refused) -> None:
    problem = only(refused("parameters:\n  a.b: x\n  a:\n    b: y\n"))
    assert (problem.where, problem.what) == ("m.yaml:5:5", "a second rule for 'a.b' (first at m.yaml:3:3)")


def source_of(text: str) -> str:
    (rule,) = parse_mapping(f"version: 1\n{HEAD}{text}").rules
    (node,) = rule.choices
    assert isinstance(node, Leaf)
    return node.source.text


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("  a.b: c", "c"),
        ("  a.b: same", "a.b"),
        ("  a.b: {same: true}", "a.b"),
        ("  a:\n    b: c", "a.c"),
        ("  a:\n    b: same", "a.b"),
        ("  a:\n    b: /c.d", "c.d"),
        ("  a:\n    b: {of: /c}", "c"),
        ("  a <- z:\n    b: c", "z.c"),
        ("  a <- z:\n    b: same", "z.b"),
        ("  a <- '':\n    b: same", "b"),
        ("  a:\n    b <- y:\n      c: d", "a.y.d"),
        ("  a.{layer} <- h.{layer}:\n    b: c", "h.{layer}.c"),
        ("  a.{layer} <- h.{layer + 1}:\n    b: same", "h.{layer + 1}.b"),
        ("  a <- z: same", "z"),
    ],
)
def test_scopes_say_where_names_begin(text: str, source: str) -> None:
    assert source_of(text.replace("''", "")) == source


def test_the_condition_of_a_scope_holds_for_all_rules_in_it() -> None:
    text = "  when: a\n  x:\n    when: b\n    y: same\n    z: {when: c, same: true}\n  w: same\n"
    conditions = {
        rule.target.text: [str(condition) for condition in rule.conditions]
        for rule in parse_mapping(f"version: 1\nparameters:\n{text}").rules
    }
    assert conditions == {"x.y": ["a", "b"], "x.z": ["a", "b"], "w": ["a"]}


@pytest.mark.parametrize("when", ["", "null", "[a]", "{b: c}"])
def test_the_condition_of_a_scope_must_be_an_expression(refused: Refused, when: str) -> None:
    problem = only(refused(f"parameters:\n  x:\n    when: {when}\n    y: same\n"))
    assert (problem.where, problem.what) == ("m.yaml:4:5", "'when' needs a condition")


def test_of_several_choices_only_the_last_may_go_without_a_condition(refused: Refused) -> None:
    problem = only(refused("parameters:\n  a:\n    - b\n    - {when: x, of: c}\n    - d\n"))
    assert (problem.where, problem.what) == (
        "m.yaml:4:7",
        "only the last of several choices may go without 'when'",
    )


# -- expressions and layouts --


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("captures: {layer: 1 +}\nparameters: {}", "m.yaml:2:"),
        ("sizes: {d: a.b()}\nparameters: {}", "m.yaml:2:12"),
        ("sizes: {d: 1 + f(2)}\nparameters: {}", "m.yaml:2:16"),
        ("sizes: {d: '1 + f(2)'}\nparameters: {}", "m.yaml:2:17"),
        ("requires:\n  - x ** 2 == 4: no\nparameters: {}", "m.yaml:3:5"),
        ("parameters: {a: {of: b, when: lambda}}", "m.yaml:2:"),
        ("parameters: {a: {of: b, pad: {size: f(1)}}}", "m.yaml:2:37"),
        ("parameters: {a: {of: b, take: {out_of: f(1), index: 0}}}", "m.yaml:2:40"),
        ("parameters: {a: {concat: [b, c], sizes: [1, f(1)]}}", "m.yaml:2:45"),
        ("parameters: {a: {interleave: [b, c], over: f(1)}}", "m.yaml:2:44"),
        ("parameters: {x: {when: f(1), a: b}}", "m.yaml:2:24"),
    ],
)
def test_a_wrong_expression_is_told_at_its_column(refused: Refused, text: str, where: str) -> None:
    problems = refused(text + "\n")
    assert problems[0].where.startswith(where)
    assert "expression" in problems[0].what


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("{concat: [b, c], sizes: [1, 2, 3]}", "3 sizes for 2 parts"),
        ("{interleave: [b, c]}", "'interleave' needs either 'over' (groups) or 'block' (positions)"),
        ("{interleave: [b, c], over: 2, block: 2}", "'interleave' needs either 'over' (groups) or 'block' (positions)"),
        ("{interleave: [b, c], block: 2, sizes: [1, 1]}", "'block' gives every part the same size: drop 'sizes'"),
        ("{stack: b, over: nothing}", "'nothing' is not a capture that is free here"),
        ("{stack: {stack: b, over: layer}, over: layer}", "'layer' is not a capture that is free here"),
        ("{of: b, transpose: true, axes: i j -> j i}", "use one of 'axes' and 'transpose'"),
        ("{of: b, axes: i j -> j}", "both sides of 'i j -> j' must have the same axes"),
        ("{of: {same: true}, take: {out_of: 2, index: 0}}", "'take' needs a single source tensor"),
        ("{of: b, take: {out_of: 2}}", "'take' needs either 'index', or 'start' and 'size'"),
        ("{of: b, take: {out_of: 2, start: 1}}", "'take' needs either 'index', or 'start' and 'size'"),
        ("{of: b, take: {out_of: 2, index: 1, start: 0}}", "'take' needs either 'index', or 'start' and 'size'"),
        (
            "{of: b, take: {out_of: 2, index: 1, start: 0, size: 1}}",
            "'take' needs either 'index', or 'start' and 'size'",
        ),
        ("{concat: [b, {of: c, when: x}]}", "'when' belongs to the whole rule, not to a part of it"),
        ("{create: 0, transpose: true}", "'transpose' means nothing with 'create'"),
        ("{create: 0, pad: {size: 1}}", "'pad' means nothing with 'create'"),
    ],
)
def test_what_contradicts_itself_is_refused(refused: Refused, rule: str, what: str) -> None:
    assert only(refused(f"captures: {{layer: 2}}\nparameters:\n  a: {rule}\n")).what == what


REMOVED = [
    ("{tie: b}", "m.yaml:3:7", "tie"),
    ("[{when: x, tie: b}, same]", "m.yaml:3:17", "tie"),
    ("{concat: [b, {tie: c}]}", "m.yaml:3:20", "tie"),
    ("{of: b, tie: c}", "m.yaml:3:14", "tie"),
    ("{of: b, rope_permute: 2}", "m.yaml:3:14", "rope_permute"),
    ("{concat: [b, {of: c, rope_permute: 2}]}", "m.yaml:3:27", "rope_permute"),
    ("{of: b, cast: float32}", "m.yaml:3:14", "cast"),
    ("{create: 0, cast: float32}", "m.yaml:3:18", "cast"),
]


@pytest.mark.parametrize(("rule", "where", "key"), REMOVED)
def test_what_was_removed_from_the_language_is_told_once_with_what_to_write(
    refused: Refused, rule: str, where: str, key: str
) -> None:
    problem = only(refused(f"parameters:\n  a: {rule}\n"))
    assert (problem.where, problem.what) == (where, f"'{key}' is no longer in the language")
    assert problem.fix


def test_what_was_removed_may_be_written_as_the_advice_says(refused: Refused, plan_of: Callable[..., Plan]) -> None:
    text = "parameters:\n  a: same\n  b: [{when: is_tied, %s}, same]\n"
    tie = only(refused(text % "tie: a")).fix
    assert "'same: true'" in tie
    plan = plan_of(text % "same: true", {"a": (2,)}, {"a": (2,)}, ties={"b": "a"}, is_tied=True)
    assert (plan.targets["b"].state, plan.targets["b"].tied_to) == ("tied", "a")

    text = "sizes: {%s}\nparameters:\n  a: {of: w, %s}\n  b: {of: v, %s}\n"
    rope = refused(text % ("n: 3", "rope_permute: n", "rope_permute: n"))[0].fix
    weight, bias, size = re.findall("'([^']*)'", rope)
    shapes = {"w": (12, 5), "v": (12,)}, {"a": (12, 5), "b": (12,)}
    plan = plan_of(text % (f"n: 3, {size}", weight, f"axes: {bias}"), *shapes)
    rows = {copy.target: copy.pair.source_view().dims[0] for copy in plan.copies}
    assert rows == {"a": ((3, 20),), "b": ((3, 4),)}

    cast = only(refused("parameters:\n  a: {same: true, cast: float32}\n")).fix
    assert cast.startswith("leave it out")
    plan = plan_of("parameters:\n  a: {same: true}\n", {"a": (2,)}, {"a": (2,)}, target_dtype="F32")
    assert plan.targets["a"].dtype == "F32"


def test_a_capture_of_the_target_is_not_free_to_stack_over(refused: Refused) -> None:
    assert (
        "'layer' is not a capture that is free here"
        in only(refused(f"{HEAD}  a.{{layer}}: {{stack: b, over: layer}}\n")).what
    )


def test_all_problems_of_a_file_are_told_at_once(refused: Refused) -> None:
    problems = refused(
        "captures: {layer: 1 +}\nignore:\n  - a b: x\nrequires:\n  - {a: b, c: d}\n"
        "parameters:\n  a..b: c\n  d: {concat: [e, f..g], sizes: [1]}\n  h: {create: 1, scale: 1}\n"
    )
    assert len(problems) == 7


def test_a_requirement_is_one_condition(refused: Refused) -> None:
    problem = only(refused("requires:\n  - {a > 1: x, b > 1: y}\nparameters: {}\n"))
    assert problem.where == "m.yaml:3:5"
    assert problem.what == "one requirement is 'name: {that: condition, else: sentence}', or 'condition: sentence'"


def test_a_requirement_can_have_a_name() -> None:
    text = (
        "version: 1\nrequires:\n  - even:\n      that: a % 2 == 0\n      else: it is odd\n  - b: no b\nparameters: {}\n"
    )
    even, other = parse_mapping(text, name="m.yaml").requires
    assert (even.name, str(even.condition), even.sentence) == ("even", "a % 2 == 0", "it is odd")
    assert even.condition.where == "m.yaml:4:13"
    assert (other.name, str(other.condition)) == ("", "b")


@pytest.mark.parametrize(
    ("entry", "where", "what"),
    [
        ("even: {that: a}", "m.yaml:3:5", "'else' is missing"),
        ("even: {else: a}", "m.yaml:3:5", "'that' is missing"),
        ("even: {that: a, esle: b, else: c}", "m.yaml:3:21", "unknown key 'esle'"),
        ("even: {that: a, else: }", "m.yaml:3:27", "'else': Input should be a valid string"),
        ("even: {that: true, else: b}", "m.yaml:3:18", "'that': Input should be a valid string"),
        ("even: {that: a +, else: b}", "m.yaml:3:18", "'a +' is not an expression: invalid syntax"),
        ("a b: {that: a, else: b}", "m.yaml:3:5", "'a b' is not a name (letters, digits and '_')"),
        ("none: {that: a, else: b}", "m.yaml:3:5", "'none' is not a name (letters, digits and '_')"),
        ("even: [a, b]", "m.yaml:3:11", "'even': Input should be a valid string"),
    ],
)
def test_what_is_wrong_with_a_named_requirement_is_told_at_its_place(
    refused: Refused, entry: str, where: str, what: str
) -> None:
    problem = only(refused(f"requires:\n  - {entry}\nparameters: {{}}\n"))
    assert (problem.where, problem.what) == (where, what)


def test_the_keys_of_a_requirement_are_suggested(refused: Refused) -> None:
    problem = only(refused("requires:\n  - {even: {that: a, else: b, esle: c}}\nparameters: {}\n"))
    assert problem.fix == "did you mean 'else'?"


def test_a_file_has_no_two_requirements_of_a_name(refused: Refused) -> None:
    problem = only(refused("requires:\n  - x: {that: a, else: b}\n  - x: {that: c, else: d}\nparameters: {}\n"))
    assert (problem.where, problem.what) == ("m.yaml:4:5", "a second requirement 'x' (first at m.yaml:3:5)")


def test_parts_keep_their_order_and_their_sizes() -> None:
    (rule,) = parse_mapping("version: 1\nparameters:\n  a: {concat: [b, c, d], sizes: [1, x, 2 * x], dim: 1}\n").rules
    (node,) = rule.choices
    assert isinstance(node, Parts)
    assert [str(size) for size in node.sizes or ()] == ["1", "x", "2 * x"]
    assert node.dim == 1
