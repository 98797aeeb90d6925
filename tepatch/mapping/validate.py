"""Holding a document against the schema, and saying what does not fit in the words of a mapping's author."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from tepatch.errors import MappingError, Problem
from tepatch.mapping import schema
from tepatch.mapping.document import Document, Loc

_FORMS: dict[str, type[BaseModel]] = {**schema.OPERATIONS, "requirement": schema.Requirement}
"""What has keys of its own, by the tag that an error's place has."""


def validate(document: Document) -> schema.MappingFile:
    """The document as a ``MappingFile``. Raises ``MappingError`` with every place where it is not one."""
    data = document.data
    if not isinstance(data, dict):
        raise MappingError(Problem(where=document.where(()), what="a mapping file is a YAML mapping"))
    # Before anything else: of another version, nothing but the version can be judged.
    if type(data.get("version")) is not int or data["version"] != schema.SCHEMA_VERSION:
        raise MappingError(
            Problem(
                where=document.where(("version",), 0 if "version" in data else None),
                what="unknown version of the mapping language",
                expected=f"version: {schema.SCHEMA_VERSION}",
                found=repr(data.get("version", "no version")),
            )
        )
    try:
        return schema.MappingFile.model_validate(data)
    except ValidationError as error:
        # A number, or an expression, gives one error for each type that a value is not: they become one.
        raise MappingError(dict.fromkeys(_explain(document, dict(item)) for item in error.errors())) from None


def _explain(document: Document, error: dict[str, Any]) -> Problem:
    kind, tags = error["type"], [part for part in error["loc"] if _is_tag(part)]
    loc: Loc = tuple(part for part in error["loc"] if not _is_tag(part))
    form = _FORMS.get(tags[-1].strip("<>"), schema.MappingFile) if tags else schema.MappingFile
    if kind == "missing":
        return Problem(where=document.where(loc[:-1]), what=f"'{loc[-1]}' is missing")
    if kind == "extra_forbidden" and form in schema.OPERATIONS.values() and loc[-1] in schema.REMOVED:
        return _removed(document, loc, str(loc[-1]), error["input"])
    if kind == "extra_forbidden":
        if loc[:-1] and loc[-2] in ("take", "pad"):
            form = schema.Take if loc[-2] == "take" else schema.Pad
        known = [field.alias or name for name, field in form.model_fields.items()]
        return Problem(where=document.where(loc), what=f"unknown key '{loc[-1]}'", fix=suggest(str(loc[-1]), known))
    if kind == "union_tag_invalid" and isinstance(error["input"], dict) and "tie" in error["input"]:
        return _removed(document, (*loc, "tie"), "tie", error["input"]["tie"])
    if kind == "union_tag_invalid":
        return Problem(
            where=document.where(loc),
            what="not an operation",
            expected="a tensor name, or one of " + ", ".join(schema.OPERATIONS),
            found=_short(error["input"]),
            fix=_misspelt_operation(error["input"]),
        )
    exact = loc
    while loc and loc not in document.values:  # pydantic adds the type that it tried
        loc = loc[:-1]
    what = error["msg"] if loc == exact else "must be a number or an expression"
    return Problem(where=document.where(loc, 0), what=f"{_spell(loc)}: {what}", found=_short(error["input"]))


def _removed(document: Document, loc: Loc, key: str, value: object) -> Problem:
    fix = schema.REMOVED[key].format(value=_short(value).strip("'"))
    return Problem(where=document.where(loc), what=f"'{key}' is no longer in the language", fix=fix)


def _is_tag(part: str | int) -> bool:
    return isinstance(part, str) and part in schema.TAGS


def _spell(loc: Loc) -> str:
    return f"'{loc[-1]}'" if isinstance(loc[-1], str) else f"item {loc[-1] + 1} of '{loc[-2]}'"


def _misspelt_operation(value: Any) -> str:
    for key in value if isinstance(value, dict) else ():
        if close := schema.misspelt(str(key)):
            return f"'{key}' is not an operation; did you mean '{close}'?"
    return "no key is an operation" if isinstance(value, dict) else ""


def suggest(word: str, known: list[str]) -> str:
    """What to do about a word that is none of ``known``."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(known)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
