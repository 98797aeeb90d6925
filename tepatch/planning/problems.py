"""How a plan's failures are told: one ``Problem`` for each cause, not one for each tensor that it touches."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from tepatch.errors import Problem
from tepatch.mapping.names import fold, fold_numbers, listed
from tepatch.mapping.rules import Leaf, Located, Rule, Transpose, children

CONFIG_FIX = "check that config.json belongs to this checkpoint"


class Missing(NamedTuple):
    """A tensor that a rule needs and the checkpoint does not have."""

    source: str
    target: str
    captures: tuple[tuple[str, int], ...]
    """For which layer, expert, ..."""
    num_parts: int
    """Tensors that the target is made of."""


def missing(rule: Rule, entries: Sequence[Missing], free: Sequence[str]) -> Problem:
    """Tensors of one rule that are not there; ``free`` are the checkpoint's tensors that no rule uses."""
    names = [entry.source for entry in entries]
    targets = dict.fromkeys(entry.target for entry in entries)
    role = f" (one of {entries[0].num_parts} parts)" if entries[0].num_parts > 1 else ""
    close = _closest(names[0], free)
    return Problem(
        where=rule.where,
        what=f"{_count(names, 'tensor')} missing from the checkpoint",
        details=tuple(fold(names)),
        expected=f"for {', '.join(fold(targets, 2))}{role}",
        fix=f"did you mean {close}?" if close else "the checkpoint is incomplete, or of another model",
    )


def missing_outside(rule: Rule, names: Mapping[str, str], free: Sequence[str], others: Collection[str] = ()) -> Problem:
    """Tensors that the model has outside of its base (a head), and the checkpoint has not.

    ``names`` are the checkpoint's, each with the parameter's; ``others`` are the model's parameters besides.
    """
    close = _closest(next(iter(names)), free)
    return Problem(
        where=rule.where,
        what=f"{_count(names, 'tensor')} missing from the checkpoint, of what is around the base model",
        details=tuple(fold(names)),
        fix=f"to draw them as a new model's: fresh={listed(names.values(), others)}"
        + (f"; or did you mean {close}?" if close else ""),
    )


def lost(rule: Rule, source: str, target: str) -> Problem:
    """A rule for a parameter that the model does not have, while its source fills another without the rule."""
    return Problem(
        where=rule.where,
        what=f"the rule matches no parameter of the model, and {source} would go to {target} as it is",
        fix="correct the rule's target, or take the rule out",
    )


def nothing_for(capture: str, count: Located, values: Sequence[int], names: Iterable[str]) -> Problem:
    """The checkpoint has not a single tensor for some ``values`` of a capture (a whole layer is missing)."""
    return Problem(
        where=count.where,
        what=f"the checkpoint has nothing for {capture} {fold_numbers(values)}",
        details=tuple(fold(names)),
        expected=f"'{capture}' is {count} in the config",
        fix=f"{CONFIG_FIX}, and that the checkpoint is complete",
    )


def beyond(capture: str, count: Located, domain: Sequence[int]) -> tuple[str, str]:
    """Why tensors of a layer that the config does not have are unexpected, and what to do."""
    known = fold_numbers(domain) if domain else "nothing"
    return f"'{capture}' is {known} ({count} in the config), the checkpoint has more", CONFIG_FIX


def unexpected(
    mapping: str, names: Sequence[str], reason: str, fix: str, *, can_drop: bool, others: Collection[str] = ()
) -> Problem:
    """Tensors of the checkpoint that no rule uses; ``others`` are those besides.

    With ``can_drop`` they may be of another class's head.
    """
    chosen = f"drop={listed(names, others)}" if can_drop else ""
    drop = f"if this class has no place for them, leave them out: {chosen}; else " if chosen else ""
    return Problem(
        where=mapping,
        what=f"{_count(names, 'tensor')} of the checkpoint that no rule uses",
        details=tuple(fold(names)),
        found=reason,
        fix=fix or f"{drop}add a rule, or list it under 'ignore' with the reason",
    )


