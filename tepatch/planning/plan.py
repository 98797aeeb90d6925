"""The plan: what becomes of every tensor, settled and proven before a byte of a weight is read.

``make_plan`` meets a mapping, a config, the names and shapes of a checkpoint (its headers) and the names and
shapes of a model (built on the meta device), and returns plain data, or one ``PlanError`` with every problem.

The accounting is total. Every source tensor ends as *used*, *ignored* or *redundant* (a copy of a tied tensor,
compared when loading); every target as *filled*, *created* or *tied*; every rule as *used* or *off* (its
condition does not hold). Anything else is an error.

A plan is a relation, and has two directions. As it is made it *loads*: it reads sources and writes targets.
``Plan.reverse`` is the same plan, *saving*: it reads targets and writes sources. ``reads``, ``writes``, ``steps``
and ``constants`` say what that means for whoever executes it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

from tepatch.dtypes import is_exact, item_size
from tepatch.errors import visible
from tepatch.mapping.names import fold
from tepatch.planning.bind import IDENTITY
from tepatch.planning.entries import (
    Copy,
    Fill,
    RuleEntry,
    SourceEntry,
    Spec,
    Step,
    TargetEntry,
    TensorSpec,
)
from tepatch.views import Pair, contiguous, pair

__all__ = ["Copy", "Fill", "Plan", "RuleEntry", "SourceEntry", "Spec", "Step", "TargetEntry", "TensorSpec"]

MAX_SOURCES = 6
"""Names of sources that are shown for a rule."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a load will do, as plain data. Printable (``str``), JSON (``to_json``), deterministic."""

    patch: str
    mapping: str
    digest: str
    location: str
    copies: tuple[Copy, ...]
    fills: tuple[Fill, ...]
    sources: MappingABC[str, SourceEntry]
    targets: MappingABC[str, TargetEntry]
    rules: tuple[RuleEntry, ...]
    notes: tuple[str, ...] = ()
    is_reversed: bool = False
    """Whether the plan reads targets and writes sources: saving, not loading."""

    def reverse(self) -> Plan:
        """The same plan in the other direction. Reversed twice it is equal to what it was."""
        return replace(self, is_reversed=not self.is_reversed)

    def renamed(self, names: MappingABC[str, str]) -> Plan:
        """The plan with other names for its sources, where ``names`` has one; itself where two would have the same.

        Two would when a tied tensor that was stored under its other name is tied no longer.
        """
        used = {name: names.get(name, name) for name, entry in self.sources.items() if entry.state != "ignored"}
        if all(name == new for name, new in used.items()) or len(set(used.values())) < len(used):
            return self
        # What is ignored is nobody's but the checkpoint's, and keeps its name as far as that is free.
        ignored = {name: entry for name, entry in self.sources.items() if name not in used}
        return replace(
            self,
            copies=tuple(replace(copy, source=used[copy.source]) for copy in self.copies),
            sources={**ignored, **{new: self.sources[name] for name, new in used.items()}},
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self  # nothing in it ever changes, and models that carry a plan are copied

    @cached_property
    def reads(self) -> dict[str, Spec]:
        """What is read: the sources that are not ignored, or (reversed) the parameters that are not tied."""
        return self._stored if self.is_reversed else self._original

    @cached_property
    def writes(self) -> dict[str, Spec]:
        """What is written: the parameters that are not tied, or (reversed) the sources that are not ignored."""
        return self._original if self.is_reversed else self._stored

    @cached_property
    def steps(self) -> dict[str, tuple[Step, ...]]:
        """What each written tensor is made of, in the order of its elements; constants are not listed."""
        out: dict[str, list[Step]] = {name: [] for name in self.writes}
        for copy in self.copies:
            out[copy.source if self.is_reversed else copy.target].append(copy.step(is_reversed=self.is_reversed))
        for name, entry in self.sources.items() if self.is_reversed else ():
            if entry.state == "redundant":  # a second copy of a tied parameter
                sizes, strides, _, _, _ = pair(contiguous(entry.shape), entry.shape)
                out[name].append(Step(entry.note, sizes, strides, 0, strides, 0, IDENTITY, True))
        return {name: tuple(sorted(steps, key=lambda step: step.write_offset)) for name, steps in out.items()}

    @cached_property
    def constants(self) -> dict[str, tuple[Fill, ...]]:
        """Parts of parameters that are constants. Loading writes them; saving must find them as they are."""
        out: dict[str, list[Fill]] = {}
        for fill in self.fills:
            out.setdefault(fill.target, []).append(fill)
        return {name: tuple(fills) for name, fills in out.items()}

    @cached_property
    def _original(self) -> dict[str, Spec]:
        return {name: Spec(e.shape, e.dtype) for name, e in self.sources.items() if e.state != "ignored"}

    @cached_property
    def _stored(self) -> dict[str, Spec]:
        return {name: Spec(e.shape, e.dtype) for name, e in self.targets.items() if e.state != "tied"}

    @cached_property
    def layout_digest(self) -> str:
        """sha256 over where every element goes: equal for mappings that differ in wording only."""
        entries = [
            *((c.source, c.target, *c.pair, *c.affine) for c in self.copies),
            *((f.target, f.pair.sizes, f.pair.target_strides, f.pair.target_offset, f.value) for f in self.fills),
            *((name, e.tied_to) for name, e in self.targets.items() if e.state == "tied"),
        ]
        lines = sorted(repr(entry) for entry in entries)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def write_bytes(self) -> int:
        """Bytes of all that is written."""
        return sum(_nbytes(spec.shape, spec.dtype) for spec in self.writes.values())

    @property
    def source_bytes(self) -> int:
        """Bytes of the source tensors that will be read."""
        return sum(_nbytes(e.shape, e.dtype) for e in self.sources.values() if e.state == "used")

    @property
    def target_bytes(self) -> int:
        """Bytes of the parameters that will be allocated (tied ones once)."""
        return sum(_nbytes(e.shape, e.dtype) for e in self.targets.values() if e.state != "tied")

    def inexact(self) -> dict[str, str]:
        """What is read and would not come back bit for bit from what is written, each with the reason."""
        out: dict[str, str] = {}
        for name, steps in self.steps.items():
            written = self.writes[name].dtype
            for step in steps:
                read = self.reads[step.read].dtype
                if step.affine != IDENTITY:
                    out[step.read] = f"scaled or offset ({step.affine.scale} x + {step.affine.offset})"
                elif not is_exact(read, written):
                    out[step.read] = f"{read} is rounded to {written}"
        for name, source in self.sources.items() if not self.is_reversed else ():
            if source.state == "redundant" and not is_exact(source.dtype, self.targets[source.note].dtype):
                out[name] = f"{source.dtype} is rounded to {self.targets[source.note].dtype}"
        return out

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-ready data. Layouts that layers share are listed once."""
        layouts: dict[Pair, int] = {}
        copies = [
            {
                "source": copy.source,
                "target": copy.target,
                "layout": layouts.setdefault(copy.pair, len(layouts)),
                **({} if copy.affine == IDENTITY else {"affine": list(copy.affine)}),
                "rule": copy.rule,
            }
            for copy in self.copies
        ]
        fills = [
            {
                "target": fill.target,
                "layout": layouts.setdefault(fill.pair, len(layouts)),
                "value": fill.value,
                "rule": fill.rule,
            }
            for fill in self.fills
        ]
        return {
            "format": "tepatch-plan-1",
            "direction": "save" if self.is_reversed else "load",
            "patch": self.patch,
            "mapping": self.mapping,
            "digest": self.digest,
            "location": self.location,
            "source_bytes": self.source_bytes,
            "target_bytes": self.target_bytes,
            "notes": list(self.notes),
            "rules": [
                {"where": r.where, "target": r.target, "state": r.state, "count": r.count, "sources": list(r.sources)}
                for r in self.rules
            ],
            "layouts": [_layout_json(layout) for layout in layouts],
            "copies": copies,
            "fills": fills,
            "sources": {
                name: {
                    "shape": list(e.shape),
                    "dtype": e.dtype,
                    "state": e.state,
                    **({"note": e.note} if e.note else {}),
                }
                for name, e in self.sources.items()
            },
            "targets": {
                name: {
                    "shape": list(e.shape),
                    "dtype": e.dtype,
                    "state": e.state,
                    "rule": e.rule,
                    **({"tied_to": e.tied_to} if e.tied_to else {}),
                }
                for name, e in self.targets.items()
            },
            "inexact": self.inexact(),
        }

    def __str__(self) -> str:
        return visible(_text(self))


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return prod(shape) * item_size(dtype)


def _layout_json(layout: Pair) -> dict[str, Any]:
    return {
        "sizes": list(layout.sizes),
        "source": {"offset": layout.source_offset, "strides": list(layout.source_strides)},
        "target": {"offset": layout.target_offset, "strides": list(layout.target_strides)},
    }


def _text(plan: Plan) -> str:
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
