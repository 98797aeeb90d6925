"""Reading YAML with positions kept, and without YAML's traps.

PyYAML reads the syntax; this module builds the values itself, so that every value knows its line and column and
nothing surprising happens on the way: duplicate keys, tags, anchors and aliases are errors, only ``true`` and
``false`` are booleans, ``010`` and ``12:30`` are strings, and a file has one document of bounded size and depth.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tepatch.errors import MappingError, Problem

MAX_BYTES = 1 << 20
MAX_DEPTH = 40

Loc = tuple[str | int, ...]
"""The way from the top of a document to a value: keys and list positions."""

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})\Z")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]{1,3})?\Z")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser where PyYAML was built with it


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML file as plain data, and where each value stands."""

    name: str
    """The file's name as messages show it."""
    text: str
    data: Any
    marks: dict[Loc, tuple[int, int]] = field(repr=False)
    """Line and column (from 1) of each value; of the key for the entries of a mapping."""
    values: dict[Loc, tuple[int, int]] = field(repr=False)
    """Line and column (from 1) of each value proper, without the quote of a quoted text."""

    def where(self, loc: Loc, column: int | None = None) -> str:
        """``file:line:column`` of the nearest enclosing value that has a position.

        With ``column``, that many characters into the value itself instead of its key.
        """
        marks = self.marks if column is None else self.values
        while loc and loc not in marks:
            loc = loc[:-1]
        line, start = marks.get(loc, (1, 1))
        return f"{self.name}:{line}:{start + (column or 0)}"


def read_document(path: Path, *, name: str | None = None) -> Document:
    """Read one YAML file. Raises ``MappingError`` with positions for everything that is wrong in its syntax."""
    name = name or path.name
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)  # not by its size: a device or a pipe has none
    except OSError as error:
        raise _error(str(path), f"can not read the mapping: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise _error(name, f"the file is larger than {MAX_BYTES} bytes, which is all that a mapping may have")
    try:
        return parse_document(raw.decode("utf-8"), name=name)
    except UnicodeDecodeError as error:
        raise _error(name, f"the file is not UTF-8: {error.reason} at byte {error.start}") from error


def parse_document(text: str, *, name: str = "<mapping>") -> Document:
    """Parse YAML text. Raises ``MappingError`` as ``read_document`` does."""
    if len(text) > MAX_BYTES:
        raise _error(name, f"the text has {len(text)} characters, a mapping may have {MAX_BYTES}")
    try:
        _scan(text, name)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise MappingError(Problem(where=where, what=f"not valid YAML: {error.problem or error}")) from None
    except yaml.YAMLError as error:
        raise _error(name, f"not valid YAML: {error}") from None
    if root is None:
        raise _error(name, "the file is empty")
    builder = _Builder(name)
    data = builder.build(root, ())
    if builder.problems:
        raise MappingError(builder.problems)
    return Document(name, text, data, builder.marks, builder.values)


def _error(where: str, what: str) -> MappingError:
    return MappingError(Problem(where=where, what=what))


def _scan(text: str, name: str) -> None:
    """Refuse what a mapping never needs before anything is built from it."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        mark = event.start_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _error(where, "anchors and aliases are not allowed in a mapping")
        if (tag := getattr(event, "tag", None)) is not None:
            raise _error(where, f"the tag '{tag}' is not allowed in a mapping")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _error(where, "a mapping file has one document, a second begins here")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _error(where, f"nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Builder:
    def __init__(self, name: str) -> None:
        self.name = name
        self.problems: list[Problem] = []
        self.marks: dict[Loc, tuple[int, int]] = {}
        self.values: dict[Loc, tuple[int, int]] = {}

    def build(self, node: yaml.Node, loc: Loc) -> Any:
        position = (node.start_mark.line + 1, node.start_mark.column + 1)
        self.marks.setdefault(loc, position)
        self.values[loc] = position
        if isinstance(node, yaml.ScalarNode):
            if node.style in ("'", '"'):
                self.values[loc] = (position[0], position[1] + 1)
            self._check_printable(node.value, position)
            return self._scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*loc, index)) for index, item in enumerate(node.value)]
        return self._mapping(node, loc)

    def _mapping(self, node: yaml.Node, loc: Loc) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
            where = f"{self.name}:{line}:{column}"
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(where=where, what="a key must be text"))
                continue
            key = key_node.value
            self._check_printable(key, (line, column))
            if key in out:
                first = self.marks[(*loc, key)][0]
                self.problems.append(
                    Problem(where=where, what=f"duplicate key '{key}'", found=f"first on line {first}")
                )
                continue
            self.marks[(*loc, key)] = (line, column)
            out[key] = self.build(value_node, (*loc, key))
        return out

    def _check_printable(self, text: str, position: tuple[int, int]) -> None:
        """A quoted text may spell any character: a name is then no longer what it looks like."""
        if not text.replace("\n", "").isprintable():
            where = f"{self.name}:{position[0]}:{position[1]}"
            what = "this text holds characters that can not be printed"
            self.problems.append(Problem(where=where, what=what, found=ascii(text)[:80]))

    @staticmethod
    def _scalar(node: yaml.ScalarNode) -> Any:
        text = node.value
        if node.style not in (None, ""):  # quoted or block text is text
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INTEGER.match(text):
            return int(text)
        return float(text) if _FLOAT.match(text) else text
