"""What changed between two plans: of one model under two mappings, or of one mapping in two versions of a plugin.

Compared is what a load does to every parameter and every tensor. Names of mapping files, their digests, line numbers
and notes are no part of that: a mapping that says the same in other words makes the same plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from tepatch.errors import visible
from tepatch.mapping.names import fold
from tepatch.planning.bind import IDENTITY
from tepatch.planning.plan import Copy, Fill, Plan, SourceEntry, TargetEntry
from tepatch.planning.words import describe_pair, describe_view
from tepatch.views import Pair

Kind = Literal[
    "added", "removed", "shape", "dtype", "state", "tied", "sources", "layout", "values", "constants", "inexact"
]
"""``state`` of a tensor is its fate (used, ignored, redundant), that of a parameter filled, created or tied."""

HEADINGS: dict[Kind, str] = {
    "added": "added",
    "removed": "removed",
    "shape": "another shape",
    "dtype": "another dtype",
    "state": "another state",
    "tied": "tied otherwise",
    "sources": "made of other sources",
    "layout": "laid out otherwise",
    "values": "scaled or offset otherwise",
    "constants": "other constants",
    "inexact": "reversible otherwise",
}

MAX_PLACES = 8
"""Parts of one source that a line says in words; more are shown as numbers."""
MAX_NAMES = 4
MAX_LINES = 8
"""Names and lines of one change in the text; the others are counted, and are all in the JSON."""

_Say = Callable[[str], str]
"""How a tensor is called in a line."""
_NO_LIMIT = 1 << 62
_LAYER = re.compile(r"(?<=\.)\d+\.")


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is not as it was, of one parameter (of the model) or one tensor (of the checkpoint)."""

    of: Literal["parameter", "tensor"]
    name: str
    kind: Kind
    details: tuple[str, ...] = ()
    """What it was and what it is, in words: ``was -> is``."""
    pattern: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """``details`` with names as a rule below the layer would say them, so that layers have them in common."""


@dataclass(frozen=True, slots=True)
class Side:
    """Which plan was compared."""

    patch: str
    mapping: str
    digest: str
    location: str

    def __str__(self) -> str:
        made = f"{self.mapping} (sha256 {self.digest[:12]})"
        return f"{self.patch or self.mapping} <- {self.location or 'a checkpoint'}, mapping {made}"


@dataclass(frozen=True)
class PlanDiff:
    """The changes from an old plan to a new one. Printable (``str``), JSON (``to_json``), deterministic."""

    old: Side
    new: Side
    changes: tuple[Change, ...]

    @property
    def is_same(self) -> bool:
        """Whether both plans do the same to every parameter and tensor."""
        return not self.changes

    def to_json(self) -> dict[str, Any]:
        """The changes as JSON-ready data, each with its full name."""
        return {
            "format": "tepatch-plan-diff-1",
            "same": self.is_same,
            **{
                key: {"patch": s.patch, "mapping": s.mapping, "digest": s.digest, "location": s.location}
                for key, s in (("old", self.old), ("new", self.new))
            },
            "changes": [
                {"of": each.of, "name": each.name, "kind": each.kind, "details": list(each.details)}
                for each in self.changes
            ],
        }

    def __str__(self) -> str:
        lines = [f"old: {self.old}", f"new: {self.new}"]
        if self.is_same:
            lines.append("the same: every parameter and every tensor")
            return visible("\n".join(lines))
        for of in ("parameter", "tensor"):
            names = {change.name for change in self.changes if change.of == of}
            if names:
                lines.append(f"{len(names)} {of}{'s' if len(names) > 1 else ''} changed")
                lines += self._lines(of)
        return visible("\n".join(lines))

    def _lines(self, of: str) -> Iterator[str]:
        groups: dict[tuple[Kind, tuple[str, ...]], list[str]] = {}
        for change in self.changes:
            if change.of == of:
                groups.setdefault((change.kind, change.pattern), []).append(change.name)
        for kind, heading in HEADINGS.items():
            for (of_kind, pattern), names in groups.items():
                if of_kind == kind:
                    yield f"  {heading}: {', '.join(_limited(_fold(names), MAX_NAMES))}"
                    yield from (f"    {line}" for line in _limited(pattern, MAX_LINES))


