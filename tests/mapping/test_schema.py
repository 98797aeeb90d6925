"""The JSON Schema that editors use says the same as the reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tepatch.errors import MappingError
from tepatch.mapping import parse_mapping
from tepatch.mapping.schema import json_schema

jsonschema = pytest.importorskip("jsonschema")  # in the extra "dev": only a bare machine skips this

RULES = [
    "same",
    "b.c",
    "{of: b, scale: 2, offset: d}",
    "{of: {concat: [b, c]}, transpose: true}",
    "{concat: [b, {stack: c, over: expert}], sizes: [1, d], dim: 1}",
    "{interleave: [b, c], over: d}",
    "{any_of: [b, {concat: [c, d]}]}",
    "{create: 0}",
    "{create: 1.5}",
    "[{when: x, same: true}, b]",
    "{x: same, y: {z: {concat: [b, c]}}}",
    "null",
]
NO_RULES = [
    "5",
    "true",
    "{concat: [b]}",
    "{concat: [b, c], szies: [1]}",
    "{create: x}",
    "{of: b, cast: float32}",
    "{of: b, rope_permute: 2}",
    "{tie: b}",
    "[{when: x, tie: b}, same]",
    "{concat: [b, {tie: c}]}",
    "{of: b, pad: {vlaue: 1}}",
    "{stack: b}",
    "{concat: [b, {x: y}]}",
    "[]",
]


REQUIREMENTS = ["{a > 1: b}", "{a: null}", "{a: {that: b, else: c}}"]
NO_REQUIREMENTS = ["a", "{a: 1}", "{a: {that: b}}", "{a: {that: b, else: c, d: e}}", "{a: {that: b, else: null}}"]


def document(rule: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(f"version: 1\nparameters:\n  a: {rule}\n")
    return found


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_mappings_of_the_toolkit_and_of_llama_are_valid(validator: Any, pytestconfig: pytest.Config) -> None:
    for name in ("tepatch/te/decoder", "plugins/tepatch-llama/src/tepatch_llama/llama"):
        validator.validate(yaml.safe_load((pytestconfig.rootpath / f"{name}.tepatch.yaml").read_text()))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_is_read_is_valid(validator: Any, rule: str) -> None:
    validator.validate(document(rule))


@pytest.mark.parametrize("rule", NO_RULES)
def test_a_rule_that_is_refused_is_not_valid(validator: Any, rule: str) -> None:
    with pytest.raises(MappingError):
        parse_mapping(f"version: 1\nparameters:\n  a: {rule}\n")
    assert not validator.is_valid(document(rule))


@pytest.mark.parametrize("entry", REQUIREMENTS)
def test_a_requirement_of_any_form_is_valid(validator: Any, entry: str) -> None:
    validator.validate(yaml.safe_load(f"version: 1\nrequires: [{entry}]\nparameters: {{}}"))


@pytest.mark.parametrize("entry", NO_REQUIREMENTS)
def test_a_requirement_of_no_form_is_not_valid(validator: Any, entry: str) -> None:
    text = f"version: 1\nrequires: [{entry}]\nparameters: {{}}"
    with pytest.raises(MappingError):
        parse_mapping(text)
    assert not validator.is_valid(yaml.safe_load(text))


@pytest.mark.parametrize("text", ["version: 2\nparameters: {}", "version: 1", "version: 1\nparameters: {}\nx: 1"])
def test_a_file_of_another_form_is_not_valid(validator: Any, text: str) -> None:
    assert not validator.is_valid(yaml.safe_load(text))


def test_the_schema_is_the_same_in_every_process(tmp_path: Path) -> None:
    program = "import json; from tepatch.mapping.schema import json_schema; print(json.dumps(json_schema()))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert texts == {json.dumps(json_schema()) + "\n"}
