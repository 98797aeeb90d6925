"""What a mapping asks of a config alone, held against it before a layer is built."""

from __future__ import annotations

from collections.abc import Mapping as MappingABC
from typing import Any

from tepatch.errors import Problem
from tepatch.mapping import rules
from tepatch.mapping.rules import Mapping
from tepatch.mapping.values import BindError
from tepatch.planning import problems
from tepatch.planning.bind import Binder


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
    mapping: Mapping, config: MappingABC[str, Any], num_tensors: int, *, is_converted: bool, where: str
) -> list[Problem]:
    """Captures with more values than a checkpoint of ``num_tensors`` has tensors for, found before a model is built.

    Where every name of a rule has the capture in it, each of its values needs a tensor of its own. ``is_converted``:
    the checkpoint has the parameters' names, and not those of their sources.
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
        names = [rule.target] if is_converted else list(rules.leaves(node))
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
