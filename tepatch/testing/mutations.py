"""Mistakes made on purpose, out of the mapping and the config themselves: each has to be noticed.

A check that can not fail proves nothing. So every rule is dropped, its values are changed, its layers are shifted, its
parts are dealt out otherwise, and tensors of one shape are exchanged; and the layers are told another rope base, and a
window that is one longer or shorter. What ``rest: same`` carries (a head) is treated as if each tensor had its rule. A
proof has to refuse such a mapping, or the outputs have to show it.

A mapping that comes to the same plan as the true one is no mistake (the rule is off for this config), and neither is
a change of the config that Hugging Face's own model does not notice. Such are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as SourcesABC
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tepatch.errors import MappingError, PlanError
from tepatch.mapping.expressions import parse
from tepatch.mapping.names import parse_name
from tepatch.mapping.read import read_mapping
from tepatch.mapping.relocate import find_base
from tepatch.mapping.rules import Constant, Leaf, Located, Mapping, Node, Parts, Rule, Transpose, is_below
from tepatch.planning.plan import Plan, SourceEntry
from tepatch.testing.cases import Bench, changed, layers_of, rope_tables, window_of
from tepatch.testing.parity import distance, numbers
from tepatch.testing.results import Broken, Finding, NotApplicable
from tepatch.testing.rewriting import nodes_of, rewrite, text_of

CLEAR = 50
"""How many times the error of the true model a mistake has to cause."""

Sources = SourcesABC[str, SourceEntry]


@dataclass(frozen=True)
class Mutant:
    """One mistake: another mapping, or other values in the config."""

    name: str
    mapping: Mapping | None = None
    fields: dict[str, Any] | None = None


def mutations(bench: Bench) -> Finding:
    """Every mistake is refused by a proof, or shows in the outputs."""
    rules = read_mapping(bench.patch.mapping_path())
    ids = bench.tokens(2)
    with torch.no_grad():
        truth, theirs, ours = (numbers(model(ids)) for model in bench.models)
        bound = CLEAR * max(distance(ours, truth), distance(theirs, truth))
        if not distance(ours, truth) <= bench.limit * distance(theirs, truth):
            raise NotApplicable("the outputs are wrong without a mistake already: see no-mask")
        invisible = dict(bench.case.invisible)
        caught: dict[str, str] = {}
        survivors, smallest = [], float("inf")
        for index, mutant in enumerate([Mutant("nothing", rules), *mutants(rules, bench)]):
            verdict = _try(bench, mutant, ids, truth, index)
            if mutant.name == "nothing":
                if not isinstance(verdict, float) or verdict * CLEAR > bound:
                    raise Broken(f"written down again without a change, the mapping is not what it was: {verdict}")
            elif isinstance(verdict, str):
                caught[mutant.name] = verdict
            elif verdict is not None and not verdict <= bound:
                caught[mutant.name] = f"outputs: {verdict:.1e}"
                smallest = min(smallest, verdict)
            elif verdict is not None and mutant.name in invisible:
                del invisible[mutant.name]
            elif verdict is not None:
                survivors.append(f"{mutant.name} (error {verdict:.1e}, {bound:.1e} would show it)")
    if survivors:
        raise Broken("nobody notices these mistakes:\n  " + "\n  ".join(survivors))
    if invisible:
        raise Broken(f"not among the mistakes that nobody notices, as 'invisible' says: {', '.join(invisible)}")
    proofs = sum(not verdict.startswith("outputs") for verdict in caught.values())
    figures = {"mistakes": len(caught), "refused": proofs, "bound": bound, "smallest": smallest}
    detail = f"{len(caught)} mistakes, {proofs} refused by a proof, {len(caught) - proofs} seen in the outputs"
    return Finding(detail=detail, figures=figures, notes={"mutants": caught, "invisible": dict(bench.case.invisible)})


def _try(bench: Bench, mutant: Mutant, ids: Tensor, truth: Tensor, index: int) -> str | float | None:
    """What refuses the mutant, or the error that it causes; None if it is no mistake at all."""
    arguments: dict[str, Any] = {}
    if mutant.mapping is not None:
        path = bench.folder / f"mutant-{index}.yaml"
        path.write_text(text_of(mutant.mapping))
        arguments["mapping"] = path
    if mutant.fields is not None:
        arguments["config"] = config = changed(bench.config, mutant.fields)
        stock = type(bench.stock).from_pretrained(
            bench.checkpoint, config=config, dtype=torch.float32, trust_remote_code=False
        )
        stock.eval()
        # As far as rounding of float32 goes, on which two builds of one model agree.
        if torch.equal(numbers(stock(ids)), numbers(bench.models.theirs(ids))):
            return None
    try:
        model = bench.load(**arguments)
    except (MappingError, PlanError) as error:
        return f"{type(error).__name__}: {error.problems[0].what}"
    is_same = model.tepatch.plan.layout_digest == bench.plan.layout_digest
    if is_same and mutant.fields is None and mutant.name != "nothing":
        return None
    if mutant.name == "nothing" and not is_same:
        return "another plan"
    return distance(numbers(model(ids)), truth)


def mutants(rules: Mapping, bench: Bench) -> Iterator[Mutant]:
    """Mistakes: no more than seven for each rule of the mapping, and for each tensor that ``rest`` carries."""
    sources = _as_in_rules(rules, bench.plan)
    if rules.rest is not None:
        yield Mutant("drop the rest", replace(rules, rest=None))
    for rule in rules.rules:
        yield Mutant(f"drop {rule.target}", replace(rules, rules=tuple(r for r in rules.rules if r is not rule)))
    rules = replace(rules, rules=(*rules.rules, *_rest_rules(rules, bench.plan)))
    for rule in rules.rules:
        yield _in_rule(rules, rule, "without its scale and offset", _without_values)
        if not any(isinstance(node, Constant) or node.scale or node.offset for node in nodes_of(rule)):
            yield _in_rule(rules, rule, "scaled and offset", lambda node, rule=rule: _with_values(node, rule))
        yield from _in_parts(rules, rule)
        yield from _in_leaves(rules, rule, sources)
    yield from _swaps(rules, sources)
    for path, rope in rope_tables(bench.config).items():
        base = f"{path}.rope_theta"
        if "rope_theta" in rope:
            yield Mutant(f"three times {base}", fields={base: rope["rope_theta"] * 3})
    if (window := window_of(bench.config)) is not None:
        prefix = "" if bench.config.get_text_config() is bench.config else "text_config."
        for off in (1, -1):
            yield Mutant(f"sliding_window {off:+}", fields={f"{prefix}sliding_window": window + off})


def _rest_rules(rules: Mapping, plan: Plan) -> Iterator[Rule]:
    """What ``rest`` stands for in this plan, a rule for each tensor; they make the plan that it makes without them."""
    for copy in plan.copies:
        # A rule below the name of the base is about the base, wherever this model has it, and not about what is beside.
        if copy.rule == len(rules.rules) and not is_below(copy.target, rules.base or ""):
            leaf = Leaf(where=copy.target, source=parse_name(copy.source))
            yield Rule(where=copy.target, target=parse_name(copy.target), conditions=(), choices=(leaf,))


def _in_rule(rules: Mapping, rule: Rule, what: str, change: Any) -> Mutant:
    """The rule with ``change`` applied to each of its nodes."""
    other = replace(rule, choices=tuple(rewrite(node, change) for node in rule.choices))
    return Mutant(f"{rule.target} {what}", replace(rules, rules=tuple(other if r is rule else r for r in rules.rules)))


def _without_values(node: Node) -> Node:
    return replace(node, scale=None, offset=None)


def _with_values(node: Node, rule: Rule) -> Node:
    # Both, since a norm hides one: it divides by a root mean square, or subtracts a mean.
    is_top = any(node.where == choice.where for choice in rule.choices)
    return replace(node, scale=_located("1.5"), offset=_located("0.5")) if is_top else node


def _in_parts(rules: Mapping, rule: Rule) -> Iterator[Mutant]:
    """Parts dealt out in turn that should follow each other, and the other way round."""
    for parts in (node for node in nodes_of(rule) if isinstance(node, Parts)):
        if parts.groups is None and parts.block is None:
            what = "interleaved"
            if parts.sizes is None:
                other = replace(parts, block=_located("1"))
            else:
                halves = tuple(_located(f"({size}) // 2") for size in parts.sizes)
                other = replace(parts, groups=_located("2"), sizes=halves)
        else:
            what = "concatenated"
            sizes = None if parts.sizes is None else tuple(_located(f"({s}) * ({parts.groups})") for s in parts.sizes)
            other = replace(parts, groups=None, block=None, sizes=sizes)
        yield _exchange(rules, rule, what, parts, other)


def _in_leaves(rules: Mapping, rule: Rule, sources: Sources) -> Iterator[Mutant]:
    """A layer (an expert) that gets the next one's tensor, and a square that is turned over."""
    leaves = [leaf for leaf in _leaves(rule) if _shape(leaf, sources)]
    for capture in dict.fromkeys(field.text for leaf in leaves for field in leaf.source.fields):
        for leaf in leaves:
            if (source := _next(leaf, capture, sources)) is not None:
                what = f"from the next {capture}, {leaf.source.text.rpartition('}.')[2]}"
                yield _exchange(rules, rule, what, leaf, replace(leaf, source=parse_name(source)))
                break
    for leaf in leaves:
        shape = _shape(leaf, sources)
        if len(shape) > 1 and shape[-1] == shape[-2] and not leaf.axes and leaf.take is None:
            yield _exchange(rules, rule, f"transposed, {leaf.source}", leaf, replace(leaf, axes=Transpose()))
            break


