"""Tensor names with captures: ``model.layers.{layer}.mlp.experts.{expert}.w1.weight``.

Dots are dots and whole names match; there are no regular expressions in a mapping. Inside braces stands a
capture, or small arithmetic on captures (``{layer + 1}``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from tepatch.mapping.expressions import Expression, ExpressionError, parse

_PIECE = re.compile(r"\{([^{}]*)\}")
_RUN = r"[0-9]{1,18}(?:\.\.[0-9]{1,18})?"
_FOLDED = re.compile(rf"\{{({_RUN}(?:,{_RUN})*)\}}")
_NUMBER = r"(0|[1-9][0-9]{0,17})"
_LITERAL = re.compile(r"[A-Za-z0-9_.\-/]*\Z")


@dataclass(frozen=True)
class NameTemplate:
    """A tensor name with ``{captures}``, ready to be filled in."""

    text: str
    literals: tuple[str, ...]
    """Text around the braces: one more than ``fields``."""
    fields: tuple[Expression, ...]

    @cached_property
    def captures(self) -> frozenset[str]:
        return frozenset[str]().union(*(field.names for field in self.fields))

    @cached_property
    def _plain(self) -> str | None:
        """A ``str.format_map`` string, when every field is just a capture."""
        if any(field.names != {field.text} for field in self.fields):
            return None
        return self.text.replace(" ", "")

    def fill(self, captures: Mapping[str, object]) -> str:
        """The name with every field replaced by its value in ``captures``."""
        if self._plain is not None:
            return self._plain.format_map(captures) if self.fields else self.text
        out = [self.literals[0]]
        for field, literal in zip(self.fields, self.literals[1:], strict=True):
            out += [str(field.evaluate(captures)), literal]
        return "".join(out)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches names of this form with any numbers in the fields (used to explain, never to decide)."""
        out = re.escape(self.literals[0])
        for literal in self.literals[1:]:
            out += r"(\d+)" + re.escape(literal)
        return re.compile(out + r"\Z")

    def __str__(self) -> str:
        return self.text


def parse_name(text: str) -> NameTemplate:
    """Parse a name; raises ``ExpressionError`` if it is not one."""
    parts = _PIECE.split(text)
    literals, fields = tuple(parts[0::2]), tuple(parse(part) for part in parts[1::2])
    for literal in literals:
        if not _LITERAL.match(literal):
            raise ExpressionError(f"'{text}' is not a tensor name (letters, digits, '_', '.', '-', {{capture}})")
    if text.startswith(".") or text.endswith(".") or ".." in text or not text:
        raise ExpressionError(f"'{text}' is not a tensor name: an empty part between dots")
    for field in fields:
        if not field.names:
            raise ExpressionError(f"'{{{field}}}' names no capture")
    return NameTemplate(text, literals, fields)


def fold(names: Iterable[str], limit: int = 4) -> list[str]:
    """Names for a reader: runs of layer numbers folded (``model.layers.{0..31}.x``), the rest counted.

    >>> fold(["a.0.w", "a.1.w", "a.2.w", "b"])
    ['a.{0..2}.w', 'b']
    """
    groups: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        head, number, tail = _first_number(name)
        groups.setdefault((head, tail), []).append(number)
    out = []
    for (head, tail), numbers in groups.items():
        if numbers[0] == -1:
            out.append(head)
        else:
            middle = str(numbers[0]) if len(numbers) == 1 else f"{{{fold_numbers(numbers)}}}"
            out.append(f"{head}{middle}{tail}")
    return out if len(out) <= limit else [*out[:limit], f"... and {len(out) - limit} more"]


def listed(names: Collection[str], others: Collection[str] = ()) -> str:
    """All of ``names`` as a list in Python that ``meant_by`` reads: folded, or if many the modules without ``others``.

    >>> listed(["a.0.w", "a.1.w", "b"])
    "['a.{0..1}.w', 'b']"
    """
    short = _folded(names)
    if len(short) > 4 and others:
        taken = {path for name in others for path in _paths(name)}
        whole = (next((path for path in _paths(name) if path not in taken), name) for name in names)
        short = _folded(dict.fromkeys(whole))
    return repr(short)


def meant_by(text: str) -> Callable[[str], bool]:
    """Whether a name is meant by ``text``: that name, a module around it, or such names as ``fold`` writes them."""
    path = text.rstrip(".")
    literals, folded = _FOLDED.split(path)[0::2], _FOLDED.findall(path)
    pattern = re.compile(_NUMBER.join(map(re.escape, literals)) + r"(?:\..*)?\Z", re.DOTALL)
    ends = [[part.split("..") for part in each.split(",")] for each in folded]
    domains = [[range(int(each[0]), int(each[-1]) + 1) for each in parts] for parts in ends]

    def is_meant(name: str) -> bool:
        if not path or name == path or name.startswith(f"{path}."):
            return bool(path)
        if not domains or (match := pattern.match(name)) is None:
            return False
        return all(
            any(int(number) in each for each in domain) for number, domain in zip(match.groups(), domains, strict=True)
        )

    return is_meant


def fold_numbers(numbers: Iterable[int]) -> str:
    """Numbers for a reader, runs folded: ``0..31`` or ``3,7,9..11``."""
    out, ordered, start = [], sorted(set(numbers)), 0
    for index, number in enumerate(ordered):
        if index + 1 == len(ordered) or ordered[index + 1] != number + 1:
            out.append(str(number) if start == index else f"{ordered[start]}..{number}")
            start = index + 1
    return ",".join(out)


def _folded(names: Iterable[str]) -> list[str]:
    """All of ``names``, folded over layers, and over experts in them."""
    once = list(names)
    while (more := fold(once, limit=len(once))) != once:
        once = more
    return once


def _paths(name: str) -> Iterator[str]:
    """The modules that a tensor is in, the outermost first, and the tensor itself."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _first_number(name: str) -> tuple[str, int, str]:
    match = re.search(rf"(?<=\.){_NUMBER}(?=\.)", name)
    return (name, -1, "") if match is None else (name[: match.start()], int(match[0]), name[match.end() :])
