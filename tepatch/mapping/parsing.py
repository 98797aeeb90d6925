"""What every part of reading a mapping shares: parsing its small languages and noting what is wrong, with positions."""

from __future__ import annotations

from collections.abc import Iterable

from tepatch.errors import Problem
from tepatch.mapping.document import Document, Loc
from tepatch.mapping.expressions import ExpressionError, parse
from tepatch.mapping.names import NameTemplate, parse_name
from tepatch.mapping.rules import Located


class Parser:
    """Parses names and expressions of one document. Nothing is raised: problems are collected."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []
        self.captures: dict[str, Located] = {}
        """Every capture that names may use, with those of the mappings that this one extends."""

    def problem(self, loc: Loc, what: str, *, column: int | None = None, fix: str = "") -> None:
        """Note what is wrong at ``loc``; with ``column``, that many characters into the value."""
        self.problems.append(Problem(where=self.document.where(loc, column), what=what, fix=fix))

    def expression(self, value: int | float | str | None, loc: Loc) -> Located | None:
        """The expression at ``loc``; None if there is none or it is wrong."""
        if value is None:
            return None
        try:
            return Located(expression=parse(str(value)), where=self.document.where(loc, 0))
        except ExpressionError as error:
            self.problem(loc, str(error), column=error.column)
            return None

    def name(self, text: str, loc: Loc, *, bound: Iterable[str], column: int | None = None) -> NameTemplate | None:
        """The tensor name ``text``, whose captures must be among ``bound``; None if it is not a name.

        It is the key at ``loc``, or with ``column`` 0 the value.
        """
        try:
            name = parse_name(text)
        except ExpressionError as error:
            self.problem(loc, str(error), column=column)
            return None
        for capture in sorted(name.captures - set(bound)):
            known = capture in self.captures
            self.problem(
                loc,
                f"'{{{capture}}}' in '{name}' is not {'bound by the target' if known else 'a capture'}",
                column=column,
                fix="name it in the target or stack over it" if known else "define it under 'captures'",
            )
        return name