def _swaps(rules: Mapping, sources: Sources) -> Iterator[Mutant]:
    """Of the tensors (or the parts of one) that have the same shape, each exchanged with the next."""
    kinds: dict[Any, dict[str, Leaf]] = {}
    for rule in rules.rules:
        for leaf in _leaves(rule):
            if shape := _shape(leaf, sources):
                part = leaf.take and (leaf.source.text, str(leaf.take.size), str(leaf.take.index is None))
                text = f"{leaf.source}[{leaf.take.index or leaf.take.start}]" if leaf.take else leaf.source.text
                kinds.setdefault((shape, leaf.source.captures, part), {})[text] = leaf
    for leaves in kinds.values():
        for (one, first), (other, second) in pairwise(leaves.items()):

            def change(node: Node, first: Leaf = first, second: Leaf = second) -> Node:
                for this, that in ((first, second), (second, first)):
                    if isinstance(node, Leaf) and (node.source, node.take) == (this.source, this.take):
                        return replace(node, source=that.source, take=that.take)
                return node

            swapped = tuple(replace(r, choices=tuple(rewrite(n, change) for n in r.choices)) for r in rules.rules)
            yield Mutant(f"swap {one} and {other}", replace(rules, rules=swapped))


def _as_in_rules(rules: Mapping, plan: Plan) -> Sources:
    """The plan's sources in the names of the mapping, whose base this checkpoint may have elsewhere."""
    if not rules.base:
        return plan.sources
    path = find_base(rules, plan.sources, side="source", default=rules.base, where=plan.location)
    start = f"{path}." if path else ""
    return {
        f"{rules.base}.{name.removeprefix(start)}" if name.startswith(start) else name: entry
        for name, entry in plan.sources.items()
    }


