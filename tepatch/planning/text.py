"""A plan as text for people: what is read, what is fused, what is left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from tepatch.mapping.names import fold

if TYPE_CHECKING:
    from tepatch.planning.plan import Plan

MAX_SOURCES = 6


def show_plan(plan: Plan) -> str:
    """Some twenty lines: rules with their sources, counts of every state, conversions, bytes."""
    lines = [
        f"plan: {plan.patch or plan.mapping} {'->' if plan.is_reversed else '<-'} {plan.location or 'a checkpoint'}",
        f"  mapping {plan.mapping} (sha256 {plan.digest[:12]})",
    ]
    lines += [f"  {line}" for line in _rule_lines(plan)]
    lines.append("  sources: " + _counted(entry.state for entry in plan.sources.values()))
    lines.append("  targets: " + _counted(entry.state for entry in plan.targets.values()))
    reasons: dict[str, list[str]] = {}
    for name, entry in plan.sources.items():
        if entry.state == "ignored":
            reasons.setdefault(entry.note, []).append(name)
    lines += [f"  ignored: {', '.join(fold(names, 2))}: {reason}" for reason, names in reasons.items()]
    casts = Counter((plan.sources[copy.source].dtype, plan.targets[copy.target].dtype) for copy in plan.copies)
    for (source, target), count in sorted(casts.items()):
        lines.append(f"  dtype: {count} x {source}" + ("" if source == target else f" -> {target}"))
    inexact = plan.inexact()
    kept = sum(entry.state != "ignored" for entry in plan.sources.values()) - len(inexact)
    lines.append(f"  reversible: {kept} tensors bit for bit" + (f", {len(inexact)} not:" if inexact else ""))
    grouped: dict[str, list[str]] = {}
    for name, reason in inexact.items():
        grouped.setdefault(reason, []).append(name)
    lines += [f"    {', '.join(fold(names, 3))}: {reason}" for reason, names in grouped.items()]
    if plan.is_reversed:
        lines.append(f"  bytes: {plan.target_bytes:,} read, {plan.write_bytes:,} written")
    else:
        lines.append(f"  bytes: {plan.source_bytes:,} read, {plan.target_bytes:,} allocated")
    lines += [f"  note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _counted(states: Iterable[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(Counter(states).items()))


def _rule_lines(plan: Plan) -> Iterator[str]:
    constants, copied = {fill.rule for fill in plan.fills}, {copy.rule for copy in plan.copies}
    ties = {entry.rule: entry.tied_to for entry in plan.targets.values() if entry.tied_to}
    for index, rule in enumerate(plan.rules):
        origins = [_sources(rule.sources, rule.target)] if rule.sources else []
        origins += ["same"] if index in copied and not rule.sources else []  # what is outside the base
        origins += ["a constant"] if index in constants else []
        origins += [f"tied to {ties[index]}"] if index in ties else []
        if rule.state == "off":
            yield f"{rule.target}: off (its condition does not hold)"
        else:
            yield f"{rule.target} x{rule.count} <- {', '.join(origins)}"


def _sources(names: Sequence[str], target: str) -> str:
    """Names as a rule below the target's layer would say them, with what they share written once."""
    if list(names) == [target]:
        return "same"
    scope = target[: target.rfind("}.") + 2] if "}." in target else ""
    names = [name.removeprefix(scope) if name.startswith(scope) else f"/{name}" for name in names]
    head = _common(names, ".")
    tail = _common([name.removeprefix(head)[::-1] for name in names], "._")[::-1]
    middles = [name.removeprefix(head).removesuffix(tail) for name in names]
    is_foldable = all(middle and not set(middle) & {".", "/"} for middle in middles)
    if len(names) == 1 or not head + tail or not is_foldable:
        return " + ".join([*names[:MAX_SOURCES], *(["..."] if len(names) > MAX_SOURCES else [])])
    return f"{head}{{{','.join(middles)}}}{tail}"


def _common(names: Sequence[str], ends: str) -> str:
    """The longest beginning that all ``names`` share and that ends with one of the characters ``ends``."""
    first, last = min(names), max(names)
    length = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    return first[: max(first.rfind(end, 0, length) for end in ends) + 1]