def diff_plans(old: Plan, new: Plan) -> PlanDiff:
    """Compare two plans: what is in the new one in its order, then what is only in the old one.

    The direction of a plan (``Plan.reverse``) makes no difference: both directions are the same pairs of views.
    """
    before, after = _Seen(old), _Seen(new)
    changes: list[Change] = []
    for name in dict.fromkeys([*new.targets, *old.targets]):
        # Most parameters are as they were, and layers are many: nothing is put into words for those.
        if before.is_as_in(after, name):
            continue
        full = _parameter_changes(name, before, after, _as_it_is)
        short = _parameter_changes(name, before, after, _relative_to(name))
        for (kind, details), (_, pattern) in zip(full, short, strict=True):
            changes.append(Change("parameter", name, kind, tuple(details), tuple(pattern)))
    for name in dict.fromkeys([*new.sources, *old.sources]):
        for kind, details in _tensor_changes(name, before, after):
            changes.append(Change("tensor", name, kind, tuple(details), tuple(details)))
    return PlanDiff(_side(old), _side(new), tuple(changes))


def _side(plan: Plan) -> Side:
    return Side(plan.patch, plan.mapping, plan.digest, plan.location)


class _Seen:
    """A plan, with what each parameter is made of at hand."""

    def __init__(self, plan: Plan) -> None:
        self.sources = plan.sources
        self.targets = plan.targets
        self.inexact = plan.inexact()
        self.copies: dict[str, dict[str, list[Copy]]] = {name: {} for name in plan.targets}
        self.fills: dict[str, list[Fill]] = {name: [] for name in plan.targets}
        for copy in plan.copies:
            self.copies[copy.target].setdefault(copy.source, []).append(copy)
        for fill in plan.fills:
            self.fills[fill.target].append(fill)

    def is_as_in(self, other: _Seen, target: str) -> bool:
        """Whether the parameter is made the same, to the letter and but for the rule that says so."""
        return self._parts(target) == other._parts(target)

    def _parts(self, target: str) -> tuple[Any, ...]:
        if (entry := self.targets.get(target)) is None:
            return ()
        copies = {source: [(copy.pair, copy.affine) for copy in each] for source, each in self.copies[target].items()}
        fills = [(fill.pair, fill.value) for fill in self.fills[target]]
        return entry.shape, entry.dtype, entry.state, entry.tied_to, copies, fills

    def layout(self, target: str, source: str) -> list[Pair]:
        return _joined(copy.pair for copy in self.copies[target][source])

    def places(self, target: str, source: str) -> str:
        """Where the source's elements are in the parameter, in words."""
        shapes = self.sources[source].shape, self.targets[target].shape
        pairs = self.layout(target, source)
        if len(pairs) > MAX_PLACES:
            return _numbers(pairs)
        return "; ".join(str(describe_pair(pair, *shapes)) for pair in pairs)

    def values(self, target: str, source: str) -> list[str]:
        affines = sorted({copy.affine for copy in self.copies[target][source]})
        return ["as they are" if each == IDENTITY else f"{each.scale} x + {each.offset}" for each in affines]

    def constants(self, target: str) -> list[str]:
        shape = self.targets[target].shape
        return [f"{describe_view(fill.pair.target_view(), shape)} = {fill.value}" for fill in self.fills[target]]


def _parameter_changes(name: str, before: _Seen, after: _Seen, say: _Say) -> Iterator[tuple[Kind, list[str]]]:
    old, new = before.targets.get(name), after.targets.get(name)
    if old is None or new is None:
        yield ("added", _made_of(name, after, say)) if old is None else ("removed", _made_of(name, before, say))
        return
    yield from _spec_changes(old, new)
    if old.state != new.state or old.tied_to != new.tied_to:
        was, now = (entry.state + (f" to {say(entry.tied_to)}" if entry.tied_to else "") for entry in (old, new))
        yield ("state" if old.state != new.state else "tied"), [f"{was} -> {now}"]
    gone, come = (
        [source for source in one.copies[name] if source not in other.copies[name]]
        for one, other in ((before, after), (after, before))
    )
    if gone or come:
        sides = (("no longer", gone), ("now", come))
        yield "sources", [f"{word} {', '.join(_fold(map(say, each)))}" for word, each in sides if each]
    kept = [source for source in after.copies[name] if source in before.copies[name]]
    if lines := [line for source in kept for line in _layout_lines(name, source, before, after, say)]:
        yield "layout", lines
    values = {source: [", ".join(seen.values(name, source)) for seen in (before, after)] for source in kept}
    if lines := [f"{say(source)}: {was} -> {now}" for source, (was, now) in values.items() if was != now]:
        yield "values", lines
    was, now = (", ".join(sorted(seen.constants(name))) for seen in (before, after))
    if was != now:
        yield "constants", [f"{was or 'none'} -> {now or 'none'}"]


