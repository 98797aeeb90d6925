"""Applying a mapping's rules to one model and one checkpoint: what each rule reads, and what is wrong with that."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as MappingABC
from dataclasses import replace
from typing import Any

from tepatch.dtypes import is_convertible
from tepatch.errors import Problem
from tepatch.mapping import rules
from tepatch.mapping.names import NameTemplate
from tepatch.mapping.rules import Mapping, Node, Rule
from tepatch.mapping.values import BindError, Env
from tepatch.planning import problems
from tepatch.planning.bind import IDENTITY, Binder, Template
from tepatch.planning.plan import Copy, Fill, RuleEntry, SourceEntry, TargetEntry, TensorSpec
from tepatch.planning.problems import Missing
from tepatch.views import contiguous, pair


class AppliedRules:
    """The rules of a mapping, each applied to all the targets that it stands for.

    Nothing is raised. What is wrong with one rule is in ``problems``; what many layers share (a tensor that is missing,
    misshapen, ...) is gathered by rule, to be told once. A rule's number is its place in ``rules``.
    """

    def __init__(
        self,
        mapping: Mapping,
        config: MappingABC[str, Any],
        sources: MappingABC[str, TensorSpec],
        targets: MappingABC[str, TensorSpec],
        ties: MappingABC[str, str],
        spelling: MappingABC[str, str],
    ) -> None:
        self.mapping = mapping
        self.rules = (*mapping.rules, _implied_rule(mapping))
        self.spelling = spelling
        self.sources = sources
        self.targets = targets
        self.ties = ties
        self.binder = Binder(mapping, config)
        self.problems: dict[Problem, None] = {}
        self.copies: list[Copy] = []
        self.fills: list[Fill] = []
        self.redundant: dict[str, SourceEntry] = {}
        """Second copies of tied tensors."""
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
        self.missing: dict[int, list[Missing]] = {}
        self.misshapen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[str]] = {}
        """Sources by rule, shape that is expected, and shape."""
        self.mistyped: dict[tuple[int, str, str], list[str]] = {}
        """Sources by rule, dtype, and dtype of the parameter."""
        self.unknown_targets: dict[int, list[str]] = {}
        self.absent: set[int] = set()
        """Rules outside the base for a parameter that this class of model does not have."""
        self.unsettled: set[int] = set()
        """Rules that could not be applied: what they are for is not told as unused or not filled as well."""
        for index, rule in enumerate(mapping.rules):
            self.rule_entries.append(self._apply(index, rule))
        if (implied := self._apply_implied()).count:
            self.rule_entries.append(implied)
        self._settle_ties()

    def unsettled_names(self) -> list[NameTemplate]:
        """Targets and sources of the rules that could not be applied."""
        return [
            name for index in sorted(self.unsettled) for name in (self.rules[index].target, *self.sources_of(index))
        ]

    def sources_of(self, index: int) -> Iterator[NameTemplate]:
        """The source names in a rule."""
        return (name for node in self.rules[index].choices for name in rules.leaves(node))

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
                elif target in self.ties:
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
        sources = dict.fromkeys(piece.source.text for template in templates.values() for piece in template.sources)
        return RuleEntry(rule.where, rule.target.text, "used" if applies else "off", count, tuple(sources))

    def _is_outside(self, target: str) -> bool:
        """Whether a parameter is outside the base: of a head, or of a model around it."""
        return self.mapping.base is not None and not rules.is_below(target, self.mapping.base)

    def _is_absent(self, target: str) -> bool:
        return self._is_outside(target) and target not in self.targets and target not in self.ties

    def _apply_implied(self) -> RuleEntry:
        """What needs no rule: the model's ties, and with ``rest`` each parameter outside the base is its own source."""
        index, count = len(self.mapping.rules), 0
        taken = [rule.target.pattern for rule in self.mapping.rules]
        absent = [(self.rules[each], name.pattern) for each in sorted(self.absent) for name in self.sources_of(each)]
        for target, spec in self.targets.items() if self.mapping.rest else ():
            if not self._is_outside(target) or any(pattern.match(target) for pattern in taken):
                continue
            source, shape = self.spelling.get(target, target), tuple(spec.shape)
            count += 1
            self.target_entries[target] = TargetEntry(shape, spec.dtype, "filled", index)
            self.copies.append(Copy(source, target, pair(contiguous(shape), shape), IDENTITY, index))
            self.shapes.setdefault(source, (shape, index))
            self._check_source(index, Missing(source, target, (), 1), shape, spec.dtype)
            for rule, pattern in absent:
                if pattern.match(source):
                    self._tell(problems.lost(rule, source, target))
        for target in self.ties:
            if target not in self.target_entries:
                self._take_tie(index, target, self.spelling.get(target, target))
                count += 1
        rule = self.rules[index]
        return RuleEntry(rule.where, rule.target.text, "used", count)

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
        self.target_entries[target] = TargetEntry(tuple(spec.shape), spec.dtype, "filled", index)
        template, names = self._best_alternative(node, env, tuple(spec.shape))
        if not template.sources:
            self.target_entries[target] = TargetEntry(tuple(spec.shape), spec.dtype, "created", index)
        for fill in template.fills:
            self.fills.append(Fill(target, fill.pair, fill.value, index))
        for piece, name in zip(template.sources, names, strict=True):
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
            if self._check_source(
                index, Missing(name, target, captures, len(template.sources)), piece.shape, spec.dtype
            ):
                self.present.update(captures)
        return template

    def _best_alternative(self, node: Node, env: Env, shape: tuple[int, ...]) -> tuple[Template, list[str]]:
        """The first alternative with all sources in the checkpoint, or else the one that lacks the fewest."""
        found: list[tuple[int, Template, list[str]]] = []
        for choice in self.binder.expand(node):
            template = self.binder.template(choice, shape, env)
            self.binder.spend(len(template.sources), choice.where)
            names = [self.binder.name(p.source, env | dict(p.extra), p.where) for p in template.sources]
            found.append((sum(name not in self.sources for name in names), template, names))
            if found[-1][0] == 0:
                break
        _, template, names = min(found, key=lambda each: each[0])
        return template, names

    def _tie(self, index: int, rule: Rule, node: Node, env: Env, target: str) -> int:
        """A rule for a parameter that the model ties: it names the copy that a checkpoint may hold, and no more."""
        if not isinstance(node, rules.Leaf) or not node.is_plain:
            self._tell(problems.more_than_a_name(rule, target, self.ties[target]))
            self.unsettled.add(index)
            return 0
        self._take_tie(index, target, self.binder.name(node.source, env, rule.where))
        return 1

    def _take_tie(self, index: int, target: str, source: str) -> None:
        to = self.ties[target]
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
            self.redundant[other] = SourceEntry(tuple(found.shape), found.dtype, "redundant", to)

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


def _implied_rule(mapping: Mapping) -> Rule:
    """What stands among the rules for all that needs none. No name matches it."""
    text = f"every parameter outside '{mapping.base}'" if mapping.rest else "tied parameters"
    target = NameTemplate(text, (text,), ())
    return Rule(where=mapping.rest or mapping.name, target=target, conditions=(), choices=())
