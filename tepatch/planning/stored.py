"""A plan that was saved as JSON, read back: ``plan_from_json`` is the inverse of ``Plan.to_json``.

A stored plan is compared with one of today (``tepatch plan --diff``), or looked at. It may have been edited by hand or
come from anywhere, so nothing in it is believed: every field is checked, and what the planner proved of a plan (views
inside their tensors, every element in one place) is proven again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from collections.abc import Mapping as MappingABC
from math import isfinite, prod
from os import PathLike
from pathlib import Path
from typing import Any, cast

from tepatch.dtypes import is_convertible
from tepatch.errors import PlanError, Problem
from tepatch.planning.bind import IDENTITY, Affine
from tepatch.planning.plan import Copy, Fill, Plan, RuleEntry, SourceEntry, TargetEntry
from tepatch.views import Pair, View, tiling_error

FORMAT = "tepatch-plan-1"

MAX_BYTES = 200_000_000
"""Size of a stored plan. One of 36,945 tensors has 9 MB."""
MAX_PROBLEMS = 20
"""Problems that are told; the rest is counted."""
MAX_DIMENSIONS = 64
"""Dimensions of a tensor, and of a view: as many as torch can have."""
MAX_SIZE = 1 << 62
"""Sizes, strides and offsets: as large as those of a mapping's expressions."""

_KEYS = (
    *("format", "patch", "mapping", "digest", "location", "source_bytes", "target_bytes", "notes"),
    *("rules", "layouts", "copies", "fills", "sources", "targets", "inexact"),
)
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,31}\Z")


def read_plan(path: str | PathLike[str]) -> Plan:
    """The plan in a file that ``tepatch plan --json`` wrote.

    Raises ``PlanError`` if the file can not be read, is not strict JSON (UTF-8, no key twice, no NaN), or as
    ``plan_from_json``.
    """
    where = str(path)
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise PlanError(Problem(where=where, what="is not a regular file"))
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PlanError(Problem(where=where, what="can not be read", found=error.strerror or str(error))) from None
    if len(text) > MAX_BYTES:
        raise PlanError(Problem(where=where, what=f"is larger than {MAX_BYTES:,} bytes: this is not a plan"))
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except RecursionError:
        raise PlanError(Problem(where=where, what="is not JSON that can be read", found="too many brackets")) from None
    except ValueError as error:
        raise PlanError(
            Problem(
                where=where,
                what="is not JSON in UTF-8",
                found=str(error),
                fix="write it with 'tepatch plan PATCH LOCATION --json > FILE'",
            )
        ) from None
    try:
        return plan_from_json(data)
    except PlanError as error:
        raise PlanError(error.problems, heading=f"{where} is not a plan that can be used") from None


def plan_from_json(data: object) -> Plan:
    """The plan that ``Plan.to_json`` made ``data`` of.

    Raises ``PlanError``; ``where`` of each problem is the place in the JSON: ``copies[3].layout``. Besides types it
    checks that names and indices refer to entries, that views lie inside their tensors and tile them, and that what
    follows from the rest (bytes, counts, what is inexact) is what it follows.
    """
    reader = _Reader()
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise PlanError(_no_plan(data))
    plan = reader.plan(data)
    reader.stop_if_wrong()
    _Checker(reader, plan).check(cast("dict[str, Any]", data))
    reader.stop_if_wrong()
    return plan


