"""The reference pages can not fall behind: what exists is on them, and what is on them exists."""

from __future__ import annotations

import dataclasses
import inspect
import re
import runpy
import typing
from pathlib import Path
from typing import Any

import pytest

import tepatch
from tepatch import errors, hookspecs, views
from tepatch.mapping import document, expressions, parse_mapping, rules, schema, values
from tepatch.plugins import DISABLE_VARIABLE, ENTRY_POINT_GROUP, Status
from tepatch.te import Modules

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"
MODELS = (schema.MappingFile, schema.Take, schema.Pad, *schema.OPERATIONS.values())
FIELDS = sorted({field for model in MODELS for field in model.model_fields})
# Besides the keys: forms that have no key of their own, and modifiers with a section.
SECTIONS = ("rename", "axes", "transpose", "take", "offset", "scale", "pad")
HEAD = "version: 1\ncaptures: {layer: num_hidden_layers, expert: num_experts}\nparameters:\n"


def text_of(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


def blocks_of(name: str, language: str) -> list[Any]:
    script = runpy.run_path(str(ROOT / "scripts" / "run_docs.py"))
    return [block for block in script["blocks"](text_of(name)) if block.language == language]


@pytest.mark.parametrize("field", FIELDS)
def test_the_mapping_reference_has_every_key_of_the_language(field: str) -> None:
    assert f"`{field}`" in text_of("mapping.md")


@pytest.mark.parametrize("operation", sorted({*schema.OPERATIONS, *SECTIONS} - {"of", "same"}))
def test_every_operation_has_a_section_with_a_picture_and_an_example(operation: str) -> None:
    section = re.search(rf"^### {operation}\n(.*?)(?=^##|\Z)", text_of("mapping.md"), re.MULTILINE | re.DOTALL)
    assert section is not None
    assert re.search(r"!\[[^\]]+\]\(\.\./images/[\w-]+\.svg\)", section[1])
    assert "```yaml" in section[1]


def test_every_function_of_expressions_is_in_the_mapping_reference() -> None:
    page = text_of("mapping.md")
    assert [name for name in (*expressions._FUNCTIONS, "optional") if f"`{name}(" not in page] == []


def test_the_limits_in_the_mapping_reference_are_those_of_the_code() -> None:
    page = " ".join(text_of("mapping.md").split())
    assert f"{document.MAX_BYTES >> 20} MiB, nested {document.MAX_DEPTH} deep" in page
    assert (
        f"{expressions.MAX_LENGTH} characters; whole numbers up to 2^{expressions.MAX_INTEGER.bit_length() - 1}" in page
    )
    assert f"`range` up to 2^{expressions.MAX_RANGE.bit_length() - 1}" in page
    assert f"a count of 2^{values.MAX_DOMAIN.bit_length() - 1}" in page
    assert f"in one rule | {rules.MAX_ALTERNATIVES} |" in page
    assert f"2^{views.MAX_CELLS.bit_length() - 1} cells" in page


def test_every_example_in_the_mapping_reference_can_be_read() -> None:
    examples = blocks_of("mapping.md", "yaml")
    assert len(examples) > 20
    for block in examples:
        is_whole = re.search(r"^version:", block.body, re.MULTILINE)
        text = block.body if is_whole else HEAD + "".join(f"  {line}\n" for line in block.body.splitlines())
        parse_mapping(text, name=f"mapping.md:{block.line}")


@pytest.mark.parametrize("hook", [name for name in vars(hookspecs) if name.startswith("tepatch_")])
def test_every_hook_is_documented_with_its_arguments(hook: str) -> None:
    arguments = ", ".join(inspect.signature(getattr(hookspecs, hook)).parameters)
    assert f"\n### {hook}({arguments})\n" in text_of("plugins.md")


def test_every_field_of_a_patch_and_every_module_of_a_backend_is_documented() -> None:
    fields = [field.name for kind in (tepatch.Patch, Modules) for field in dataclasses.fields(kind)]
    assert [name for name in fields if f"`{name}`" not in text_of("plugins.md") and name != "default_device"] == []


def test_statuses_group_and_variable_are_documented() -> None:
    page = text_of("plugins.md")
    assert [
        name for name in (*typing.get_args(Status), ENTRY_POINT_GROUP, DISABLE_VARIABLE) if f"`{name}`" not in page
    ] == []


def test_the_table_of_errors_has_all_of_them_and_no_other() -> None:
    classes = {cls.__name__ for cls in vars(errors).values() if inspect.isclass(cls) and issubclass(cls, Exception)}
    listed = set(re.findall(r"^\| `(\w+Error)` \|", text_of("errors.md"), re.MULTILINE))
    assert listed == classes - {"TepatchError"}


def test_the_errors_page_shows_each_class_at_work() -> None:
    shown = {block.body.partition(":")[0] for block in blocks_of("errors.md", "text") if block.info == "output"}
    missing = {cls.__name__ for cls in errors.TepatchError.__subclasses__()} - shown
    assert missing == {"LoadError"}  # takes a file or a memory that fails half-way
