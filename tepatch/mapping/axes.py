"""Layouts in named axes, as einops writes them: ``(h two k) i -> (h k two) i``.

The left side is how the source lies in memory, the right side how the target does. A pattern without an arrow
changes nothing and pins the shape. Parentheses say which axes share a dimension, outermost first. A whole number
is an axis of that size. Sizes come from the mapping's ``sizes``; one axis in each dimension may be left to
follow from the shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from tepatch.views import Dim, LayoutError, View, join_dims, split_dim

_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*|\d+|[()])")

AxisGroups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Axes:
    """A parsed pattern: ``source`` and ``target`` list the axes of each dimension."""

    text: str
    source: AxisGroups
    target: AxisGroups

    def names(self) -> frozenset[str]:
        """The axes that are looked up among the sizes (numbers are not)."""
        return frozenset(axis for group in self.target for axis in group if not axis.isdigit())

    def apply(self, target: View, sizes: Mapping[str, int]) -> View:
        """``target`` as the source sees it. Raises ``LayoutError`` if the sizes do not fit."""
        if len(target.dims) != len(self.target):
            raise LayoutError(
                f"axes '{self.text}' name {len(self.target)} dimensions, the target has {len(target.dims)}"
            )
        found: dict[str, Dim] = {}
        for dim, group in zip(target.dims, self.target, strict=True):
            found.update(zip(group, split_dim(dim, self._group_sizes(dim, group, sizes)), strict=True))
        return View(target.offset, tuple(join_dims(found[axis] for axis in group) for group in self.source))

    def _group_sizes(self, dim: Dim, group: tuple[str, ...], sizes: Mapping[str, int]) -> list[int]:
        total = prod(size for size, _ in dim)
        known = {axis: int(axis) if axis.isdigit() else sizes.get(axis) for axis in group}
        free = [axis for axis, size in known.items() if size is None]
        if len(free) > 1:
            raise LayoutError(f"the sizes of axes {', '.join(free)} in '{self.text}' are not defined")
        for axis, size in known.items():
            if size is not None and size < 1:
                raise LayoutError(f"axis '{axis}' of '{self.text}' can not have size {size}")
        rest = prod(size for size in known.values() if size is not None)
        if free:
            if total % rest:
                raise LayoutError(f"{total} is not a multiple of {rest} (axes '{' '.join(group)}')")
            known[free[0]] = total // rest
        elif rest != total:
            spelled = " x ".join(f"{axis}={size}" for axis, size in known.items())
            raise LayoutError(f"axes ({spelled}) make {rest}, the target has {total}")
        return [size for size in known.values() if size is not None]


def parse_axes(text: str) -> Axes:
    """Parse a pattern; raises ``LayoutError`` if it is not one."""
    left, arrow, right = text.partition("->")
    source = _side(left, text)
    target = _side(right, text) if arrow else source
    names = [sorted(axis for group in side for axis in group) for side in (source, target)]
    if names[0] != names[1]:
        raise LayoutError(f"both sides of '{text}' must have the same axes")
    if len(set(names[0])) != len(names[0]):
        raise LayoutError(f"an axis appears twice in '{text}' (give equal sizes different names)")
    return Axes(text, source, target)


def _side(text: str, whole: str) -> AxisGroups:
    groups: list[tuple[str, ...]] = []
    open_group: list[str] | None = None
    position = 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise LayoutError(f"'{text[position:].strip()[:1]}' is not expected in axes '{whole}'")
        token, position = match[1], match.end()
        if token == "(":
            if open_group is not None:
                raise LayoutError(f"nested parentheses in axes '{whole}'")
            open_group = []
        elif token == ")":
            if not open_group:
                raise LayoutError(f"')' closes nothing in axes '{whole}'")
            groups.append(tuple(open_group))
            open_group = None
        elif open_group is not None:
            open_group.append(token)
        else:
            groups.append((token,))
    if open_group is not None or not groups:
        raise LayoutError(f"axes '{whole}' are incomplete")
    return tuple(groups)
