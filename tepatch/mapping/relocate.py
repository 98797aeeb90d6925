"""Where the part of the model that a mapping is about (``base``) sits among the names of a model or a checkpoint.

A mapping is written once, with the names of one class: ``model.layers.{layer}...``. In the bare model the same tensors
are ``layers.0...``, in one that wraps it ``model.language_model.layers.0...`` or ``language_model.model.layers.0...``.
So the base's place is looked for, on each side by itself: it is the prefix under which most of the rules' names are
found. That is a guess and decides nothing: the rules are then moved there, and a plan is proven as always.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from tepatch.errors import PlanError, Problem
from tepatch.mapping import rules
from tepatch.mapping.names import NameTemplate
from tepatch.mapping.rules import is_below

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
Move = Callable[[NameTemplate], NameTemplate]


@dataclass(frozen=True)
class Spelling:
    """How the names of a checkpoint differ from those of the stock model that it is loaded into.

    Both are names of the checkpoint's side. Where a base's names differ only its path does.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    """The stock model's name -> the checkpoint's, where they differ."""

    def stock(self) -> dict[str, str]:
        """The checkpoint's name -> the stock model's, where they differ."""
        return {theirs: ours for ours, theirs in self.names.items()}


def find_base(mapping: rules.Mapping, names: Collection[str], *, side: str, default: str, where: str) -> str:
    """The path below which ``names`` have what the rules below ``base`` call so; ``default`` if nothing of it is there.

    ``side`` is "target" for a model's names and "source" for a checkpoint's; ``where`` is for messages. Raises
    ``PlanError`` if the base may sit in two places.
    """
    if mapping.base is None:
        return ""
    templates = [_relative(name, mapping.base) for name in _base_names(mapping, side)]
    found: dict[str, set[str]] = {}
    seen_shapes: set[str] = set()
    for name in names:
        shape = _NUMBER.sub("#", name)  # layers are alike
        if shape in seen_shapes:
            continue
        is_numbered = False
        parts = name.split(".")
        for template in templates:
            count = template.text.count(".") + 1
            if count <= len(parts) and template.pattern.match(".".join(parts[-count:])):
                path = ".".join(parts[:-count])
                is_numbered = is_numbered or _NUMBER.search(path) is not None
                found.setdefault(path, set()).add(template.text)
        if not is_numbered:
            seen_shapes.add(shape)
    if not found:
        return default
    most = max(map(len, found.values()))
    best = [path for path, seen in found.items() if len(seen) == most]
    if len(best) > 1:
        raise PlanError(
            Problem(
                where=where,
                what=f"'{mapping.base}' of {mapping.name} may be in {len(best)} places here",
                details=tuple(f"{path or 'the top'}: {', '.join(sorted(found[path])[:3])}, ..." for path in best[:6]),
                fix="a mapping is about one part of a model; this model has several that look like it",
            )
        )
    return best[0]


def move_base(mapping: rules.Mapping, *, source: str, target: str) -> rules.Mapping:
    """``mapping`` with the names below its base at the path ``source`` of a checkpoint and ``target`` of a model.

    What is ignored outside the base has moved with it as far as their paths have the same end.
    """
    if mapping.base is None or mapping.base == source == target:
        return mapping
    base = mapping.base

    def moved(path: str) -> Move:
        return lambda name: _moved(name, base, path)

    to_source, to_target = moved(source), moved(target)
    above, there = _above(base, source)

    def to_ignored(name: NameTemplate) -> NameTemplate:
        return to_source(name) if is_below(name.text, base) else _moved(name, above, there)

    return replace(
        mapping,
        base=target,
        ignored=tuple(replace(each, source=to_ignored(each.source)) for each in mapping.ignored),
        rules=tuple(
            replace(
                rule,
                target=to_target(rule.target),
                choices=tuple(_node(node, to_source, to_target) for node in rule.choices),
            )
            for rule in mapping.rules
        ),
    )


def spell(rest: Mapping[str, str], inside: Mapping[str, str], *, target: str | None) -> Spelling:
    """How a checkpoint spells the names of the stock model.

    ``rest`` are the names outside the base, a parameter's -> the checkpoint's; ``inside`` those below it, the
    checkpoint's -> what follows the base's path, which in the model is ``target`` (None: there is no base).
    """
    ours = {} if target is None else {joined(target, relative): name for name, relative in inside.items()}
    return Spelling({name: theirs for name, theirs in {**rest, **ours}.items() if name != theirs})


def below(mapping: rules.Mapping, names: Iterable[str], path: str) -> dict[str, str]:
    """Those of ``names`` that are sources of rules below the base, which is at ``path``, each with its name in it."""
    if mapping.base is None:
        return {}
    ignored = (each.source for each in mapping.ignored if is_below(each.source.text, mapping.base))
    templates = [_relative(name, mapping.base) for name in chain(_base_names(mapping, "source"), ignored)]
    pattern = re.compile("|".join(f"(?:{template.pattern.pattern})" for template in templates))
    start = f"{path}." if path else ""
    return {name: name[len(start) :] for name in names if name.startswith(start) and pattern.match(name, len(start))}


def joined(path: str, name: str) -> str:
    """The name of a tensor that is called ``name`` in the module at ``path`` ("" for the model itself)."""
    return f"{path}.{name}" if path else name


def _base_names(mapping: rules.Mapping, side: str) -> Iterator[NameTemplate]:
    """The names below the base in all rules, of one side."""
    base = mapping.base or ""
    found = rules.source_names(mapping) if side == "source" else (rule.target for rule in mapping.rules)
    return iter({name.text: name for name in found if is_below(name.text, base)}.values())


def _relative(name: NameTemplate, base: str) -> NameTemplate:
    return _moved(name, base, "")


def _moved(name: NameTemplate, base: str, path: str) -> NameTemplate:
    """A name below ``base`` ("" for any), which is at ``path`` now; another name as it is."""
    if not is_below(name.text, base):
        return name
    first, *others = name.literals
    start = len(base) + 1 if base else 0
    text, first = joined(path, name.text[start:]), joined(path, first[start:])
    return NameTemplate(text, (first, *others), name.fields)


def _above(base: str, source: str) -> tuple[str, str]:
    """Where two paths that have the same end begin to: ``bert`` and "" of ``bert.encoder`` and ``encoder``."""
    one, other = (path.split(".") if path else [] for path in (base, source))
    while one and other and one[-1] == other[-1]:
        del one[-1], other[-1]
    return ".".join(one), ".".join(other)


def _node(node: rules.Node, source: Move, target: Move) -> rules.Node:
    def inside(nodes: Sequence[rules.Node]) -> tuple[rules.Node, ...]:
        return tuple(_node(each, source, target) for each in nodes)

    match node:
        case rules.Leaf():
            return replace(node, source=source(node.source))
        case rules.Wrap() | rules.StackNode():
            return replace(node, inner=_node(node.inner, source, target))
        case rules.Parts():
            return replace(node, parts=inside(node.parts))
        case rules.Alternatives():
            return replace(node, nodes=inside(node.nodes))
    return node