def misshapen(
    rule: Rule, names: Sequence[str], expected: tuple[int, ...], found: tuple[int, ...], *, can_turn: bool
) -> Problem:
    """Tensors whose shapes are not what the rule and the model's parameter need; ``can_turn``: a rule may turn them."""
    turning = _turning_fix(rule, names[0]) if can_turn and _is_turned(expected, found) else ""
    return Problem(
        where=rule.where,
        what=f"wrong shape: {_count(names, 'tensor')}",
        details=tuple(fold(names)),
        expected=str(list(expected)),
        found=str(list(found)),
        fix=f"{turning}; else {CONFIG_FIX}" if turning else CONFIG_FIX,
    )


def mistyped(rule: Rule, names: Sequence[str], wanted: str, found: str) -> Problem:
    """Tensors whose numbers do not mean what the parameter's would: packed, quantized or whole numbers."""
    return Problem(
        where=rule.where,
        what=f"{_count(names, 'tensor')} of a dtype that does not convert to the parameter's",
        details=tuple(fold(names)),
        expected=wanted,
        found=found,
        fix="a quantized checkpoint has to be dequantized first",
    )


def not_consumed_once(wheres: Sequence[str], uses: Mapping[str, Sequence[str]], wrong: str) -> Problem:
    """Tensors of the checkpoint that rules use twice or only in part; ``uses`` are their targets."""
    targets = dict.fromkeys(target for each in uses.values() for target in each)
    return Problem(
        where=wheres[-1],
        what=f"{_count(list(uses), 'tensor')} of the checkpoint not consumed exactly once: {wrong}",
        details=(*fold(uses), f"used for {', '.join(fold(targets))}"),
        found=f"used by the rules at {', '.join(wheres)}" if len(wheres) > 1 else "",
    )


def unknown_targets(rule: Rule, names: Sequence[str], targets: Sequence[str]) -> Problem:
    """A rule whose target is not a parameter of the model."""
    close = _closest(names[0], targets)
    return Problem(
        where=rule.where,
        what=f"the rule matches no parameter of the model ({_count(names, 'name')})",
        details=tuple(fold(names)),
        fix=f"did you mean {close}?" if close else "",
    )


def uncovered(mapping: str, names: Sequence[str]) -> Problem:
    """Parameters of the model that no rule fills."""
    return Problem(
        where=mapping,
        what=f"no rule fills {_count(names, 'parameter')} of the model",
        details=tuple(fold(names)),
        fix="add a rule (or 'create' if the checkpoint has nothing for it)",
    )


def more_than_a_name(rule: Rule, alias: str, to: str) -> Problem:
    """A rule that makes a parameter of something, and the model ties the parameter to another."""
    return Problem(
        where=rule.where,
        what=f"the model ties {alias} to {to}, so its rule can only name the copy that a checkpoint may hold",
        expected="'same', or the name of a tensor",
        fix="write '{when: CONDITION, same: true}' as the first choice, for configs that tie them",
    )


def _is_turned(expected: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Whether a shape is the expected one with the last two dimensions swapped, which is what ``transpose`` does."""
    return len(expected) > 1 and found == (*expected[:-2], expected[-1], expected[-2])


def _turning_fix(rule: Rule, name: str) -> str:
    """How the rule would take a tensor that is turned over."""
    if not rule.choices:
        return "if the checkpoint stores it turned over, add a rule for it with 'transpose: true'"
    todo = [(node, False) for node in rule.choices]
    while todo:
        node, is_turning = todo.pop()
        is_turning ^= isinstance(node.axes, Transpose)
        if isinstance(node, Leaf) and node.source.pattern.match(name):
            how = "take 'transpose: true' out of" if is_turning else "put 'transpose: true' to it in"
            return f"if the checkpoint stores it turned over, {how} the rule"
        todo += [(child, is_turning) for child in children(node)]
    return ""


def _closest(name: str, candidates: Sequence[str]) -> str:
    """The candidate spelt most like ``name`` for the same layer and expert numbers; empty if none is close."""
    numbers = re.findall(r"\d+", name)
    same = [other for other in candidates if re.findall(r"\d+", other) == numbers]
    return next(iter(difflib.get_close_matches(name, same[:1000], n=1, cutoff=0.8)), "")


def _count(names: Collection[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''}"
