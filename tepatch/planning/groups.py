"""Which tensors of a plan share elements: what has to be translated between a model's names and a checkpoint's.

What is translated are groups of tensors that share elements, all of a group or none, so that no element ever has two
names. A tensor that is the same on both sides needs no translation.
"""

from __future__ import annotations

from dataclasses import dataclass

from tepatch.planning.bind import IDENTITY
from tepatch.planning.plan import Copy, Plan


@dataclass(frozen=True, slots=True)
class Group:
    """Sources and parameters that share elements with each other and with nothing else.

    Without sources it is one parameter that is a constant.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True)
class Names:
    """What of a plan has to be translated."""

    plan: Plan
    groups: tuple[Group, ...]
    ours: frozenset[str]
    """Names in groups that only parameters have."""
    theirs: frozenset[str]
    """Names in groups that only tensors of the checkpoint have."""


def names_in(plan: Plan) -> Names:
    """What of a plan has to be translated."""
    by_source: dict[str, list[Copy]] = {}
    by_target: dict[str, list[Copy]] = {}
    for copy in plan.copies:
        by_source.setdefault(copy.source, []).append(copy)
        by_target.setdefault(copy.target, []).append(copy)
    groups: list[Group] = []
    grouped = set[str]()
    for name, entry in plan.targets.items():
        if entry.state == "tied" or name in grouped:
            continue
        sources, targets, todo = dict[str, None](), {name: None}, [name]
        while todo:
            for copy in by_target.get(todo.pop(), ()):
                if copy.source in sources:
                    continue
                sources[copy.source] = None
                for each in by_source[copy.source]:
                    if each.target not in targets:
                        targets[each.target] = None
                        todo.append(each.target)
        grouped.update(targets)
        copies = tuple(copy for target in targets for copy in by_target.get(target, ()))
        if sources.keys() != targets.keys() or not all(is_whole(plan, copy) for copy in copies):
            groups.append(Group(tuple(sources), tuple(targets), copies))
    ours = frozenset(name for group in groups for name in group.targets if name not in by_source)
    theirs = frozenset(name for group in groups for name in group.sources if name not in plan.targets)
    return Names(plan, tuple(groups), ours, theirs)


def is_whole(plan: Plan, copy: Copy) -> bool:
    """Whether source and parameter are the same tensor, element by element."""
    pair = copy.pair
    return (
        copy.affine == IDENTITY
        and plan.sources[copy.source].shape == plan.targets[copy.target].shape
        and pair.source_strides == pair.target_strides == (1,)
        and pair.source_offset == pair.target_offset == 0
    )
