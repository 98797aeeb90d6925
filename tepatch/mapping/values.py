"""What a mapping's expressions are worth for one config: captures, sizes and conditions."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as MappingABC
from typing import Any

from tepatch.errors import Problem
from tepatch.mapping.expressions import ExpressionError, MissingField
from tepatch.mapping.names import NameTemplate
from tepatch.mapping.rules import Located, Mapping

Env = dict[str, int]
"""Values of captures."""

MAX_DOMAIN = 1 << 20
"""Values that a capture may have."""


class BindError(Exception):
    """A rule does not fit; carries the ``Problem``."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class Scope(MappingABC[str, Any]):
    """Names as an expression sees them: captures, then sizes, then config fields."""

    def __init__(self, values: Values, captures: MappingABC[str, int]) -> None:
        self._values = values
        self._captures = captures

    def __getitem__(self, name: str) -> Any:
        if name in self._captures:
            return self._captures[name]
        if name in self._values.mapping.sizes:
            return self._values.size_by_name(name, self._captures)
        return self._values.config[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._captures)

    def __len__(self) -> int:
        return len(self._captures)


class Values:
    """A mapping together with a config. All evaluation of expressions happens here."""

    def __init__(self, mapping: Mapping, config: MappingABC[str, Any]) -> None:
        self.mapping = mapping
        self.config = config
        self._domains: dict[str, list[int]] = {}
        self._static: dict[str, Any] = {}
        self._evaluating: list[str] = []

    def value(self, located: Located, captures: MappingABC[str, int]) -> Any:
        """The value of an expression. Raises ``BindError`` naming the expression's place."""
        try:
            return located.expression.evaluate(Scope(self, captures))
        except MissingField as error:
            fix = "check the spelling, or write optional(...) if a config may lack it"
            raise BindError(Problem(where=located.where, what=str(error), found=f"'{located}'", fix=fix)) from None
        except ExpressionError as error:
            raise BindError(Problem(where=located.where, what=str(error))) from None

    def size(self, located: Located, captures: MappingABC[str, int]) -> int:
        """The value of an expression that must be a whole number, zero or more."""
        value = self.value(located, captures)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise BindError(Problem(where=located.where, what=f"'{located}' must be a whole number", found=repr(value)))
        return value

    def size_by_name(self, name: str, captures: MappingABC[str, int]) -> Any:
        """The value of one of the mapping's ``sizes``, which may depend on captures."""
        if name in self._static:
            return self._static[name]
        located = self.mapping.sizes[name]
        if name in self._evaluating:
            raise BindError(Problem(where=located.where, what=f"size '{name}' is defined by itself"))
        self._evaluating.append(name)
        try:
            value = self.value(located, captures)
        finally:
            self._evaluating.pop()
        if not self.reads({name}) & self.mapping.captures.keys():
            self._static[name] = value
        return value

    def domain(self, capture: str) -> list[int]:
        """The numbers a capture stands for. Raises ``BindError`` if its expression does not give any."""
        if capture not in self._domains:
            located = self.mapping.captures[capture]
            numbers = value = self.value(located, {})
            if type(value) is int and 0 <= value <= MAX_DOMAIN:
                numbers = list(range(value))
            if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
                raise BindError(
                    Problem(
                        where=located.where,
                        what=f"capture '{capture}' needs a count or a list of numbers",
                        found=f"{located} = {value!r}",
                    )
                )
            self._domains[capture] = numbers
        return self._domains[capture]

    def holds(self, located: Located, captures: MappingABC[str, int]) -> bool:
        """Whether a condition is true. Raises as ``value``."""
        return bool(self.value(located, captures))

    def name(self, template: NameTemplate, captures: MappingABC[str, int], where: str) -> str:
        """A name with its captures filled in. Raises ``BindError`` if arithmetic in it has no value."""
        try:
            return template.fill(captures)
        except ExpressionError as error:
            raise BindError(Problem(where=where, what=str(error), found=f"'{template}'")) from None

    def reads(self, names: set[str] | frozenset[str]) -> frozenset[str]:
        """``names`` with the sizes among them replaced by what they read."""
        out, todo = set[str](), list(names)
        while todo:
            name = todo.pop()
            if name not in out:
                out.add(name)
                if name in self.mapping.sizes:
                    todo += self.mapping.sizes[name].expression.names
        return frozenset(out)
