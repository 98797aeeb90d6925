"""Arithmetic over a config, and nothing that could do more."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tepatch.mapping.expressions import MAX_INTEGER, MAX_LENGTH, MAX_RANGE, ExpressionError, MissingField, parse

CONFIG: dict[str, Any] = {
    "heads": 32,
    "hidden": 4096,
    "head_dim": None,
    "eps": 1e-5,
    "act": "silu",
    "tied": True,
    "types": ["full", "sliding", "full"],
    "rope": {"type": "llama3", "factor": 8.0, "nested": {"x": 1}},
    "count": 0,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("heads", 32),
        ("head_dim or hidden // heads", 128),
        ("heads and hidden", 4096),
        ("count and hidden", 0),
        ("head_dim or count or none", None),
        ("(heads + 2 * 8) * 4 - 1", 191),
        ("heads / 64", 0.5),
        ("heads % 5", 2),
        ("-heads", -32),
        ("+heads", 32),
        ("not tied", False),
        ("heads == 32", True),
        ("heads != 32", False),
        ("1 < heads <= 32", True),
        ("1 < heads < 32 < 64", False),
        ("act in ['silu', 'swish']", True),
        ("act not in ['gelu']", True),
        ("'b' in ('a', 'b')", True),
        ("head_dim is none", True),
        ("head_dim is not None", False),
        ("tied == true", True),
        ("false", False),
        ("1 if tied else 2", 1),
        ("1 if not tied else 2", 2),
        ("types[1]", "sliding"),
        ("types[-1] == 'full'", True),
        ("rope.type", "llama3"),
        ("rope.nested.x + 1", 2),
        ("rope['factor']", 8.0),
        ("len(types)", 3),
        ("min(heads, 8)", 8),
        ("max(heads, 8, 64)", 64),
        ("range(3)", [0, 1, 2]),
        ("range(1, 7, 2)", [1, 3, 5]),
        ("[0, heads]", [0, 32]),
        ("optional(missing)", None),
        ("optional(missing) or 5", 5),
        ("optional(rope.missing)", None),
        ("optional(missing.deep.er)", None),
        ("optional(heads)", 32),
        ("'missing' if optional(missing) == none else 'there'", "missing"),
        ("tied or missing", True),
        ("  heads  ", 32),
    ],
)
def test_an_expression_has_the_value_that_python_would_give(text: str, value: Any) -> None:
    found = parse(text).evaluate(CONFIG)
    assert found == value
    assert type(found) is type(value)


def test_an_expression_knows_the_names_that_it_reads() -> None:
    assert parse("a.b + c[d] if optional(e) else max(f, 1) in [g, true]").names == set("acdefg")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1 +",
        "heads heads",
        "a = 1",
        "heads ** 2",
        "heads << 2",
        "heads | 1",
        "~heads",
        "heads @ heads",
        "open('x')",
        "__import__('os')",
        "heads.bit_length()",
        "print(1)",
        "len(obj=1)",
        "len(*types)",
        "optional(1)",
        "optional(heads, 1)",
        "optional(types[9])",
        "optional(optional(heads))",
        "eval",
        "lambda: 1",
        "[x for x in types]",
        "{x for x in types}",
        "{'a': 1}",
        "{1}",
        "(x := 1)",
        "f'{heads}'",
        "b'bytes'",
        "1j",
        "...",
        "types[0:1]",
        "[*types]",
        "await heads",
        "yield",
        "heads; hidden",
        "heads\x00",
    ],
)
def test_what_is_no_arithmetic_is_refused(text: str) -> None:
    if text == "eval":  # just a name, like any other that the config does not have
        with pytest.raises(MissingField):
            parse(text).evaluate(CONFIG)
        return
    with pytest.raises(ExpressionError, match="expression"):
        parse(text)


def test_a_refusal_has_the_column_of_what_is_not_allowed() -> None:
    with pytest.raises(ExpressionError, match="'f\\(1\\)' is not allowed") as caught:
        parse("1 + f(1)")
    assert caught.value.column == 4


@pytest.mark.parametrize("text", ["heads.__class__", "act.__class__.__mro__", "types.append", "act.upper", "rope.keys"])
def test_a_dot_never_reaches_an_attribute_of_an_object(text: str) -> None:
    with pytest.raises(MissingField):
        parse(text).evaluate(CONFIG)


@pytest.mark.parametrize(
    "text",
    [
        "act * 3",
        "3 * act",
        "act + act",
        "types * 2",
        "types + types",
        "act % 3",
        "tied + 1",
        "head_dim + 1",
        "rope + 1",
        "-act",
        "heads // count",
        "heads % 0",
        "heads / 0",
        "act < 3",
        "act in none",
        "types[9]",
        "types[act]",
        "rope['missing']",
        "heads[0]",
        "len(heads)",
        "min()",
        "max(act, 1)",
        "range(act)",
        "range()",
        "range(0, 4, 0)",
        "range(1.5)",
    ],
)
def test_what_has_no_value_is_refused_and_raises_nothing_else(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse(text).evaluate(CONFIG)


def test_integers_have_a_bound() -> None:
    assert parse(f"{MAX_INTEGER} - 1").evaluate({}) == MAX_INTEGER - 1
    with pytest.raises(ExpressionError, match="a number larger than"):
        parse(" * ".join(["9999999999"] * 30)).evaluate({})


def test_a_range_has_a_bound() -> None:
    with pytest.raises(ExpressionError, match="a range beyond 1,048,576"):
        parse(f"range({MAX_RANGE + 1})").evaluate({})
    with pytest.raises(ExpressionError, match="a range beyond"):
        parse(f"range(-{MAX_RANGE + 1}, 0)").evaluate({})


def test_an_expression_has_a_bound_on_its_length() -> None:
    assert parse("1" + " " * 10_000).evaluate({}) == 1
    with pytest.raises(ExpressionError, match=f"may have {MAX_LENGTH} characters"):
        parse("+".join(["1"] * MAX_LENGTH))


@pytest.mark.parametrize("text", ["(" * 190 + "1" + ")" * 190, "-" * 390 + "1", "not " * 90 + "1", "1" + "+1" * 190])
def test_deep_nesting_does_not_break_the_parser(text: str) -> None:
    try:
        parse(text).evaluate({})
    except ExpressionError:
        return  # CPython's own parser has a bound on nesting too


def test_a_missing_name_is_told_with_its_column() -> None:
    with pytest.raises(MissingField, match="there is no config field or size named 'missing'") as caught:
        parse("heads + missing").evaluate(CONFIG)
    assert (caught.value.name, caught.value.column) == ("missing", 8)


def test_a_missing_name_that_is_not_needed_is_no_error() -> None:
    assert parse("1 if tied else missing").evaluate(CONFIG) == 1
    assert parse("count and missing").evaluate(CONFIG) == 0


def test_a_nested_field_that_is_missing_is_told_whole() -> None:
    with pytest.raises(MissingField, match=r"named 'rope\.nested\.y'"):
        parse("rope.nested.y").evaluate(CONFIG)


def test_optional_hides_only_what_is_missing() -> None:
    with pytest.raises(ExpressionError):
        parse("optional(missing) + 1").evaluate(CONFIG)


@given(st.text(alphabet="ab1 +-*/%()[]<>=!.,'\"\\{}:#\n\t_@&|~^;", max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parse(text).evaluate({"a": 3, "b": [1, {"a": "a"}], "ab": "b"})
    except ExpressionError:
        return
