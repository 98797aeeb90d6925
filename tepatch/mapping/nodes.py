"""The tree of one rule: operands, operations and their modifiers, each checked where it stands."""

from __future__ import annotations

from typing import Any

from tepatch.mapping import rules, schema
from tepatch.mapping.axes import Axes, parse_axes
from tepatch.mapping.document import Loc
from tepatch.mapping.names import NameTemplate
from tepatch.mapping.parsing import Parser
from tepatch.mapping.rules import Located, Node
from tepatch.views import LayoutError


class NodeBuilder:
    """Builds the nodes of one rule. Problems are noted by the ``Parser``."""

    def __init__(self, parser: Parser, target: NameTemplate, *, source_prefix: str, same: str) -> None:
        """``source_prefix`` goes before source names, ``same`` is the source of the target's own name."""
        self.parser = parser
        self.target = target
        self.prefix = source_prefix
        self.same = same

    def rule(self, item: Any, loc: Loc) -> Node | None:
        """The node for a whole rule, or for one of its choices; None if it has a problem."""
        return self._node(item, loc, frozenset(), top=True)

    def _source(self, text: str, loc: Loc, bound: frozenset[str]) -> NameTemplate | None:
        """``same``, a name below the scope's prefix, or ``/name`` from the top."""
        if text == "same":
            text = self.same
        elif text.startswith("/"):
            text = text[1:]
        elif self.prefix:
            text = f"{self.prefix}.{text}"
        return self.parser.name(text, loc, bound=self.target.captures | bound, column=0)

    def _node(self, item: Any, loc: Loc, bound: frozenset[str], *, top: bool = False) -> Node | None:
        where = self.parser.document.where(loc)
        if isinstance(item, str):
            name = self._source(item, loc, bound)
            return rules.Leaf(where=where, source=name) if name else None
        common = self._common(item, loc, where, top)
        match item:
            case schema.Of(of=str() as text):
                name = self._source(text, (*loc, "of"), bound)
                return rules.Leaf(**common, source=name, take=self._take(item.take, loc)) if name else None
            case schema.Of(of=inner):
                if item.take is not None:
                    self.parser.problem((*loc, "take"), "'take' needs a single source tensor")
                node = self._node(inner, (*loc, "of"), bound)
                return rules.Wrap(**common, inner=node) if node else None
            case schema.Same():
                name = self._source("same", loc, bound)
                return rules.Leaf(**common, source=name) if name else None
            case schema.Concat() | schema.Interleave():
                return self._parts(item, loc, common, bound)
            case schema.Stack(stack=inner, over=over, dim=dim):
                if over not in self.parser.captures or over in self.target.captures | bound:
                    self.parser.problem((*loc, "over"), f"'{over}' is not a capture that is free here")
                node = self._node(inner, (*loc, "stack"), bound | {over})
                return rules.StackNode(**common, inner=node, over=over, dim=dim) if node else None
            case schema.AnyOf(any_of=items):
                nodes = [self._node(each, (*loc, "any_of", i), bound) for i, each in enumerate(items)]
                return rules.Alternatives(**common, nodes=tuple(node for node in nodes if node is not None))
            case schema.Create(create=value):
                return rules.Constant(**common, value=float(value))
        return None

    def _parts(
        self, item: schema.Concat | schema.Interleave, loc: Loc, common: dict[str, Any], bound: frozenset[str]
    ) -> Node:
        parser = self.parser
        operands = item.concat if isinstance(item, schema.Concat) else item.interleave
        nodes = [self._node(each, (*loc, item.KEY, i), bound) for i, each in enumerate(operands)]
        sizes: tuple[Located, ...] | None = None
        if item.sizes is not None:
            located = [parser.expression(size, (*loc, "sizes", i)) for i, size in enumerate(item.sizes)]
            sizes = tuple(size for size in located if size is not None)
            if len(item.sizes) != len(operands):
                parser.problem((*loc, "sizes"), f"{len(item.sizes)} sizes for {len(operands)} parts")
        groups = block = None
        if isinstance(item, schema.Interleave):
            groups = parser.expression(item.over, (*loc, "over"))
            block = parser.expression(item.block, (*loc, "block"))
            if (item.over is None) == (item.block is None):
                parser.problem(loc, "'interleave' needs either 'over' (groups) or 'block' (positions)")
            if item.block is not None and item.sizes is not None:
                parser.problem((*loc, "sizes"), "'block' gives every part the same size: drop 'sizes'")
        parts = tuple(node for node in nodes if node is not None)
        return rules.Parts(**common, parts=parts, dim=item.dim, sizes=sizes, groups=groups, block=block)

    def _common(self, item: schema.Operation, loc: Loc, where: str, top: bool) -> dict[str, Any]:
        """What every node has: its place and its modifiers."""
        parser = self.parser
        self._refuse_empty(item, loc)
        axes: Axes | rules.Transpose | None = rules.Transpose() if item.transpose else None
        if item.axes is not None:
            try:
                axes = parse_axes(item.axes)
            except LayoutError as error:
                parser.problem((*loc, "axes"), str(error))
            if item.transpose:
                parser.problem(loc, "use one of 'axes' and 'transpose'")
        pad = None
        if item.pad is not None:
            self._refuse_empty(item.pad, (*loc, "pad"))
            size = parser.expression(item.pad.size, (*loc, "pad", "size"))
            pad = rules.Padding(dim=item.pad.dim, size=size, value=item.pad.value) if size else None
        if not top and item.when is not None:
            parser.problem((*loc, "when"), "'when' belongs to the whole rule, not to a part of it")
        if isinstance(item, schema.Create):
            for key in sorted(item.model_fields_set - {"when", item.KEY}):
                parser.problem((*loc, key), f"'{key}' means nothing with '{item.KEY}'")
        return {
            "where": where,
            "when": parser.expression(item.when, (*loc, "when")),
            "axes": axes,
            "scale": parser.expression(item.scale, (*loc, "scale")),
            "offset": parser.expression(item.offset, (*loc, "offset")),
            "pad": pad,
        }

    def _take(self, take: schema.Take | None, loc: Loc) -> rules.Taking | None:
        if take is None:
            return None
        at: Loc = (*loc, "take")
        self._refuse_empty(take, at)
        index = self.parser.expression(take.index, (*at, "index"))
        start = self.parser.expression(take.start, (*at, "start"))
        size = self.parser.expression(take.size, (*at, "size"))
        given = {key for key in ("index", "start", "size") if getattr(take, key) is not None}
        if given not in ({"index"}, {"start", "size"}):
            self.parser.problem(at, "'take' needs either 'index', or 'start' and 'size'")
        out_of = self.parser.expression(take.out_of, (*at, "out_of"))
        return rules.Taking(dim=take.dim, out_of=out_of, index=index, start=start, size=size) if out_of else None

    def _refuse_empty(self, item: schema.Operation | schema.Take | schema.Pad, loc: Loc) -> None:
        """``when:`` with nothing after it would otherwise read as no condition at all."""
        for key in sorted(item.model_fields_set):
            if getattr(item, key) is None:
                self.parser.problem((*loc, key), f"'{key}' has no value")
