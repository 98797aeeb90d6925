"""YAML with positions, and without its traps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tepatch.errors import MappingError
from tepatch.mapping.document import MAX_BYTES, MAX_DEPTH, parse_document, read_document


def refusal(text: str) -> str:
    with pytest.raises(MappingError) as caught:
        parse_document(text, name="m.yaml")
    return str(caught.value)


def test_every_value_knows_its_line_and_column() -> None:
    document = parse_document("a: 1\nb:\n  - x\n  - {c: d}\n", name="m.yaml")
    assert document.data == {"a": 1, "b": ["x", {"c": "d"}]}
    assert document.where(()) == "m.yaml:1:1"
    assert document.where(("a",)) == "m.yaml:1:1"
    assert document.where(("a",), 0) == "m.yaml:1:4"
    assert document.where(("b", 0)) == "m.yaml:3:5"
    assert document.where(("b", 1, "c")) == "m.yaml:4:6"
    assert document.where(("b", 1, "c"), 0) == "m.yaml:4:9"


def test_a_place_that_has_no_position_is_reported_at_what_encloses_it() -> None:
    document = parse_document("a:\n  b: 1\n", name="m.yaml")
    assert document.where(("a", "b", "missing", 3)) == "m.yaml:2:3"


def test_a_column_in_a_quoted_text_counts_from_behind_the_quote() -> None:
    document = parse_document("a: 'x + ?'\n", name="m.yaml")
    assert document.where(("a",), 4) == "m.yaml:1:9"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("True", "True"),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("0", 0),
        ("10", 10),
        ("-3", -3),
        ("010", "010"),
        ("0o17", "0o17"),
        ("0x1f", "0x1f"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1e5", 1e5),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-2.5e-3", -2.5e-3),
        ("1e5000", "1e5000"),
        (".inf", ".inf"),
        (".nan", ".nan"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("'10'", "10"),
        ('"true"', "true"),
        ("'null'", "null"),
        ("|-\n  true", "true"),
        (">-\n  two\n  lines", "two lines"),
        ("{layer}", {"layer": None}),
        ("=", "="),
    ],
)
def test_a_scalar_is_what_it_looks_like(text: str, value: Any) -> None:
    found = parse_document(f"key: {text}\n").data["key"]
    assert found == value
    assert type(found) is type(value)


def test_a_key_is_text_whatever_it_looks_like() -> None:
    assert parse_document("1: a\ntrue: b\nnull: c\n").data == {"1": "a", "true": "b", "null": "c"}


def test_a_syntax_error_is_reported_at_its_place() -> None:
    assert refusal("a: [1, 2\nb: 3\n").startswith("m.yaml:2:")
    assert "not valid YAML" in refusal("a: [1, 2\nb: 3\n")
    assert "not valid YAML" in refusal("a: 'never closed\n")


def test_a_character_that_yaml_does_not_allow_is_refused() -> None:
    assert "not valid YAML" in refusal("a: \x01\n")


def test_a_duplicate_key_is_refused_with_both_lines() -> None:
    assert refusal("a: 1\nb: 2\na: 3\n") == "m.yaml:3:1: duplicate key 'a'\n  found:    first on line 1"


def test_all_duplicate_keys_are_reported_at_once() -> None:
    with pytest.raises(MappingError) as caught:
        parse_document("a: 1\na: 2\nb: {c: 1, c: 2}\n")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system [ls]", "!!str 1", "!local x", "!<tag:x,2000:y> z"])
def test_tags_are_refused(tag: str) -> None:
    message = refusal(f"a: {tag}\n")
    assert message.startswith("m.yaml:1:4: the tag '")


@pytest.mark.parametrize("text", ["a: &x 1\n", "a: &x [1]\nb: *x\n", "a: &x {b: 1}\n", "<<: &x {b: 1}\n"])
def test_anchors_and_aliases_are_refused(text: str) -> None:
    assert "anchors and aliases are not allowed" in refusal(text)


def test_a_bomb_of_aliases_is_refused_before_it_is_built() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    assert "anchors and aliases are not allowed" in refusal("\n".join(lines))


def test_a_second_document_is_refused() -> None:
    assert refusal("a: 1\n---\nb: 2\n").startswith("m.yaml:2:1: a mapping file has one document")


def test_the_markers_of_a_single_document_are_allowed() -> None:
    assert parse_document("%YAML 1.1\n---\na: 1\n...\n").data == {"a": 1}


def test_nesting_has_a_bound() -> None:
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_document(deepest).data is not None
    assert f"deeper than {MAX_DEPTH} levels" in refusal(f"[{deepest}]")
    # Newer versions of PyYAML have a bound of their own, and meet it while they scan.
    assert re.search(f"deeper than {MAX_DEPTH} levels|nesting depth", refusal("[" * 100_000))


def test_the_size_of_a_text_has_a_bound() -> None:
    assert parse_document("a: 1\n" + "#" * (MAX_BYTES - 5)).data == {"a": 1}
    assert "a mapping may have" in refusal("a: 1\n" + "#" * MAX_BYTES)


def test_a_file_over_the_cap_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    with path.open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)  # nul bytes: had they been parsed, the message would be about YAML
    with pytest.raises(MappingError, match=f"the file is larger than {MAX_BYTES} bytes"):
        read_document(path)


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n"])
def test_an_empty_file_is_refused(text: str) -> None:
    assert refusal(text) == "m.yaml: the file is empty"


def test_a_key_that_is_no_text_is_refused_with_its_place() -> None:
    assert refusal("a: 1\n? [x, y]\n: 2\n") == "m.yaml:2:3: a key must be text"
    assert refusal("{layer}.x: 1\n").startswith("m.yaml:1:")


def test_a_file_that_is_not_utf8_is_refused_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"a: caf\xe9\n")
    with pytest.raises(MappingError, match=r"latin\.yaml: the file is not UTF-8: .* at byte 6"):
        read_document(path)


def test_a_file_that_is_not_there_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="can not read the mapping: No such file"):
        read_document(tmp_path / "missing.yaml")
    with pytest.raises(MappingError, match="can not read the mapping"):
        read_document(tmp_path)


def test_a_byte_order_mark_and_other_line_ends_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: x\r\n")
    document = read_document(path)
    assert document.data == {"a": 1, "b": "x"}
    assert document.where(("b",)) == "windows.yaml:2:1"


def test_a_device_without_an_end_is_read_no_further_than_the_cap() -> None:
    with pytest.raises(MappingError, match="larger than"):
        read_document(Path("/dev/zero"))
