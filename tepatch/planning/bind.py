"""From rules to pairs of views, for one config.

A rule's tree is walked from the target inwards: the parameter's shape is known (from the model on the meta
device), so every node just narrows, splits or reorders the view it is given, and every leaf ends with the exact
shape its source must have. That work depends on the target's shape and on the expressions, not on the layer, so
it is done once and shared by all layers (a ``Template``); only names are filled in for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, NamedTuple

from tepatch.errors import Problem
from tepatch.mapping import rules
from tepatch.mapping.axes import Axes
from tepatch.mapping.names import NameTemplate
from tepatch.mapping.rules import Mapping, Node, Rule
from tepatch.mapping.values import BindError, Env, Scope, Values
from tepatch.views import (
    LayoutError,
    Pair,
    View,
    contiguous,
    join_dims,
    narrow,
    pair,
    select,
    split_dim,
    tiling_error,
)

MAX_NAMES = 1 << 19
"""Names that the rules of a mapping may stand for, targets and sources together."""


class Affine(NamedTuple):
    """A value operation: target = source * scale + offset; saving undoes it."""

    scale: float
    offset: float

    def after(self, inner: Affine) -> Affine:
        return Affine(self.scale * inner.scale, self.scale * inner.offset + self.offset)


IDENTITY = Affine(1.0, 0.0)


class SourcePart(NamedTuple):
    """One source's part in a template."""

    source: NameTemplate
    extra: tuple[tuple[str, int], ...]
    """Captures bound by ``stack``."""
    shape: tuple[int, ...]
    """The whole shape that the source must have."""
    pair: Pair
    affine: Affine
    where: str


class Filling(NamedTuple):
    """A part of a target that is a constant. Only the target side of ``pair`` means anything."""

    pair: Pair
    value: float


@dataclass(frozen=True, slots=True)
class Template:
    """How one parameter is put together, for every layer in which it has this shape."""

    sources: tuple[SourcePart, ...]
    fills: tuple[Filling, ...]