def _exchange(rules: Mapping, rule: Rule, what: str, node: Node, other: Node) -> Mutant:
    return _in_rule(rules, rule, what, lambda each: other if each == node else each)


def _leaves(rule: Rule) -> list[Leaf]:
    return [node for node in nodes_of(rule) if isinstance(node, Leaf)]


def _shape(leaf: Leaf, sources: Sources) -> tuple[int, ...]:
    """The shape of the tensors that a leaf names; empty if the checkpoint has none, or other rules use it."""
    used = (entry.shape for name, entry in sources.items() if leaf.source.pattern.match(name))
    return next(used, ())


def _next(leaf: Leaf, capture: str, sources: Sources) -> str | None:
    """The leaf's name with the next number in the place of ``capture``, the first one after the last."""
    places = [index for index, field in enumerate(leaf.source.fields) if field.text == capture]
    if not places:
        return None
    values = sorted({found[places[0]] for found in layers_of(sources, leaf.source.pattern)})
    steps = {after - before for before, after in pairwise(values)}
    if len(steps) != 1:
        return None  # one number only, or numbers that no arithmetic goes round
    (step,), first = steps, values[0]
    after = f"{first} + ({capture} - {first} + {step}) % {step * len(values)}"
    return leaf.source.text.replace(f"{{{capture}}}", f"{{{after}}}")


def _located(text: str) -> Located:
    return Located(expression=parse(text), where="mutation")
