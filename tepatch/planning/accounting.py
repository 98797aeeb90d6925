"""Making a plan: what the rules touch and what they do not, so that every tensor and parameter is accounted for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from collections.abc import Mapping as MappingABC
from math import prod
from typing import Any, Literal

from tepatch.dtypes import is_convertible
from tepatch.errors import PlanError, Problem
from tepatch.mapping import rules
from tepatch.mapping.rules import Mapping
from tepatch.planning import problems
from tepatch.planning.apply import AppliedRules
from tepatch.planning.plan import Copy, Plan, SourceEntry, Spec, TensorSpec
from tepatch.planning.problems import Missing
from tepatch.planning.requirements import requirement_problems
from tepatch.views import Pair, tiling_error

DROPPED = "dropped by the caller"
"""Why a source is ignored that nobody but the caller of ``make_plan`` wants to be."""


def make_plan(
    mapping: Mapping,
    *,
    config: MappingABC[str, Any],
    sources: MappingABC[str, TensorSpec],
    targets: MappingABC[str, TensorSpec],
    ties: MappingABC[str, str] | None = None,
    spelling: MappingABC[str, str] | None = None,
    dropped: Collection[str] = (),
    patch: str = "",
    location: str = "",
    notes: Sequence[str] = (),
) -> Plan:
    """Settle what a load will do.

    ``config`` holds the config's fields by name; ``sources`` the checkpoint's tensors and ``targets`` the
    model's parameters, by name; ``ties`` maps a target name to the one it is the same parameter as (such names
    are not in ``targets``). ``spelling`` has the source of a parameter outside the mapping's ``base`` where that is not
    its own name. Sources that are ``dropped`` are as good as absent. Raises ``PlanError`` with every problem at once.
    """
    kept = {name: spec for name, spec in sources.items() if name not in dropped}
    applied = AppliedRules(mapping, config, kept, targets, ties or {}, spelling or {})
    told = dict.fromkeys([*requirement_problems(mapping, config), *applied.problems])
    entries = dict(applied.redundant)
    told |= dict.fromkeys(_use(applied, entries))
    entries |= {name: _entry(spec, "ignored", DROPPED) for name, spec in sources.items() if name not in kept}
    free = _ignore(applied, entries)
    told |= dict.fromkeys([*_untouched(applied, free), *_gathered(applied, free)])
    if told:
        raise PlanError(
            told,
            heading=f"{mapping.name} does not fit {location or 'the checkpoint'} "
            f"({len(told)} problem{'s' if len(told) > 1 else ''})",
        )
    order = {name: position for position, name in enumerate(targets)}
    instead = applied.stands_for.items()
    return Plan(
        patch=patch,
        mapping=mapping.name,
        digest=mapping.digest,
        location=location,
        copies=tuple(applied.copies),
        fills=tuple(applied.fills),
        sources={name: entries[name] for name in sources},
        targets=dict(sorted(applied.target_entries.items(), key=lambda item: order.get(item[0], len(order)))),
        rules=tuple(applied.rule_entries),
        notes=(*notes, *(f"the tied tensor {name} is stored under its other name, {other}" for other, name in instead)),
    )


def make_export_plan(
    mapping: Mapping,
    *,
    config: MappingABC[str, Any],
    targets: MappingABC[str, TensorSpec],
    ties: MappingABC[str, str] | None = None,
    spelling: MappingABC[str, str] | None = None,
    like: MappingABC[str, TensorSpec] | None = None,
    dtype: str = "",
    keep_dtypes: bool = False,
    patch: str = "",
    location: str = "",
) -> Plan:
    """The plan for a model and no checkpoint: which tensors its parameters would come from, and so go back to.

    Shapes of the sources follow from the rules. Their dtypes are those of the parameters; ``dtype`` (a code) is that
    of all floating-point ones. ``like`` is a checkpoint to be like, as far as that is possible: its spelling where a
    rule knows several, its order, its copies of tied tensors, and with ``keep_dtypes`` its dtypes. Raises
    ``PlanError`` with every problem at once.
    """
    like, ties = like or {}, ties or {}
    applied = AppliedRules(mapping, config, like, targets, ties, spelling or {})
    needed: dict[str, TensorSpec] = {}
    for copy in applied.copies:
        needed.setdefault(copy.source, Spec(applied.shapes[copy.source][0], targets[copy.target].dtype))
    for name, entry in applied.redundant.items():
        needed.setdefault(name, targets[entry.note])
    for name, spec in needed.items():
        if dtype and is_convertible(spec.dtype, dtype):
            needed[name] = Spec(tuple(spec.shape), dtype)
        elif keep_dtypes and name in like:
            needed[name] = Spec(tuple(spec.shape), like[name].dtype)
    order = [*(name for name in like if name in needed), *(name for name in needed if name not in like)]
    sources = {name: needed[name] for name in order}
    return make_plan(
        mapping,
        config=config,
        sources=sources,
        targets=targets,
        ties=ties,
        spelling=spelling,
        patch=patch,
        location=location,
    )


def _entry(spec: TensorSpec, state: Literal["used", "ignored"], note: str) -> SourceEntry:
    return SourceEntry(tuple(spec.shape), spec.dtype, state, note)


def _use(applied: AppliedRules, entries: dict[str, SourceEntry]) -> Iterator[Problem]:
    """Each source's views must tile it: every element goes somewhere, none goes to two places."""
    used: dict[str, list[Copy]] = {}
    for copy in applied.copies:
        used.setdefault(copy.source, []).append(copy)
    proven: dict[tuple[Any, ...], str | None] = {}
    consumed: dict[tuple[tuple[str, ...], str], dict[str, list[str]]] = {}
    for name, copies in used.items():
        shape = applied.shapes[name][0]
        key = (shape, *(copy.pair for copy in copies))
        if key not in proven:
            proven[key] = _consumption_error([copy.pair for copy in copies], prod(shape))
        if (wrong := proven[key]) is not None:
            by = tuple(dict.fromkeys(applied.rules[copy.rule].where for copy in copies))
            consumed.setdefault((by, wrong), {})[name] = [copy.target for copy in copies]
        if (spec := applied.sources.get(name)) is not None:
            entries[name] = _entry(spec, "used", applied.stands_for.get(name, ""))
    for (by, wrong), uses in consumed.items():
        yield problems.not_consumed_once(by, uses, wrong)