class Binder(Values):
    """Turns rules into names and templates. All work that layers share is done once."""

    def __init__(self, mapping: Mapping, config: MappingABC[str, Any]) -> None:
        super().__init__(mapping, config)
        self._templates: dict[tuple[Any, ...], Template | Problem] = {}
        self._expanded: dict[int, list[Node]] = {}
        self._names: dict[int, frozenset[str]] = {}
        self._spent = 0

    def instances(self, rule: Rule) -> Iterator[tuple[Env, str]]:
        """Each target name the rule stands for, with the captures' values."""
        names = sorted(rule.target.captures)
        domains = [self.domain(name) for name in names]
        self.spend(prod(map(len, domains)), rule.where)
        for values in itertools.product(*domains):
            env = dict(zip(names, values, strict=True))
            yield env, self.name(rule.target, env, rule.where)

    def spend(self, number: int, where: str) -> None:
        """Count names that rules stand for. Raises ``BindError`` beyond what any model has: captures multiply."""
        self._spent += number
        if self._spent > MAX_NAMES:
            what = f"the rules stand for more than {MAX_NAMES:,} names"
            raise BindError(Problem(where=where, what=what, fix="check the captures, and the numbers in config.json"))

    def choose(self, rule: Rule, env: Env) -> Node | None:
        """The choice of the rule that the config selects; None if its conditions do not hold."""
        if not all(self.holds(condition, env) for condition in rule.conditions):
            return None
        for node in rule.choices:
            if node.when is None or self.holds(node.when, env):
                return node
        return None

    def expand(self, node: Node) -> list[Node]:
        """``node`` without ``any_of``: one tree for each combination of alternatives, in order."""
        if id(node) not in self._expanded:
            choices = list(itertools.islice(rules.without_alternatives(node), rules.MAX_ALTERNATIVES + 1))
            if len(choices) > rules.MAX_ALTERNATIVES:
                what = f"'any_of' makes more than {rules.MAX_ALTERNATIVES} combinations"
                raise BindError(Problem(where=node.where, what=what))
            self._expanded[id(node)] = choices
        return self._expanded[id(node)]

    def template(self, node: Node, shape: tuple[int, ...], env: Env) -> Template:
        """How a target of ``shape`` is put together by ``node``: proven to tile it exactly.

        Raises ``BindError`` if sizes do not fit or the parts do not cover every element exactly once.
        """
        if id(node) not in self._names:
            self._names[id(node)] = self.reads(rules.expression_names(node))
        relevant = tuple(env[name] for name in sorted(env.keys() & self._names[id(node)]))
        key = (id(node), shape, relevant)
        if key not in self._templates:
            self._templates[key] = self._make_template(node, shape, env)
        found = self._templates[key]
        if isinstance(found, Problem):
            raise BindError(found)
        return found

    def _make_template(self, node: Node, shape: tuple[int, ...], env: Env) -> Template | Problem:
        sources: list[SourcePart] = []
        fills: list[Filling] = []
        try:
            self._place(node, contiguous(shape), env, (), IDENTITY, sources, fills)
        except BindError as error:
            return error.problem
        views = [part.pair.target_view() for part in sources] + [fill.pair.target_view() for fill in fills]
        if (wrong := tiling_error(views, prod(shape))) is not None:
            return Problem(where=node.where, what=f"the parts do not tile the target {list(shape)}", found=wrong)
        return Template(tuple(sources), tuple(fills))

    def _place(
        self,
        node: Node,
        view: View,
        env: Env,
        extra: tuple[tuple[str, int], ...],
        affine: Affine,
        sources: list[SourcePart],
        fills: list[Filling],
    ) -> None:
        def constant(part: View, value: float) -> None:
            fills.append(Filling(pair(part, part.shape), affine.scale * value + affine.offset))

        try:
            if node.pad is not None:
                dim = _dim(view, node.pad.dim)
                real, total = self.size(node.pad.size, env), view.shape[dim]
                if real > total:
                    raise LayoutError(f"pad: {real} real positions do not fit into {total}")
                if real < total:
                    constant(narrow(view, dim, real, total - real), node.pad.value)
                    view = narrow(view, dim, 0, real)
            affine = affine.after(self._affine(node, env))
            if node.axes is not None:
                view = self._rearrange(node.axes, view, env)
            match node:
                case rules.Leaf(source=source, take=take):
                    shape, offset = self._source_shape(view.shape, take, env)
                    if take is not None and take.index is not None:  # give back the dimension that was indexed
                        dim = _index(take.dim, len(shape))
                        view = View(view.offset, (*view.dims[:dim], ((1, 1),), *view.dims[dim:]))
                    sources.append(SourcePart(source, extra, shape, pair(view, shape, offset), affine, node.where))
                case rules.Wrap(inner=inner):
                    self._place(inner, view, env, extra, affine, sources, fills)
                case rules.Parts():
                    for part, seen in self._parts(node, view, env):
                        self._place(part, seen, env, extra, affine, sources, fills)
                case rules.StackNode(inner=inner, over=over):
                    dim, values = _dim(view, node.dim), self.domain(over)
                    if view.shape[dim] != len(values):
                        raise LayoutError(
                            f"stack over '{over}' makes {len(values)}, the target has {view.shape[dim]} "
                            f"in dimension {dim}"
                        )
                    for index, value in enumerate(values):
                        bound = (*extra, (over, value))
                        self._place(
                            inner, select(view, dim, index), {**env, over: value}, bound, affine, sources, fills
                        )
                case rules.Constant(value=value):
                    constant(view, value)
        except LayoutError as error:
            raise BindError(Problem(where=node.where, what=str(error))) from None

    def _affine(self, node: Node, env: Env) -> Affine:
        if node.scale is None and node.offset is None:
            return IDENTITY
        values = []
        for located, default in ((node.scale, 1.0), (node.offset, 0.0)):
            value = default if located is None else self.value(located, env)
            if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
                where = located.where if located else node.where
                raise BindError(Problem(where=where, what=f"'{located}' must be a finite number", found=repr(value)))
            values.append(float(value))
        if values[0] == 0.0:
            raise BindError(Problem(where=node.where, what="a scale of 0 has no inverse"))
        return Affine(*values)

    def _rearrange(self, axes: Axes | rules.Transpose, view: View, env: Env) -> View:
        if isinstance(axes, rules.Transpose):
            if len(view.dims) < 2:
                raise LayoutError("transpose needs two dimensions")
            return View(view.offset, (*view.dims[:-2], view.dims[-1], view.dims[-2]))
        scope = Scope(self, env)
        sizes: dict[str, int] = {}
        for name in sorted(axes.names() & self.mapping.sizes.keys()):
            value = scope[name]
            if isinstance(value, bool) or not isinstance(value, int):
                raise LayoutError(f"axis '{name}' needs a whole number, not {value!r}")
            sizes[name] = value
        return axes.apply(view, sizes)

    def _source_shape(self, block: tuple[int, ...], take: rules.Taking | None, env: Env) -> tuple[tuple[int, ...], int]:
        """The source's whole shape and where its block begins (in elements)."""
        if take is None:
            return block, 0
        total = self.size(take.out_of, env)
        if take.index is not None:
            dim = _index(take.dim, len(block) + 1)
            start, shape = self.size(take.index, env), (*block[:dim], total, *block[dim:])
            size = 1
        else:
            dim = _index(take.dim, len(block))
            start = self.size(take.start, env) if take.start else 0
            size = self.size(take.size, env) if take.size else block[dim]
            shape = (*block[:dim], total, *block[dim + 1 :])
            if size != block[dim]:
                raise LayoutError(f"take: {size} positions for a part of {block[dim]}")
        if start + size > total:
            raise LayoutError(f"take: positions {start} to {start + size} out of {total}")
        return shape, start * prod(shape[dim + 1 :])

    def _parts(self, node: rules.Parts, view: View, env: Env) -> Iterator[tuple[Node, View]]:
        dim = _dim(view, node.dim)
        total, count = view.shape[dim], len(node.parts)
        groups = 1
        if node.groups is not None:
            groups = self.size(node.groups, env)
        elif node.block is not None:
            turn = self.size(node.block, env) * count
            if turn == 0 or total % turn:
                raise LayoutError(f"{total} is not a multiple of {count} blocks of {turn // max(count, 1)}")
            groups = total // turn
        if groups == 0 or total % groups:
            raise LayoutError(f"{total} positions do not make {groups} groups")
        inside = total // groups
        if node.sizes is not None:
            sizes = [self.size(size, env) for size in node.sizes]
            if sum(sizes) != inside:
                spelled = " + ".join(f"{size}={n}" for size, n in zip(node.sizes, sizes, strict=True))
                raise LayoutError(f"sizes {spelled} make {sum(sizes)}, the target has {inside}")
        elif inside % count:
            raise LayoutError(f"{inside} does not split into {count} equal parts: give 'sizes'")
        else:
            sizes = [inside // count] * count
        outer, inner = split_dim(view.dims[dim], (groups, inside))
        split = View(view.offset, (*view.dims[:dim], outer, inner, *view.dims[dim + 1 :]))
        start = 0
        for part, size in zip(node.parts, sizes, strict=True):
            if size == 0:
                raise LayoutError("a part of size 0")
            seen = narrow(split, dim + 1, start, size)
            joined = join_dims(seen.dims[dim : dim + 2])
            yield part, View(seen.offset, (*seen.dims[:dim], joined, *seen.dims[dim + 2 :]))
            start += size


def _dim(view: View, dim: int) -> int:
    return _index(dim, len(view.dims))


def _index(dim: int, count: int) -> int:
    if not -count <= dim < count:
        raise LayoutError(f"there is no dimension {dim} in a part of {count} dimensions")
    return dim % count
