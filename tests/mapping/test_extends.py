"""One mapping as another plus a few lines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tepatch.errors import MappingError, Problem
from tepatch.mapping import Mapping, parse_mapping, read_mapping

BASE = """version: 1
captures: {layer: num_layers}
sizes: {d: 4}
requires:
  - act == 'silu': only silu
  - bias == false: no biases
  - even: {that: size % 2 == 0, else: no odd sizes}
ignore:
  - old: not needed
parameters:
  a: same
  b: same
  layers.{layer}:
    c: same
"""


@pytest.fixture
def child(tmp_path: Path) -> Callable[[str], Mapping]:
    """Reads a mapping of this text that extends ``base.yaml``."""
    (tmp_path / "base.yaml").write_text(BASE)

    def read(text: str, extends: str = "base.yaml") -> Mapping:
        path = tmp_path / "child.yaml"
        path.write_text(f"version: 1\nextends: {extends}\n{text}")
        return read_mapping(path)

    return read


def refusal(child: Callable[..., Mapping], text: str, **kwargs: str) -> Problem:
    with pytest.raises(MappingError) as caught:
        child(text, **kwargs)
    (problem,) = caught.value.problems
    return problem


def test_everything_is_inherited(child: Callable[[str], Mapping]) -> None:
    mapping = child("parameters: {}\n")
    assert mapping.name == "child.yaml"
    assert [rule.target.text for rule in mapping.rules] == ["a", "b", "layers.{layer}.c"]
    assert [rule.where for rule in mapping.rules] == ["base.yaml:11:3", "base.yaml:12:3", "base.yaml:14:5"]
    assert [str(item.condition) for item in mapping.requires] == [
        "act == 'silu'",
        "bias == false",
        "size % 2 == 0",
    ]
    assert [item.reason for item in mapping.ignored] == ["not needed"]
    assert list(mapping.captures) == ["layer"]
    assert str(mapping.sizes["d"]) == "4"


def test_a_rule_overrides_the_inherited_one_of_the_same_target(child: Callable[[str], Mapping]) -> None:
    mapping = child("parameters:\n  a: z\n  layers.{layer}.c: w\n")
    assert {rule.target.text: rule.where for rule in mapping.rules} == {
        "a": "child.yaml:4:3",
        "b": "base.yaml:12:3",
        "layers.{layer}.c": "child.yaml:5:3",
    }


def test_null_removes_an_inherited_rule(child: Callable[[str], Mapping]) -> None:
    assert [rule.target.text for rule in child("parameters: {b: null}\n").rules] == ["a", "layers.{layer}.c"]
    assert [rule.target.text for rule in child("parameters:\n  layers.{layer}:\n    c:\n").rules] == ["a", "b"]


def test_null_for_a_rule_that_is_not_inherited_is_refused(child: Callable[[str], Mapping]) -> None:
    problem = refusal(child, "parameters:\n  bb: null\n")
    assert (problem.where, problem.what) == ("child.yaml:4:3", "nothing to remove: no inherited rule for 'bb'")


def test_sizes_captures_and_sentences_can_be_overridden(child: Callable[[str], Mapping]) -> None:
    mapping = child("captures: {layer: 7}\nsizes: {d: 8}\nrequires: [{act == 'silu': other words}]\nparameters: {}\n")
    assert str(mapping.captures["layer"]) == "7"
    assert str(mapping.sizes["d"]) == "8"
    assert [item.sentence for item in mapping.requires] == ["other words", "no biases", "no odd sizes"]


def test_null_drops_an_inherited_requirement(child: Callable[[str], Mapping]) -> None:
    mapping = child("requires: [{bias == false: null}, {even: null}]\nparameters: {}\n")
    assert [str(item.condition) for item in mapping.requires] == ["act == 'silu'"]


def test_a_named_requirement_is_replaced_by_its_name(child: Callable[[str], Mapping]) -> None:
    mapping = child("requires: [{even: {that: size % 4 == 0, else: whole fours}}]\nparameters: {}\n")
    assert [(item.name, str(item.condition), item.sentence) for item in mapping.requires[1:]] == [
        ("", "bias == false", "no biases"),
        ("even", "size % 4 == 0", "whole fours"),
    ]


def test_a_named_requirement_has_its_condition_as_well(child: Callable[[str], Mapping]) -> None:
    mapping = child("requires: [{size % 2 == 0: other words}]\nparameters: {}\n")
    assert [(item.name, item.sentence) for item in mapping.requires[2:]] == [("even", "other words")]
    mapping = child("requires: [{size % 2 == 0: null}]\nparameters: {}\n")
    assert [str(item.condition) for item in mapping.requires] == ["act == 'silu'", "bias == false"]


def test_a_name_goes_before_a_condition_of_the_same_text(child: Callable[..., Mapping], tmp_path: Path) -> None:
    both = "  - other: {that: even, else: an evenness}\n"
    (tmp_path / "base.yaml").write_text(BASE.replace("  - even:", f"{both}  - even:"))
    mapping = child("requires: [{even: null}]\nparameters: {}\n")
    assert [item.name for item in mapping.requires] == ["", "", "other"]


def test_a_sentence_alone_is_none_for_a_named_requirement(child: Callable[[str], Mapping]) -> None:
    problem = refusal(child, "requires:\n  - even: other words\nparameters: {}\n")
    assert (problem.where, problem.what) == ("child.yaml:4:5", "'even' is the name of a requirement")
    assert problem.fix == "write 'name: {that: condition, else: sentence}', or 'condition: sentence'"


def test_null_for_a_requirement_that_is_not_inherited_is_refused(child: Callable[[str], Mapping]) -> None:
    problem = refusal(child, "requires:\n  - bias != true:\nparameters: {}\n")
    assert problem.where == "child.yaml:4:5"
    assert problem.what == "nothing to drop: no inherited requirement 'bias != true'"
    assert problem.fix == "did you mean 'bias == false'?"


def test_a_misspelt_name_of_a_requirement_is_told_with_the_right_one(child: Callable[[str], Mapping]) -> None:
    problem = refusal(child, "requires:\n  - evne:\nparameters: {}\n")
    assert (problem.where, problem.what) == ("child.yaml:4:5", "nothing to drop: no inherited requirement 'evne'")
    assert problem.fix == "did you mean 'even'?"


def test_nothing_can_be_dropped_of_nothing() -> None:
    with pytest.raises(MappingError) as caught:
        parse_mapping("version: 1\nrequires: [{a: null}]\nparameters: {}\n")
    assert [problem.fix for problem in caught.value.problems] == [""]


def test_an_inherited_capture_can_not_become_a_size(child: Callable[[str], Mapping]) -> None:
    assert "'layer' is a capture and a size" in refusal(child, "sizes: {layer: 3}\nparameters: {}\n").what


def test_the_digest_covers_what_is_extended(child: Callable[[str], Mapping], tmp_path: Path) -> None:
    before = child("parameters: {}\n").digest
    (tmp_path / "base.yaml").write_text(BASE + "  e: same\n")
    assert child("parameters: {}\n").digest != before


def test_what_is_wrong_in_the_extended_file_is_told_with_its_name(
    child: Callable[[str], Mapping], tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text(BASE + "  a..b: same\n")
    assert refusal(child, "parameters: {}\n").where == "base.yaml:15:3"


def test_a_file_can_not_extend_itself(child: Callable[..., Mapping]) -> None:
    problem = refusal(child, "parameters: {}\n", extends="child.yaml")
    assert (problem.where, problem.what) == ("child.yaml:2:10", "'child.yaml' extends itself")


def test_a_circle_of_files_is_refused(child: Callable[[str], Mapping], tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("version: 1\nextends: child.yaml\nparameters: {}\n")
    assert refusal(child, "parameters: {}\n").what == "'child.yaml' extends itself"


def test_a_link_does_not_hide_a_circle(child: Callable[[str], Mapping], tmp_path: Path) -> None:
    (tmp_path / "alias.yaml").symlink_to("base.yaml")
    (tmp_path / "base.yaml").write_text("version: 1\nextends: alias.yaml\nparameters: {}\n")
    assert refusal(child, "parameters: {}\n").what == "'alias.yaml' extends itself"


def test_a_missing_file_is_refused(child: Callable[..., Mapping], tmp_path: Path) -> None:
    problem = refusal(child, "parameters: {}\n", extends="bsae.yaml")
    assert problem.what == "there is no mapping 'bsae.yaml'"
    assert problem.found == str(tmp_path / "bsae.yaml")


@pytest.mark.parametrize("extends", ["../base.yaml", "/etc/base.yaml", "sub/../../base.yaml", "tepatch:../base.yaml"])
def test_a_file_outside_the_folder_is_refused(child: Callable[..., Mapping], extends: str) -> None:
    assert refusal(child, "parameters: {}\n", extends=extends).what == f"'{extends}' leaves its folder"


def test_a_file_of_a_package_can_be_extended(
    child: Callable[..., Mapping], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "elsewhere" / "some_mappings"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "base.yaml").write_text(BASE)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    assert len(child("parameters: {}\n", extends="'some_mappings:base.yaml'").rules) == 3
    problem = refusal(child, "parameters: {}\n", extends="'some_mappings:other.yaml'")
    assert problem.what == "there is no mapping 'some_mappings:other.yaml'"


def test_the_decoders_mapping_is_extended_without_torch(tmp_path: Path) -> None:
    (tmp_path / "child.yaml").write_text("version: 1\nextends: tepatch.te:decoder.tepatch.yaml\nparameters: {}\n")
    program = (
        "import sys; from tepatch.mapping import read_mapping; print(len(read_mapping(sys.argv[1]).rules),"
        "sorted({'torch', 'transformers', 'transformer_engine'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "child.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "8 []"


@pytest.mark.parametrize("package", ["no_such_package", "no.such.package", ""])
def test_a_package_that_is_not_there_is_refused(child: Callable[..., Mapping], package: str) -> None:
    problem = refusal(child, "parameters: {}\n", extends=f"'{package}:base.yaml'")
    assert problem.what.startswith(f"can not find package '{package}'")


def test_text_without_a_folder_can_not_extend_a_file() -> None:
    with pytest.raises(MappingError, match=r"'base\.yaml' needs a file to be relative to"):
        parse_mapping("version: 1\nextends: base.yaml\nparameters: {}\n")


def test_text_with_a_folder_can(child: Callable[[str], Mapping], tmp_path: Path) -> None:
    mapping = parse_mapping("version: 1\nextends: base.yaml\nparameters: {}\n", folder=tmp_path)
    assert len(mapping.rules) == 3


def test_extends_with_nothing_behind_it_is_refused(child: Callable[..., Mapping]) -> None:
    assert refusal(child, "parameters: {}\n", extends="").what == "'extends' has no value"