def _ignore(applied: AppliedRules, entries: dict[str, SourceEntry]) -> list[str]:
    """Account for the sources that the mapping ignores. Returns those that are not accounted for."""
    free = [name for name in applied.sources if name not in entries]
    for ignored in applied.mapping.ignored:
        matching = [name for name in free if ignored.source.pattern.match(name)]
        entries |= {name: _entry(applied.sources[name], "ignored", ignored.reason) for name in matching}
        free = [name for name in free if name not in entries]
    return free


def _untouched(applied: AppliedRules, free: Sequence[str]) -> Iterator[Problem]:
    """What no rule touched, on both sides, and no rule that could not be applied is for."""
    mapping, excused = applied.mapping, [name.pattern for name in applied.unsettled_names()]
    groups: dict[tuple[str, str], list[str]] = {}
    for name in free:
        if not any(pattern.match(name) for pattern in excused):
            groups.setdefault(_reason(applied, name), []).append(name)
    for (reason, fix), names in groups.items():
        has_base, others = mapping.base is not None, applied.sources.keys() - set(names)
        yield problems.unexpected(mapping.name, names, reason, fix, can_drop=has_base, others=others)
    missed = [name for name in applied.targets if name not in applied.target_entries]
    if uncovered := [name for name in missed if not any(pattern.match(name) for pattern in excused)]:
        yield problems.uncovered(mapping.name, uncovered)


def _reason(applied: AppliedRules, name: str) -> tuple[str, str]:
    """Why no rule uses a source, and what to do, if it is of a layer that the config does not have; else empty."""
    captures = applied.mapping.captures
    for template in rules.source_names(applied.mapping):
        match = template.pattern.match(name)
        for field, text in zip(template.fields, match.groups() if match else (), strict=False):
            if field.text in captures and int(text) not in (domain := applied.binder.domain(field.text)):
                return problems.beyond(field.text, captures[field.text], domain)
    return "", ""


def _gathered(applied: AppliedRules, free: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with the sources that rules name: one problem for what many layers share."""
    missing = applied.missing
    for capture, count in applied.mapping.captures.items():
        entries = [entry for each in missing.values() for entry in each]
        needed = {dict(entry.captures).get(capture) for entry in entries} - {None}
        absent = {value for value in needed if value is not None and (capture, value) not in applied.present}
        if not absent or len(absent) == len(applied.binder.domain(capture)):
            continue  # if nothing at all was found, the names are to blame and not the count

        def is_whole(entry: Missing, capture: str = capture, absent: set[int] = absent) -> bool:
            return dict(entry.captures).get(capture) in absent

        names = [entry.source for entry in entries if is_whole(entry)]
        yield problems.nothing_for(capture, count, sorted(absent), names)
        missing = {index: [entry for entry in each if not is_whole(entry)] for index, each in missing.items()}
    for index, entries in missing.items():
        if entries and index == len(applied.mapping.rules):
            lost = {entry.source: entry.target for entry in entries}
            others = (applied.targets.keys() | applied.ties.keys()) - set(lost.values())
            yield problems.missing_outside(applied.rules[index], lost, free, others)
        elif entries:
            yield problems.missing(applied.rules[index], entries, free)
    for (index, expected, found), names in applied.misshapen.items():
        can_turn = applied.redundant.keys().isdisjoint(names)  # no rule turns the copy of a tied tensor
        yield problems.misshapen(applied.rules[index], names, expected, found, can_turn=can_turn)
    for (index, found_dtype, wanted), names in applied.mistyped.items():
        yield problems.mistyped(applied.rules[index], names, wanted, found_dtype)
    for index, names in applied.unknown_targets.items():
        yield problems.unknown_targets(applied.rules[index], names, list(applied.targets))


def _consumption_error(pairs: list[Pair], numel: int) -> str | None:
    if len(pairs) == 1 and pairs[0].numel == numel:
        return None  # one view with all elements of a contiguous tensor, each at its own place
    if sum(one.numel for one in pairs) > numel:
        return "used twice"
    return tiling_error([one.source_view() for one in pairs], numel)
