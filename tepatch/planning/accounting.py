"""Making a plan: meeting the four sides and accounting for every tensor, parameter and rule."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import replace
from math import prod
from typing import Any

from tepatch.dtypes import is_convertible
from tepatch.errors import PlanError, Problem
from tepatch.mapping import rules
from tepatch.mapping.names import NameTemplate
from tepatch.mapping.rules import Mapping, Node, Rule
from tepatch.mapping.values import BindError, Env
from tepatch.planning import problems
from tepatch.planning.bind import IDENTITY, Binder, Template
from tepatch.planning.plan import (
    Copy,
    Fill,
    Plan,
    RuleEntry,
    SourceEntry,
    Spec,
    TargetEntry,
    TensorSpec,
)
from tepatch.planning.problems import Missing
from tepatch.views import Pair, contiguous, pair, tiling_error

DROPPED = "dropped by the caller"
"""Why a source is ignored that nobody but the caller of ``make_plan`` wants to be."""
DTYPE_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


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
    planner = _Planner(mapping, config, sources, targets, ties or {}, spelling or {}, dropped)
    return planner.plan(patch=patch, location=location, notes=tuple(notes))


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
    scout = _Planner(mapping, config, like, targets, ties, spelling or {})
    scout.apply_all()
    needed: dict[str, TensorSpec] = {}
    for copy in scout.copies:
        needed.setdefault(copy.source, Spec(scout.shapes[copy.source][0], scout.target_entries[copy.target].dtype))
    for name, entry in scout.source_entries.items():
        if entry.state == "redundant" and name not in needed:
            needed[name] = targets[entry.note]
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


def requirement_problems(mapping: Mapping, config: MappingABC[str, Any]) -> list[Problem]:
    """What the mapping ``requires`` of a config and does not find there, each with the sentence it gives."""
    binder, out = Binder(mapping, config), []
    for requirement in mapping.requires:
        condition = requirement.condition
        try:
            if binder.holds(condition, {}):
                continue
        except BindError as error:
            out.append(error.problem)
            continue
        fields = sorted(name for name in condition.expression.names if name in config)
        out.append(
            Problem(
                where=condition.where,
                what=requirement.sentence,
                expected=str(condition),
                found=", ".join(f"config.{name} = {config[name]!r}" for name in fields),
                fix="this patch can not serve this model",
            )
        )
    return out


def count_problems(
    mapping: Mapping, config: MappingABC[str, Any], num_tensors: int, *, is_native: bool, where: str
) -> list[Problem]:
    """Captures with more values than a checkpoint of ``num_tensors`` has tensors for, found before a model is built.

    Where every name of a rule has the capture in it, each of its values needs a tensor of its own. ``is_native``: the
    checkpoint has the parameters' names, and not those of their sources.
    """
    binder, out = Binder(mapping, config), dict[str, Problem]()
    for rule in mapping.rules:
        try:
            domains = {name: binder.domain(name) for name in rule.target.captures}
            large = [name for name, domain in domains.items() if len(domain) > num_tensors and name not in out]
            if not large or (node := binder.choose(rule, {name: each[0] for name, each in domains.items()})) is None:
                continue
        except BindError:
            continue  # told with everything else that does not fit
        names = [rule.target] if is_native else list(rules.leaves(node))
        for name in large:
            if names and all(name in each.captures for each in names):
                count = mapping.captures[name]
                out[name] = Problem(
                    where=count.where,
                    what=f"the checkpoint can not have a tensor for each '{name}'",
                    expected=f"at most {num_tensors:,}, the number of tensors in {where}",
                    found=f"{len(domains[name]):,} ({count} in the config)",
                    fix=problems.CONFIG_FIX,
                )
    return list(out.values())


class _Planner:
    def __init__(
        self,
        mapping: Mapping,
        config: MappingABC[str, Any],
        sources: MappingABC[str, TensorSpec],
        targets: MappingABC[str, TensorSpec],
        ties: MappingABC[str, str],
        spelling: MappingABC[str, str],
        dropped: Collection[str] = (),
    ) -> None:
        self.mapping = mapping
        self.rules = (*mapping.rules, *([_rest_rule(mapping.base or "", mapping.rest)] if mapping.rest else []))
        self.spelling = spelling
        self.dropped = {name: spec for name, spec in sources.items() if name in dropped}
        self.all_sources = sources
        self.sources = {name: spec for name, spec in sources.items() if name not in dropped} if dropped else sources
        self.targets = targets
        self.ties = ties
        self.binder = Binder(mapping, config)
        self.problems = dict.fromkeys(requirement_problems(mapping, config))
        self.copies: list[Copy] = []
        self.fills: list[Fill] = []
        self.source_entries: dict[str, SourceEntry] = {}
        self.target_entries: dict[str, TargetEntry] = {}
        self.rule_entries: list[RuleEntry] = []
        self.shapes: dict[str, tuple[tuple[int, ...], int]] = {}
        """Shape that the rules expect of each source, and the first rule that says so."""
        self.tied: list[tuple[int, str, str]] = []
        """Ties: the rule, the parameter, and the other name that a checkpoint may have for its tensor."""
        self.stands_for: dict[str, str] = {}
        """Sources that are read in the place of the tensor that they are tied to."""
        self.present: set[tuple[str, int]] = set()
        """Captures and their values (layers, experts) for which some tensor was found."""
        # Problems that many layers share are gathered by rule, and told once.
        self.missing: dict[int, list[Missing]] = {}
        self.misshapen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[str]] = {}
        self.mistyped: dict[tuple[int, str, str], list[str]] = {}
        self.unknown_targets: dict[int, list[str]] = {}
        self.absent: set[int] = set()
        """Rules outside the base for a parameter that this class of model does not have."""
        self.unsettled: set[int] = set()
        """Rules that could not be applied: what they are for is not told as unused or not filled as well."""

    def apply_all(self) -> None:
        for index, rule in enumerate(self.mapping.rules):
            self.rule_entries.append(self._apply(index, rule))
        if self.mapping.rest and (rest := self._apply_rest()).count:
            self.rule_entries.append(rest)
        self._settle_ties()

    def plan(self, *, patch: str, location: str, notes: tuple[str, ...]) -> Plan:
        self.apply_all()
        self._check_consumption()
        free = self._check_rest()
        self._tell_gathered(free)
        if self.problems:
            count = len(self.problems)
            raise PlanError(
                self.problems,
                heading=f"{self.mapping.name} does not fit {location or 'the checkpoint'} "
                f"({count} problem{'s' if count > 1 else ''})",
            )
        order = {name: position for position, name in enumerate(self.targets)}
        return Plan(
            patch=patch,
            mapping=self.mapping.name,
            digest=self.mapping.digest,
            location=location,
            copies=tuple(self.copies),
            fills=tuple(self.fills),
            sources={name: self.source_entries[name] for name in self.all_sources},
            targets=dict(sorted(self.target_entries.items(), key=lambda item: order.get(item[0], len(order)))),
            rules=tuple(self.rule_entries),
            notes=(
                *notes,
                *(
                    f"the tied tensor {name} is stored under its other name, {other}"
                    for other, name in self.stands_for.items()
                ),
            ),
        )

    def _tell(self, problem: Problem) -> None:
        self.problems[problem] = None  # layers that share a problem share its text

    def _apply(self, index: int, rule: Rule) -> RuleEntry:
        count, applies = 0, False
        templates: dict[int, Template] = {}
        try:
            for env, target in self.binder.instances(rule):
                if (node := self.binder.choose(rule, env)) is None:
                    continue
                if self._is_absent(target):
                    self.absent.add(index)
                    continue
                applies = True
                if (earlier := self.target_entries.get(target)) is not None:
                    first = self.mapping.rules[earlier.rule].where
                    what = f"a second rule fills {target}"
                    self._tell(Problem(where=rule.where, what=what, found=f"first at {first}"))
                elif isinstance(node, rules.TieNode):
                    count += self._tie(index, rule, node, env, target)
                elif (spec := self.targets.get(target)) is None:
                    self.unknown_targets.setdefault(index, []).append(target)
                    self.unsettled.add(index)
                else:
                    template = self._fill(index, node, env, target, spec)
                    templates[id(template)] = template
                    count += 1
        except BindError as error:
            self._tell(error.problem)
            self.unsettled.add(index)
        sources = dict.fromkeys(piece.source.text for template in templates.values() for piece in template.pieces)
        return RuleEntry(rule.where, rule.target.text, "used" if applies else "off", count, tuple(sources))

    def _is_outside(self, target: str) -> bool:
        """Whether a parameter is outside the base: of a head, or of a model around it."""
        return self.mapping.base is not None and not rules.is_below(target, self.mapping.base)

    def _is_absent(self, target: str) -> bool:
        return self._is_outside(target) and target not in self.targets and target not in self.ties

    def _apply_rest(self) -> RuleEntry:
        """Every parameter outside the base that no rule is for is the source of its own name; ties are the model's."""
        index, count = len(self.mapping.rules), 0
        taken = [rule.target.pattern for rule in self.mapping.rules]
        absent = [(self.rules[each], name.pattern) for each in sorted(self.absent) for name in self._leaves(each)]
        for target in (*self.targets, *self.ties):
            if not self._is_outside(target) or any(pattern.match(target) for pattern in taken):
                continue
            source = self.spelling.get(target, target)
            count += 1
            if target in self.ties:
                self._take_tie(index, target, self.ties[target], source)
                continue
            spec = self.targets[target]
            shape = tuple(spec.shape)
            self.target_entries[target] = TargetEntry(shape, spec.dtype, "filled", index)
            self.copies.append(Copy(source, target, pair(contiguous(shape), shape), IDENTITY, index))
            self.shapes.setdefault(source, (shape, index))
            self._check_source(index, Missing(source, target, (), 1), shape, spec.dtype)
            for rule, pattern in absent:
                if pattern.match(source):
                    self._tell(problems.lost(rule, source, target))
        rest = self.rules[index]
        return RuleEntry(rest.where, rest.target.text, "used", count)

    def _check_source(self, index: int, wanted: Missing, shape: tuple[int, ...], dtype: str) -> bool:
        """Whether a source is there; what is wrong with it is noted."""
        name = wanted.source
        if (found := self.sources.get(name)) is None:
            self.missing.setdefault(index, []).append(wanted)
            return False
        if tuple(found.shape) != shape:
            self.misshapen.setdefault((index, shape, tuple(found.shape)), []).append(name)
        if not is_convertible(found.dtype, dtype):
            self.mistyped.setdefault((index, found.dtype, dtype), []).append(name)
        return True

    def _fill(self, index: int, node: Node, env: Env, target: str, spec: TensorSpec) -> Template:
        # The entry stands even if the rule does not fit: one problem, not also "no rule fills it".
        dtype = DTYPE_CODES[node.cast] if node.cast else spec.dtype
        self.target_entries[target] = TargetEntry(tuple(spec.shape), dtype, "filled", index)
        template, names = self._best_alternative(node, env, tuple(spec.shape))
        if not template.pieces:
            self.target_entries[target] = TargetEntry(tuple(spec.shape), dtype, "created", index)
        for fill in template.fills:
            self.fills.append(Fill(target, fill.pair, fill.value, index))
        for piece, name in zip(template.pieces, names, strict=True):
            self.copies.append(Copy(name, target, piece.pair, piece.affine, index))
            shape, first = self.shapes.setdefault(name, (piece.shape, index))
            if shape != piece.shape:
                self._tell(
                    Problem(
                        where=piece.where,
                        what=f"rules expect different shapes of {name}",
                        details=(f"{list(shape)} by the rule at {self.mapping.rules[first].where}",),
                        found=f"{list(piece.shape)} here",
                    )
                )
            captures = (*env.items(), *piece.extra)
            if self._check_source(index, Missing(name, target, captures, len(template.pieces)), piece.shape, dtype):
                self.present.update(captures)
        return template

    def _best_alternative(self, node: Node, env: Env, shape: tuple[int, ...]) -> tuple[Template, list[str]]:
        """The first alternative with all sources in the checkpoint, or else the one that lacks the fewest."""
        found: list[tuple[int, Template, list[str]]] = []
        for choice in self.binder.expand(node):
            template = self.binder.template(choice, shape, env)
            self.binder.spend(len(template.pieces), choice.where)
            names = [self.binder.name(p.source, env | dict(p.extra), p.where) for p in template.pieces]
            found.append((sum(name not in self.sources for name in names), template, names))
            if found[-1][0] == 0:
                break
        _, template, names = min(found, key=lambda each: each[0])
        return template, names

    def _tie(self, index: int, rule: Rule, node: rules.TieNode, env: Env, target: str) -> int:
        to, source = (self.binder.name(name, env, rule.where) for name in (node.to, node.source))
        actual = self.ties.get(target, "")
        if actual != to:
            is_parameter = target in self.targets
            self._tell(problems.wrong_tie(rule, target, to, actual=actual, is_parameter=is_parameter))
            self.unsettled.add(index)
            return 0
        self._take_tie(index, target, to, source)
        return 1

    def _take_tie(self, index: int, target: str, to: str, source: str) -> None:
        spec = self.targets[to]
        self.target_entries[target] = TargetEntry(tuple(spec.shape), spec.dtype, "tied", index, to)
        self.tied.append((index, to, source))

    def _settle_ties(self) -> None:
        """A tied tensor may be stored under any of its names; under a second one it is a copy, to be compared."""
        made_of: dict[str, set[str]] = {}
        for copy in self.copies if self.tied else ():
            made_of.setdefault(copy.target, set()).add(copy.source)
        for index, to, other in self.tied:
            if (found := self.sources.get(other)) is None or other in self.shapes:
                continue
            name = next(iter(made_of.get(to, ())), "")
            if len(made_of.get(to, ())) == 1 and name in self.shapes and name not in self.sources:
                self._read_instead(other, name, to)
                continue
            spec = self.targets[to]
            if tuple(found.shape) != tuple(spec.shape):
                self.misshapen.setdefault((index, tuple(spec.shape), tuple(found.shape)), []).append(other)
            if not is_convertible(found.dtype, spec.dtype):
                self.mistyped.setdefault((index, found.dtype, spec.dtype), []).append(other)
            self.source_entries[other] = SourceEntry(tuple(found.shape), found.dtype, "redundant", to)

    def _read_instead(self, other: str, name: str, to: str) -> None:
        """Read ``other`` in the place of ``name``, which is not there: they are one tensor of the stock model."""
        self.stands_for[other] = name
        self.copies = [replace(copy, source=other) if copy.source == name else copy for copy in self.copies]
        shape, rule = self.shapes[other] = self.shapes.pop(name)
        for index, entries in self.missing.items():
            for entry in entries:
                self.present.update(entry.captures if entry.source == name else ())
            self.missing[index] = [entry for entry in entries if entry.source != name]
        self._check_source(rule, Missing(other, to, (), 1), shape, self.target_entries[to].dtype)

    def _check_consumption(self) -> None:
        """Each source's views must tile it: every element goes somewhere, none goes to two places."""
        used: dict[str, list[Copy]] = {}
        for copy in self.copies:
            used.setdefault(copy.source, []).append(copy)
        proven: dict[tuple[Any, ...], str | None] = {}
        consumed: dict[tuple[tuple[str, ...], str], dict[str, list[str]]] = {}
        for name, copies in used.items():
            shape = self.shapes[name][0]
            key = (shape, *(copy.pair for copy in copies))
            if key not in proven:
                proven[key] = _consumption_error([copy.pair for copy in copies], prod(shape))
            if (wrong := proven[key]) is not None:
                by = tuple(dict.fromkeys(self.rules[copy.rule].where for copy in copies))
                consumed.setdefault((by, wrong), {})[name] = [copy.target for copy in copies]
            if (spec := self.sources.get(name)) is not None:
                note = self.stands_for.get(name, "")
                self.source_entries[name] = SourceEntry(tuple(spec.shape), spec.dtype, "used", note)
        for (by, wrong), uses in consumed.items():
            self._tell(problems.not_consumed_once(by, uses, wrong))

    def _check_rest(self) -> list[str]:
        """What no rule touched, on both sides. Returns the sources that are not accounted for."""
        for name, spec in self.dropped.items():
            self.source_entries[name] = SourceEntry(tuple(spec.shape), spec.dtype, "ignored", DROPPED)
        free = [name for name in self.sources if name not in self.source_entries]
        for ignored in self.mapping.ignored:
            for name in free:
                if ignored.source.pattern.match(name):
                    spec = self.sources[name]
                    self.source_entries[name] = SourceEntry(tuple(spec.shape), spec.dtype, "ignored", ignored.reason)
            free = [name for name in free if name not in self.source_entries]
        excused = list(self._excused())
        groups: dict[tuple[str, str], list[str]] = {}
        for name in free:
            if not any(pattern.match(name) for pattern in excused):
                groups.setdefault(self._explain_unexpected(name), []).append(name)
        for (reason, fix), names in groups.items():
            has_base = self.mapping.base is not None
            others = self.sources.keys() - set(names)
            self._tell(problems.unexpected(self.mapping.name, names, reason, fix, can_drop=has_base, others=others))
        uncovered = [
            name
            for name in self.targets
            if name not in self.target_entries and not any(pattern.match(name) for pattern in excused)
        ]
        if uncovered:
            self._tell(problems.uncovered(self.mapping.name, uncovered))
        for alias, to in self.ties.items():
            if alias not in self.target_entries and not any(pattern.match(alias) for pattern in excused):
                self._tell(problems.unsaid_tie(self.mapping.name, alias, to))
        return free

    def _excused(self) -> Iterator[Any]:
        """Patterns of the names that a rule which could not be applied stands for."""
        for index in sorted(self.unsettled):
            yield self.rules[index].target.pattern
            yield from (name.pattern for name in self._leaves(index))

    def _leaves(self, index: int) -> Iterator[NameTemplate]:
        return (name for node in self.rules[index].choices for name in rules.leaves(node))

    def _explain_unexpected(self, name: str) -> tuple[str, str]:
        captures = self.mapping.captures
        for template in rules.source_names(self.mapping):
            match = template.pattern.match(name)
            for field, text in zip(template.fields, match.groups() if match else (), strict=False):
                if field.text in captures and int(text) not in (domain := self.binder.domain(field.text)):
                    return problems.beyond(field.text, captures[field.text], domain)
        return "", ""

    def _tell_gathered(self, free: Sequence[str]) -> None:
        for capture, count in self.mapping.captures.items():
            entries = [entry for each in self.missing.values() for entry in each]
            needed = {dict(entry.captures).get(capture) for entry in entries} - {None}
            absent = {value for value in needed if value is not None and (capture, value) not in self.present}
            if not absent or len(absent) == len(self.binder.domain(capture)):
                continue  # if nothing at all was found, the names are to blame and not the count

            def is_whole(entry: Missing, capture: str = capture, absent: set[int] = absent) -> bool:
                return dict(entry.captures).get(capture) in absent

            names = [entry.source for entry in entries if is_whole(entry)]
            self._tell(problems.nothing_for(capture, count, sorted(absent), names))
            self.missing = {i: [e for e in each if not is_whole(e)] for i, each in self.missing.items()}
        for index, entries in self.missing.items():
            if entries and index == len(self.mapping.rules):
                lost = {entry.source: entry.target for entry in entries}
                others = (self.targets.keys() | self.ties.keys()) - set(lost.values())
                self._tell(problems.missing_outside(self.rules[index], lost, free, others))
            elif entries:
                self._tell(problems.missing(self.rules[index], entries, free))
        for (index, expected, found), names in self.misshapen.items():
            problem = problems.misshapen(self.rules[index], names, expected, found)
            fix = _turning_fix(self.rules[index], names[0]) if _is_turned(expected, found) else ""
            self._tell(replace(problem, fix=f"{fix}; else {problem.fix}") if fix else problem)
        for (index, found_dtype, wanted), names in self.mistyped.items():
            self._tell(problems.mistyped(self.rules[index], names, wanted, found_dtype))
        for index, names in self.unknown_targets.items():
            rule, tied_to = self.rules[index], self.ties.get(names[0], "")
            self._tell(problems.unknown_targets(rule, names, list(self.targets), tied_to))


