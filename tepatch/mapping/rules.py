"""Rules as the rest of tepatch uses them: parsed, with positions, and still knowing no model.

A ``Mapping`` is what ``read`` makes of a file. Each ``Rule`` fills one target name (a template with captures) by
a tree of nodes; leaves are source names. ``bind`` turns that tree into pairs of views once sizes are known.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tepatch.mapping.axes import Axes
from tepatch.mapping.expressions import Expression
from tepatch.mapping.names import NameTemplate

MAX_ALTERNATIVES = 64
"""Combinations that the ``any_of`` of one rule may make."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """An expression and where it stands."""

    expression: Expression
    where: str

    def __str__(self) -> str:
        return self.expression.text


@dataclass(frozen=True, kw_only=True, slots=True)
class Padding:
    dim: int
    size: Located
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Taking:
    dim: int
    out_of: Located
    index: Located | None
    start: Located | None
    size: Located | None


@dataclass(frozen=True, kw_only=True)
class Node:
    """One step of a layout. Modifiers are undone from the target inwards: pad, offset, scale, axes."""

    where: str
    when: Located | None = None
    axes: Axes | Transpose | None = None
    scale: Located | None = None
    offset: Located | None = None
    pad: Padding | None = None


@dataclass(frozen=True, slots=True)
class Transpose:
    """The last two dimensions swapped."""


@dataclass(frozen=True, kw_only=True)
class Leaf(Node):
    source: NameTemplate
    take: Taking | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is a name and nothing else."""
        return all(each is None for each in (self.take, self.axes, self.scale, self.offset, self.pad))


@dataclass(frozen=True, kw_only=True)
class Wrap(Node):
    """Modifiers around another node."""

    inner: Node


@dataclass(frozen=True, kw_only=True)
class Parts(Node):
    """Concat (``groups`` and ``block`` None) or interleave along ``dim``."""

    parts: tuple[Node, ...]
    dim: int
    sizes: tuple[Located, ...] | None
    groups: Located | None = None
    block: Located | None = None


@dataclass(frozen=True, kw_only=True)
class StackNode(Node):
    inner: Node
    over: str
    dim: int


@dataclass(frozen=True, kw_only=True)
class Alternatives(Node):
    nodes: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class Constant(Node):
    value: float


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How one target name is filled. The first of ``choices`` whose conditions hold is used."""

    where: str
    target: NameTemplate
    conditions: tuple[Located, ...]
    """From the scopes around the rule: all must hold."""
    choices: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class Requirement:
    condition: Located
    sentence: str
    name: str = ""
    """Under which a mapping that extends this one replaces or drops it; "" for one that is known by its condition."""


@dataclass(frozen=True, kw_only=True)
class Ignored:
    source: NameTemplate
    reason: str
    where: str


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """A whole mapping file (with what it extends), parsed."""

    name: str
    digest: str
    """sha256 over the text of the file and of everything it extends."""
    extends: str | None
    captures: dict[str, Located]
    sizes: dict[str, Located]
    requires: tuple[Requirement, ...]
    ignored: tuple[Ignored, ...]
    base: str | None = None
    """Path of the part of the model that the rules are about; "" for the whole model, None if the file names none."""
    rest: str | None = None
    """Where it says that parameters outside ``base`` are the sources of their own names; None if it does not."""
    rules: tuple[Rule, ...] = field(repr=False)


def children(node: Node) -> tuple[Node, ...]:
    """The nodes directly inside ``node``."""
    match node:
        case Wrap(inner=inner) | StackNode(inner=inner):
            return (inner,)
        case Parts(parts=nodes) | Alternatives(nodes=nodes):
            return nodes
    return ()


def leaves(node: Node) -> Iterator[NameTemplate]:
    """The source names in a tree."""
    if isinstance(node, Leaf):
        yield node.source
    for child in children(node):
        yield from leaves(child)


def source_names(mapping: Mapping) -> Iterator[NameTemplate]:
    """The source names in all rules of a mapping."""
    return (name for rule in mapping.rules for node in rule.choices for name in leaves(node))


def is_below(name: str, path: str) -> bool:
    """Whether a tensor is inside the module at ``path``; all are inside the model itself, which is at ""."""
    return not path or name.startswith(f"{path}.")


def without_alternatives(node: Node) -> Iterator[Node]:
    """``node`` without ``any_of``: one tree for each combination of alternatives, in order.

    Of nested parts no more than ``MAX_ALTERNATIVES + 1`` are made.
    """
    match node:
        case Alternatives(nodes=nodes):
            modifiers = {name: getattr(node, name) for name in Node.__dataclass_fields__}
            for each in nodes:
                for inner in without_alternatives(each):
                    yield Wrap(**modifiers, inner=inner)
        case Wrap(inner=inner) | StackNode(inner=inner):
            for each in without_alternatives(inner):
                yield replace(node, inner=each)
        case Parts(parts=parts):
            # Cut off inside as well: nested parts would multiply before anybody counts them.
            each_part = [itertools.islice(without_alternatives(part), MAX_ALTERNATIVES + 1) for part in parts]
            for combination in itertools.product(*each_part):
                yield replace(node, parts=combination)
        case _:
            yield node


def expression_names(node: Node) -> frozenset[str]:
    """Names that the expressions of a tree read (not its source names)."""
    out: set[str] = set()
    todo: list[Any] = [node]
    while todo:
        item = todo.pop()
        if isinstance(item, Located):
            out |= item.expression.names
        elif isinstance(item, Axes):
            out |= item.names()
        elif isinstance(item, Sequence) and not isinstance(item, str):
            todo += item
        elif isinstance(item, Node | Padding | Taking):
            todo += [getattr(item, name) for name in item.__dataclass_fields__]
    return frozenset(out)
