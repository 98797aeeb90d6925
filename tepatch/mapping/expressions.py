"""Safe arithmetic over a model's config: ``head_dim or hidden_size // num_attention_heads``.

Expressions look like Python and are parsed by Python's own parser, but evaluated here over a short list of
operations: no calls but ``optional``, ``len``, ``min``, ``max`` and ``range``, no attribute of any object (a dot
looks into a nested config field), no exponent, no strings built, bounded integers. A name that the config does not
have is an error wherever it stands, unless the expression says ``optional(name)``, which is then ``none``.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

Value = Any
"""int, float, bool, str, None, or a list or mapping of such."""

MAX_LENGTH = 400
MAX_INTEGER = 1 << 62
MAX_RANGE = 1 << 20

_BINARY: dict[type[ast.operator], Callable[[Value, Value], Value]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Value, Value], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.eq,
    ast.IsNot: operator.ne,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "len": len,
    "min": min,
    "max": max,
    "range": lambda *bounds: list(range(*bounds)),
}
_WORDS: dict[str, Value] = {"true": True, "false": False, "none": None}


class ExpressionError(ValueError):
    """An expression can not be parsed or evaluated. ``column`` counts from 0 inside the expression."""

    def __init__(self, message: str, column: int = 0) -> None:
        super().__init__(message)
        self.column = column


class MissingField(ExpressionError):
    """The expression needs a name that neither the config nor the mapping defines."""

    def __init__(self, name: str, column: int = 0) -> None:
        super().__init__(f"there is no config field or size named '{name}'", column)
        self.name = name


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed expression and the names it reads."""

    text: str
    tree: ast.expr
    names: frozenset[str]

    def __str__(self) -> str:
        return self.text

    def evaluate(self, scope: Mapping[str, Value]) -> Value:
        """The expression's value with names looked up in ``scope``.

        Raises ``MissingField`` for a name that is not there and ``ExpressionError`` for anything else that has
        no value (a division by zero, ``none + 1``).
        """
        try:
            return _evaluate(self.tree, scope)
        except ExpressionError:
            raise
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise ExpressionError(f"'{self.text}' has no value here: {error}") from error


@lru_cache(maxsize=4096)
def parse(text: str) -> Expression:
    """Parse ``text``; raises ``ExpressionError`` with the column of what is not allowed."""
    text = text.strip()
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"an expression may have {MAX_LENGTH} characters, this has {len(text)}")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        column = (error.offset or 1) - 1 if isinstance(error, SyntaxError) else 0
        raise ExpressionError(f"'{text}' is not an expression: {message}", column) from None
    names: set[str] = set()
    _check(tree, names, text)
    return Expression(text, tree, frozenset(names))


def _check(node: ast.expr, names: set[str], text: str) -> None:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return None
        case ast.Name(id=name):
            if name not in _WORDS:
                names.add(name)
            return None
        case ast.Attribute(value=inner):
            return _check(inner, names, text)
        case ast.Subscript(value=inner, slice=index):
            _check(inner, names, text)
            return _check(index, names, text)
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.BoolOp(values=items):
            for item in items:
                _check(item, names, text)
            return None
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.UAdd(), operand=inner):
            return _check(inner, names, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            _check(left, names, text)
            return _check(right, names, text)
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in _COMPARE for op in ops):
            for item in (left, *rest):
                _check(item, names, text)
            return None
        case ast.IfExp(test=test, body=body, orelse=orelse):
            for item in (test, body, orelse):
                _check(item, names, text)
            return None
        case ast.Call(func=ast.Name(id="optional"), args=[ast.Name() | ast.Attribute() as inner], keywords=[]):
            return _check(inner, names, text)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            for item in arguments:
                _check(item, names, text)
            return None
    raise ExpressionError(
        f"'{ast.unparse(node)}' is not allowed in an expression "
        "(allowed: arithmetic, comparisons, and/or/not, in, x if y else z, optional, len, min, max, range)",
        node.col_offset,
    )


def _evaluate(node: ast.expr, scope: Mapping[str, Value]) -> Value:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            if name in _WORDS:
                return _WORDS[name]
            try:
                return scope[name]
            except KeyError:
                raise MissingField(name, node.col_offset) from None
        case ast.Attribute(value=inner, attr=field):
            holder = _evaluate(inner, scope)
            if isinstance(holder, Mapping) and field in holder:
                return holder[field]
            raise MissingField(ast.unparse(node), node.col_offset)
        case ast.Subscript(value=inner, slice=index):
            return _evaluate(inner, scope)[_evaluate(index, scope)]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_evaluate(item, scope) for item in items]
        case ast.BoolOp(op=op, values=items):
            for item in items[:-1]:
                first = _evaluate(item, scope)
                if bool(first) == isinstance(op, ast.Or):
                    return first
            return _evaluate(items[-1], scope)
        case ast.UnaryOp(op=op, operand=inner):
            operand = _evaluate(inner, scope)
            return not operand if isinstance(op, ast.Not) else (-operand if isinstance(op, ast.USub) else +operand)
        case ast.BinOp(left=left, op=operation, right=right):
            return _arithmetic(operation, _evaluate(left, scope), _evaluate(right, scope), node.col_offset)
        case ast.Compare(left=left, ops=ops, comparators=rest):
            first = _evaluate(left, scope)
            for comparison, item in zip(ops, rest, strict=True):
                second = _evaluate(item, scope)
                if not _COMPARE[type(comparison)](first, second):
                    return False
                first = second
            return True
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _evaluate(body if _evaluate(test, scope) else orelse, scope)
        case ast.Call(func=ast.Name(id="optional"), args=[inner]):
            try:
                return _evaluate(inner, scope)
            except MissingField:
                return None
        case ast.Call(func=ast.Name(id=name), args=arguments):
            values = [_evaluate(item, scope) for item in arguments]
            if name == "range" and any(abs(value) > MAX_RANGE for value in values):
                raise ExpressionError(f"a range beyond {MAX_RANGE:,}", node.col_offset)
            return _FUNCTIONS[name](*values)
    raise ExpressionError(f"'{ast.unparse(node)}' is not allowed in an expression", node.col_offset)


def _arithmetic(operation: ast.operator, left: Value, right: Value, column: int) -> Value:
    # Numbers only: Python's own operators would also repeat and join strings and lists.
    for value in (left, right):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ExpressionError(f"arithmetic needs numbers, found {value!r}", column)
    result = _BINARY[type(operation)](left, right)
    if isinstance(result, int) and abs(result) > MAX_INTEGER:
        raise ExpressionError("a number larger than 2**62", column)
    return result