def _rest_rule(base: str, where: str) -> Rule:
    """What stands for ``rest: same`` among the rules. No name matches it: it is for what is left."""
    text = f"every parameter outside '{base}'"
    return Rule(where=where, target=NameTemplate(text, (text,), ()), conditions=(), choices=())


def _is_turned(expected: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Whether a shape is the expected one with the last two dimensions swapped, which is what ``transpose`` does."""
    return len(expected) > 1 and found == (*expected[:-2], expected[-1], expected[-2])


def _turning_fix(rule: Rule, name: str) -> str:
    """How the rule would take a tensor that is turned over; empty for a copy of a tied one, which no rule turns."""
    if not rule.choices:
        return "if the checkpoint stores it turned over, add a rule for it with 'transpose: true'"
    todo = [(node, False) for node in rule.choices]
    while todo:
        node, is_turning = todo.pop()
        is_turning ^= sum(isinstance(step, rules.Transpose) for step in node.axes) % 2 == 1
        if isinstance(node, rules.Leaf) and node.source.pattern.match(name):
            how = "take 'transpose: true' out of" if is_turning else "put 'transpose: true' to it in"
            return f"if the checkpoint stores it turned over, {how} the rule"
        todo += [(child, is_turning) for child in rules.children(node)]
    return ""


def _consumption_error(pairs: list[Pair], numel: int) -> str | None:
    if len(pairs) == 1 and pairs[0].numel == numel:
        return None  # one view with all elements of a contiguous tensor, each at its own place
    if sum(one.numel for one in pairs) > numel:
        return "used twice"
    return tiling_error([one.source_view() for one in pairs], numel)