class _Reader:
    """Reads field by field. What is wrong is noted and replaced by something harmless, so that all is told at once."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.untold = 0

    def stop_if_wrong(self) -> None:
        if self.problems:
            rest = [Problem(where="", what=f"... and {self.untold} more problems")] if self.untold else []
            raise PlanError([*self.problems, *rest], heading="not a plan that can be used")

    def tell(self, where: str, what: str, *, expected: str = "", found: object = "") -> None:
        if len(self.problems) == MAX_PROBLEMS:
            self.untold += 1
        else:
            self.problems.append(Problem(where=where, what=what, expected=expected, found=_shown(found)))

    def plan(self, data: object) -> Plan:
        top = self.fields(data, "", _KEYS, ("direction",))
        direction = top.get("direction", "load")  # plans of the first version could only load
        if direction not in ("load", "save"):
            self.tell("direction", "is none", expected="load or save", found=direction)
        rules = tuple(self.rule(each, at) for at, each in self.items(top, "rules"))
        layouts = [self.layout(each, at) for at, each in self.items(top, "layouts")]
        copies = [self.copy(each, at, layouts, len(rules)) for at, each in self.items(top, "copies")]
        fills = [self.fill(each, at, layouts, len(rules)) for at, each in self.items(top, "fills")]
        return Plan(
            **{key: self.text(top.get(key, ""), key) for key in ("patch", "mapping", "digest", "location")},
            copies=tuple(copies),
            fills=tuple(fills),
            sources={name: self.source(each, at) for name, at, each in self.entries(top, "sources")},
            targets={name: self.target(each, at, len(rules)) for name, at, each in self.entries(top, "targets")},
            rules=rules,
            notes=tuple(self.lines(each, at) for at, each in self.items(top, "notes")),
            is_reversed=direction == "save",
        )

    def rule(self, data: object, at: str) -> RuleEntry:
        one = self.fields(data, at, ("where", "target", "state", "count", "sources"))
        return RuleEntry(
            where=self.text(one.get("where", ""), f"{at}.where"),
            target=self.text(one.get("target", ""), f"{at}.target"),
            state=self.choice(one, at, ("used", "off")),
            count=self.number(one.get("count", 0), f"{at}.count"),
            sources=tuple(self.text(each, place) for place, each in self.items(one, "sources", at)),
        )

    def layout(self, data: object, at: str) -> Pair:
        one = self.fields(data, at, ("sizes", "source", "target"))
        sizes = self.numbers(one.get("sizes", []), f"{at}.sizes")
        sides = []
        for side in ("source", "target"):
            here = self.fields(one.get(side, {}), f"{at}.{side}", ("offset", "strides"))
            strides = self.numbers(here.get("strides", []), f"{at}.{side}.strides")
            if len(strides) != len(sizes):
                self.tell(f"{at}.{side}.strides", "needs one stride for each of sizes", found=strides)
            elif prod(sizes) and not all(strides):
                self.tell(f"{at}.{side}.strides", "a stride of 0 shows one element many times", found=strides)
            sides.append((strides, self.number(here.get("offset", 0), f"{at}.{side}.offset")))
        (source, source_offset), (target, target_offset) = sides
        return Pair(sizes, source, target, source_offset, target_offset)

    def copy(self, data: object, at: str, layouts: list[Pair], rules: int) -> Copy:
        one = self.fields(data, at, ("source", "target", "layout", "rule"), ("affine",))
        return Copy(
            source=self.text(one.get("source", ""), f"{at}.source"),
            target=self.text(one.get("target", ""), f"{at}.target"),
            pair=self.chosen(layouts, one.get("layout", 0), f"{at}.layout"),
            affine=self.affine(one["affine"], f"{at}.affine") if "affine" in one else IDENTITY,
            rule=self.index(one.get("rule", 0), f"{at}.rule", rules),
        )

    def fill(self, data: object, at: str, layouts: list[Pair], rules: int) -> Fill:
        one = self.fields(data, at, ("target", "layout", "value", "rule"))
        return Fill(
            target=self.text(one.get("target", ""), f"{at}.target"),
            pair=self.chosen(layouts, one.get("layout", 0), f"{at}.layout"),
            value=self.real(one.get("value", 0.0), f"{at}.value"),
            rule=self.index(one.get("rule", 0), f"{at}.rule", rules),
        )

    def source(self, data: object, at: str) -> SourceEntry:
        one = self.fields(data, at, ("shape", "dtype", "state"), ("note",))
        shape, dtype = self.spec(one, at)
        state = self.choice(one, at, ("used", "ignored", "redundant"))
        return SourceEntry(shape, dtype, state, self.lines(one.get("note", ""), f"{at}.note"))

    def target(self, data: object, at: str, rules: int) -> TargetEntry:
        one = self.fields(data, at, ("shape", "dtype", "state", "rule"), ("tied_to",))
        shape, dtype = self.spec(one, at)
        state = self.choice(one, at, ("filled", "created", "tied"))
        rule = self.index(one.get("rule", 0), f"{at}.rule", rules)
        return TargetEntry(shape, dtype, state, rule, self.text(one.get("tied_to", ""), f"{at}.tied_to"))

    def spec(self, one: dict[str, Any], at: str) -> tuple[tuple[int, ...], str]:
        shape = self.numbers(one.get("shape", []), f"{at}.shape")
        if prod(shape) > MAX_SIZE:
            self.tell(f"{at}.shape", "has more elements than any tensor", found=shape)
        dtype = self.text(one.get("dtype", "F32"), f"{at}.dtype")
        if not _DTYPE.match(dtype):
            self.tell(f"{at}.dtype", "is not the code of a dtype", expected="such as BF16", found=dtype)
        return shape, dtype

    # -- fields --

    def fields(self, data: object, at: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
        if not isinstance(data, dict):
            self.tell(at, "must be a JSON object", found=data)
            return {}
        for key in needed:
            if key not in data:
                self.tell(f"{at}.{key}".lstrip("."), "is missing")
        for key in data:
            if key not in needed and key not in optional:
                self.tell(at, f"'{_shown(key)}' has no meaning here", expected=", ".join((*needed, *optional)))
        return data

    def items(self, one: dict[str, Any], key: str, at: str = "") -> Iterator[tuple[str, object]]:
        at = f"{at}.{key}".lstrip(".")
        values = one.get(key, [])
        if not isinstance(values, list):
            self.tell(at, "must be a JSON array", found=values)
            return
        yield from ((f"{at}[{index}]", value) for index, value in enumerate(values))

    def entries(self, one: dict[str, Any], key: str) -> Iterator[tuple[str, str, object]]:
        values = one.get(key, {})
        if not isinstance(values, dict):
            self.tell(key, "must be a JSON object", found=values)
            return
        for name, value in values.items():
            at = f"{key}[{json.dumps(name)}]"
            if not name or not name.isprintable():
                self.tell(at, "is not the name of a tensor")
            yield name, at, value

    def text(self, value: object, at: str) -> str:
        if not isinstance(value, str):
            self.tell(at, "must be a string", found=value)
        elif value and not value.isprintable():
            # It is shown on terminals, which would obey what it says.
            self.tell(at, "holds characters that can not be printed", found=value)
        else:
            return value
        return ""

    def lines(self, value: object, at: str) -> str:
        """Text that a mapping file may have in several lines."""
        return (
            "\n".join(self.text(line, at) for line in value.split("\n"))
            if isinstance(value, str)
            else self.text(value, at)
        )

    def choice(self, one: dict[str, Any], at: str, allowed: tuple[str, ...]) -> Any:
        value = one.get("state", allowed[0])
        if value not in allowed:
            self.tell(f"{at}.state", "is none", expected=", ".join(allowed), found=value)
            return allowed[0]
        return value

    def number(self, value: object, at: str) -> int:
        if type(value) is int and 0 <= value <= MAX_SIZE:  # true and false are whole numbers too, for Python
            return value
        self.tell(at, "must be a whole number from 0 to 2^62", found=value)
        return 0

    def numbers(self, value: object, at: str) -> tuple[int, ...]:
        if not isinstance(value, list):
            self.tell(at, "must be a JSON array of whole numbers", found=value)
            return ()
        if len(value) > MAX_DIMENSIONS:
            self.tell(at, f"has more than {MAX_DIMENSIONS} entries")
            return ()
        return tuple(self.number(each, f"{at}[{index}]") for index, each in enumerate(value))

    def real(self, value: object, at: str) -> float:
        if isinstance(value, float) and isfinite(value):
            return value
        # Whole numbers stay whole, so that a plan comes back as it was.
        if type(value) is int and abs(value) <= MAX_SIZE:
            return value
        self.tell(at, "must be a finite number", found=value)
        return 0.0

    def affine(self, value: object, at: str) -> Affine:
        if not isinstance(value, list) or len(value) != 2:
            self.tell(at, "must be [scale, offset]", found=value)
            return IDENTITY
        scale, offset = (self.real(each, f"{at}[{index}]") for index, each in enumerate(value))
        if scale == 0:
            self.tell(f"{at}[0]", "a scale of 0 has no inverse")
        return Affine(scale, offset)

    def index(self, value: object, at: str, count: int) -> int:
        if type(value) is int and 0 <= value < count:
            return value
        self.tell(at, f"refers to none of {count}", found=value)
        return 0

    def chosen(self, layouts: list[Pair], value: object, at: str) -> Pair:
        index = self.index(value, at, len(layouts))
        return layouts[index] if index < len(layouts) else Pair((1,), (1,), (1,), 0, 0)


class _Checker:
    """What a plan that is well formed must keep besides: the promises that the planner gives of its own."""

    def __init__(self, reader: _Reader, plan: Plan) -> None:
        self.tell = reader.tell
        self.reader = reader
        self.plan = plan
        self.proven: dict[tuple[int, tuple[View, ...]], str | None] = {}
        """Layers share their layouts, and what was found of them."""

    def check(self, data: dict[str, Any]) -> None:
        from_source: dict[str, list[View]] = {}
        in_target: dict[str, list[View]] = {}
        for index, copy in enumerate(self.plan.copies):
            at = f"copies[{index}]"
            source, target = self.plan.sources.get(copy.source), self.plan.targets.get(copy.target)
            self._check_entry(f"{at}.source", source, "sources", copy.source, "used")
            self._check_entry(f"{at}.target", target, "targets", copy.target, "filled")
            if source and self._is_inside(at, "source", copy.pair.source_view(), source.shape):
                from_source.setdefault(copy.source, []).append(copy.pair.source_view())
            if target and self._is_inside(at, "target", copy.pair.target_view(), target.shape):
                in_target.setdefault(copy.target, []).append(copy.pair.target_view())
            if source and target and not is_convertible(source.dtype, target.dtype):
                self.tell(at, f"{source.dtype} can not become {target.dtype}")
        for index, fill in enumerate(self.plan.fills):
            at = f"fills[{index}]"
            target = self.plan.targets.get(fill.target)
            self._check_entry(f"{at}.target", target, "targets", fill.target, "filled", "created")
            if target and self._is_inside(at, "target", fill.pair.target_view(), target.shape):
                in_target.setdefault(fill.target, []).append(fill.pair.target_view())
        if self.reader.problems:
            return  # what is missing there would be told again as what is not covered
        self._check_sources(from_source)
        self._check_targets(in_target)
        if not self.reader.problems:
            self._check_what_follows(data)

    def _check_entry(
        self, at: str, entry: SourceEntry | TargetEntry | None, kind: str, name: str, *states: str
    ) -> None:
        if entry is None:
            self.tell(at, f"is not one of {kind}", found=name)
        elif entry.state not in states:
            self.tell(at, f"{name} is {entry.state} there", expected=" or ".join(states))

    def _is_inside(self, at: str, side: str, view: View, shape: tuple[int, ...]) -> bool:
        atoms = [atom for dim in view.dims for atom in dim]
        numel = prod(shape)
        if any(size == 0 for size, _ in atoms):
            is_inside = view.offset <= numel
        else:
            is_inside = view.offset + sum((size - 1) * stride for size, stride in atoms) < numel
        if not is_inside:
            self.tell(f"{at}.layout", f"reaches outside its {side} {list(shape)}")
        return is_inside

    def _check_sources(self, views: MappingABC[str, list[View]]) -> None:
        for name, entry in self.plan.sources.items():
            at = f"sources[{json.dumps(name)}]"
            if entry.state == "used":
                self._check_tiling(at, views.get(name, ()), entry.shape)
            elif entry.state == "redundant":
                other = self.plan.targets.get(entry.note)
                if other is None or other.state == "tied":
                    self.tell(f"{at}.note", "is not a parameter that it can be a copy of", found=entry.note)
                elif other.shape != entry.shape or not is_convertible(entry.dtype, other.dtype):
                    self.tell(at, f"can not be a copy of {entry.note}")

    def _check_targets(self, views: MappingABC[str, list[View]]) -> None:
        made = {copy.target for copy in self.plan.copies}
        counts = [0] * len(self.plan.rules)
        for name, entry in self.plan.targets.items():
            at = f"targets[{json.dumps(name)}]"
            counts[entry.rule] += 1
            if (entry.state == "tied") != bool(entry.tied_to):
                self.tell(f"{at}.tied_to", "belongs to a parameter that is tied, and only there")
            elif entry.state == "tied":
                other = self.plan.targets.get(entry.tied_to)
                if other is None or other.state == "tied" or (other.shape, other.dtype) != (entry.shape, entry.dtype):
                    self.tell(f"{at}.tied_to", "is not a parameter that it can be", found=entry.tied_to)
            elif entry.state == "filled" and name not in made:
                self.tell(f"{at}.state", "is filled by no copy")
            else:
                self._check_tiling(at, views.get(name, ()), entry.shape)
        for index, (rule, count) in enumerate(zip(self.plan.rules, counts, strict=True)):
            if rule.count != count:
                self.tell(f"rules[{index}].count", "is not the number of its parameters", found=rule.count)
            if count and rule.state == "off":
                self.tell(f"rules[{index}].state", "is off, but parameters name this rule")

    def _check_tiling(self, at: str, views: Iterable[View], shape: tuple[int, ...]) -> None:
        key = (prod(shape), tuple(views))
        if key not in self.proven:
            self.proven[key] = tiling_error(key[1], key[0])
        if (wrong := self.proven[key]) is not None:
            self.tell(at, "its parts do not tile it", found=wrong)

    def _check_what_follows(self, data: dict[str, Any]) -> None:
        for key, value in (("source_bytes", self.plan.source_bytes), ("target_bytes", self.plan.target_bytes)):
            if data[key] != value:
                self.tell(key, "is not what follows from the rest", expected=str(value), found=data[key])
        # The names only: another version may have told the reasons in other words.
        names, found = sorted(self.plan.inexact()), data["inexact"]
        if not isinstance(found, dict) or sorted(found) != names:
            expected = ", ".join(names) or "nothing"
            self.tell("inexact", "is not what follows from the rest", expected=_shown(expected), found=found)


def _no_plan(data: dict[Any, Any]) -> Problem:
    if "error" in data and "format" not in data:
        what = "holds the errors of a plan that could not be made, and no plan"
        return Problem(where="error", what=what, fix="put them right, then save the plan again")
    return Problem(
        where="format",
        what="is not the format of a plan that this version reads",
        expected=FORMAT,
        found=_shown(data.get("format")),
        fix="save the plan again, with 'tepatch plan PATCH LOCATION --json > FILE'",
    )


def _shown(value: object) -> str:
    """A value of JSON in a message: short, and with nothing in it that a terminal would obey."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"'{_shown(key)}' stands twice in one object")
            seen.add(key)
    return out


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")