def _spec_changes(old: SourceEntry | TargetEntry, new: SourceEntry | TargetEntry) -> Iterator[tuple[Kind, list[str]]]:
    if old.shape != new.shape:
        yield "shape", [f"{list(old.shape)} -> {list(new.shape)}"]
    if old.dtype != new.dtype:
        yield "dtype", [f"{old.dtype} -> {new.dtype}"]


def _made_of(name: str, seen: _Seen, say: _Say) -> list[str]:
    entry = seen.targets[name]
    tied = f" to {say(entry.tied_to)}" if entry.tied_to else ""
    sources = ", ".join(_fold(map(say, seen.copies[name])))
    return [f"{list(entry.shape)} {entry.dtype}, {entry.state}{tied}" + (f" from {sources}" if sources else "")]


def _layout_lines(name: str, source: str, before: _Seen, after: _Seen, say: _Say) -> list[str]:
    pairs = before.layout(name, source), after.layout(name, source)
    if pairs[0] == pairs[1]:
        return []
    was, now = before.places(name, source), after.places(name, source)
    if was != now:
        return [f"{say(source)}: {was} -> {now}"]
    shapes = [(seen.targets[name].shape, seen.sources[source].shape) for seen in (before, after)]
    if shapes[0] != shapes[1]:
        return []  # the same place in a tensor of another shape, which is told as such
    # Two orders of the same elements, for which there are no words.
    return [f"{say(source)}: {_numbers(pairs[0])} -> {_numbers(pairs[1])}"]


def _numbers(pairs: Sequence[Pair]) -> str:
    return "; ".join(
        f"sizes {list(one.sizes)}, strides {list(one.target_strides)} <- {list(one.source_strides)}, "
        f"from {one.target_offset} <- {one.source_offset}"
        for one in pairs
    )


def _tensor_changes(name: str, before: _Seen, after: _Seen) -> Iterator[tuple[Kind, list[str]]]:
    old, new = before.sources.get(name), after.sources.get(name)
    if old is None or new is None:
        entry = cast("SourceEntry", old or new)
        yield ("added" if old is None else "removed"), [f"{list(entry.shape)} {entry.dtype}, {_fate(entry)}"]
    else:
        yield from _spec_changes(old, new)
        if (old.state, old.note) != (new.state, new.note):
            yield "state", [f"{_fate(old)} -> {_fate(new)}"]
    was, now = (seen.inexact.get(name, "bit for bit") for seen in (before, after))
    if was != now and old and new:
        yield "inexact", [f"{was} -> {now}"]


def _fate(entry: SourceEntry) -> str:
    if entry.state == "redundant":
        return f"a copy of {entry.note}"
    if entry.state == "used" and entry.note:
        return f"used in the place of {entry.note}"
    return f"{entry.state} ({entry.note})" if entry.note else entry.state


def _joined(pairs: Iterable[Pair]) -> list[Pair]:
    """Pairs in one form, whichever way the same whole was cut into parts along its outermost dimension."""
    out: list[Pair] = []
    for one in sorted(pairs, key=lambda pair: (pair.target_offset, pair.source_offset)):
        if out and (joined := _join(out[-1], one)) is not None:
            out[-1] = joined
        else:
            out.append(one)
    return out


def _join(first: Pair, second: Pair) -> Pair | None:
    """One pair for two of which the second goes on where the first ends, on both sides."""
    shape, strides = first.sizes[1:], (first.source_strides, first.target_strides)
    if second.sizes[1:] != shape or (second.source_strides, second.target_strides) != strides:
        return None
    steps = (second.source_offset - first.source_offset, second.target_offset - first.target_offset)
    if steps != tuple(first.sizes[0] * stride[0] for stride in strides):
        return None
    return first._replace(sizes=(first.sizes[0] + second.sizes[0], *shape))


def _limited(lines: Sequence[str], limit: int) -> list[str]:
    return [*lines] if len(lines) <= limit else [*lines[:limit], f"... and {len(lines) - limit} more"]


def _fold(names: Iterable[str]) -> list[str]:
    """Names with two numbers folded, of layers and of experts; none is left out."""
    return fold(fold(names, _NO_LIMIT), _NO_LIMIT)


def _as_it_is(name: str) -> str:
    return name


def _relative_to(target: str) -> _Say:
    """Names as a rule for the layer of ``target`` would say them, so that all its layers say the same."""
    if (layer := _LAYER.search(target)) is None:
        return _as_it_is
    scope, number = target[: layer.end()], layer[0]

    def say(name: str) -> str:
        if name.startswith(scope):
            return name.removeprefix(scope)
        found = _LAYER.search(name)
        is_same_layer = found is not None and found[0] == number
        return f"{name[: found.start()]}{{n}}.{name[found.end() :]}" if found and is_same_layer else name

    return say
