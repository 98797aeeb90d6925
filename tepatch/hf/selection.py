"""Parameters of a patched model by the stock model's names: what to freeze, or to give a learning rate of its own."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from tepatch.errors import PlanError, Problem
from tepatch.hf.model_plan import ATTRIBUTE, plan_of
from tepatch.hf.named import without_wrappers
from tepatch.mapping.names import fold

if TYPE_CHECKING:
    from torch.nn import Parameter


def select_parameters(model: nn.Module, *names: str) -> dict[str, Parameter]:
    """The parameters that hold the stock model's tensors of these names, by the names that they have in ``model``.

    A name is a whole one (``"lm_head.weight"``), a part of one between dots (``"q_proj"``, ``"layers.0.mlp"``), or a
    pattern for whole ones (``"*norm.weight"``). ``model`` is a patched model, or one that has it inside (PEFT's); the
    parameters of any other model have their own names.

    Raises ``PlanError`` for a name of nothing, and if a parameter is selected in part: what shares a parameter is
    trained together or not at all.
    """
    parameters = {without_wrappers(name): each for name, each in model.named_parameters(remove_duplicate=False)}
    sources = _sources(model)
    holds = {name: sources.get(name) or [name] for name in parameters}
    problems = []
    for wanted in names:
        if not any(_is_meant(wanted, name) for each in holds.values() for name in each):
            fix = "check the spelling: the names are those of the stock model's named_parameters()"
            problems.append(Problem(where=f"'{wanted}'", what="no parameter of the model has this name", fix=fix))
    chosen = {own: {name for name in each if _is_meant_by_any(names, name)} for own, each in holds.items()}
    if torn := {own: each for own, each in chosen.items() if each and each != set(holds[own])}:
        rest = sorted({name for own, each in torn.items() for name in set(holds[own]) - each})
        leaves = dict.fromkeys(name.rpartition(".")[0].rpartition(".")[2] for name in rest)
        more = ", ".join(repr(name) for name in (*names, *leaves))
        problems.append(
            Problem(
                where=", ".join(repr(name) for name in names),
                what=f"{len(torn)} parameters hold tensors of other names too, and can not be selected in part",
                details=tuple(fold(rest)),
                fix=f"select these too: select_parameters(model, {more}); or use LoRA, which trains each by itself",
            )
        )
    if problems:
        raise PlanError(problems)
    out: dict[str, Parameter] = {}
    seen: set[int] = set()
    for own, each in chosen.items():
        if each and id(parameters[own]) not in seen:
            seen.add(id(parameters[own]))
            out[own] = parameters[own]
    return out


def _sources(model: nn.Module) -> dict[str, list[str]]:
    """By the names of parameters in ``model``, the stock model's names for what they hold, where those differ."""
    out: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if ATTRIBUTE not in vars(module):
            continue
        prefix = without_wrappers(f"{path}.") if path else ""
        for copy in plan_of(module).memory_names.plan.copies:
            held = out.setdefault(prefix + copy.target, [])
            if prefix + copy.source not in held:
                held.append(prefix + copy.source)
    return out


def _is_meant(wanted: str, name: str) -> bool:
    return f".{wanted}." in f".{name}." or fnmatchcase(name, wanted)


def _is_meant_by_any(names: Iterable[str], name: str) -> bool:
    return any(_is_meant(wanted, name) for wanted in names)
