"""What a patched model can be saved as, now: the plan is made again for the model as it is.

So what has been resized or pruned together with its config is saved as what it has become, and what no longer fits
the config is an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from tepatch.errors import PlanError, Problem, SaveError
from tepatch.hf.model import stock_specs, target_specs
from tepatch.hf.model_plan import ModelPlan, plan_of
from tepatch.hf.offloaded import offloaded
from tepatch.mapping.names import fold
from tepatch.mapping.rules import is_below
from tepatch.planning import Plan, Spec
from tepatch.report import Report
from tepatch.transfer.steps import same_bits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Stock = Callable[[], tuple[dict[str, Spec], dict[str, str]]]
"""Gives what the stock model has for the config as it is now: made at most once, and only if it is needed."""
_CHANGED = "the model has changed since it was loaded, and can not be saved in the checkpoint's layout"
_INSIDE = ("module", "_orig_mod", "module._orig_mod", "_orig_mod.module", "base_model.model")
"""Where wrappers keep the model: DDP and FSDP, ``torch.compile``, both of them, PEFT."""


def export_plan(model: PreTrainedModel, *, dtype: str = "") -> Plan:
    """The reversed plan for a patched model as it is now. ``dtype`` is a code, or empty for the parameters' own.

    Raises ``PlanError`` for a model that is not patched, and naming every parameter that the mapping does not know
    or does not find, or that has another shape than the config says.
    """
    report_of(model)
    before = plan_of(model)
    targets, ties = target_specs(model, None)
    _tie_again(model, before.relation, targets, ties)
    stock = lru_cache(1)(lambda: stock_specs(before.model_class, model.config))
    _check_outside(before, stock, targets, ties)
    like = {name: spec for name, spec in before.relation.sources.items() if spec.state != "ignored"}
    try:
        plan = before.export(targets, ties, config=model.config, like=like, dtype=dtype)
    except PlanError as error:
        raise PlanError(list(_changes(before.relation, targets)) or error.problems, heading=_CHANGED) from error
    _check_shapes(before.relation, stock, plan)
    return plan.reverse()


def check_present(tensors: Mapping[str, torch.Tensor], plan: Plan, offloaded: Container[str]) -> None:
    """Raise ``SaveError`` naming the parameters that have no values: on the meta device, and not ``offloaded``."""
    if absent := [name for name in plan.reads if tensors[name].is_meta and name not in offloaded]:
        raise SaveError(
            Problem(
                where="model",
                what=f"parameters are on the meta device ({len(absent)}): they have no values",
                details=tuple(fold(absent, 12)),
                fix="load the model; parameters that were offloaded, and not by accelerate's hooks, bring back first",
            )
        )


def report_of(model: object) -> Report:
    """The report of a patched model itself: wrappers pass their attributes on, and have other names.

    Raises ``PlanError`` for anything else, with the way to the model inside if there is one.
    """
    report = vars(model).get("tepatch") if hasattr(model, "__dict__") else None
    if isinstance(report, Report):
        return report
    inside = next((path for path in _INSIDE if _is_patched(model, path)), "")
    raise PlanError(
        Problem(
            where=type(model).__name__,
            what="only a model that tepatch has loaded or built can be saved by tepatch",
            fix=f"pass the model inside this wrapper (.{inside}), merged if it has adapters"
            if inside
            else "save it with its own save_pretrained",
        )
    )


def _tie_again(model: nn.Module, before: Plan, targets: dict[str, Spec], ties: dict[str, str]) -> None:
    """Offloading makes two parameters of a tied one, on the meta device: what is kept of them tells that it is one."""
    tied = {name: entry.tied_to for name, entry in before.targets.items() if entry.state == "tied" and name in targets}
    away = offloaded(model) if tied else {}
    for name, first in tied.items():
        if name in away and first in away and same_bits(away[name](), away[first]()):
            del targets[name]
            ties[name] = first


def _changes(before: Plan, now: Mapping[str, Spec]) -> Iterator[Problem]:
    """What is gone from a model since it was loaded, and what was added."""
    held = {name for name, entry in before.targets.items() if entry.state != "tied"}
    if gone := [name for name in before.targets if name in held and name not in now]:
        yield Problem(
            where="model",
            what=f"parameters are gone ({len(gone)})",
            details=tuple(fold(gone, 12)),
            fix="put back what was removed, or change the config with it (num_hidden_layers)",
        )
    if added := [name for name in now if name not in before.targets]:
        yield Problem(
            where="model",
            what=f"parameters were added ({len(added)}), and the checkpoint's layout has no place for them",
            details=tuple(fold(added, 12)),
            fix="take out what was added (unload or merge adapters), or save the parameters under their own names: "
            "with tepatch.hf.state.patched_names(): torch.save(model.state_dict(), path)",
        )


def _check_outside(before: ModelPlan, stock: Stock, targets: Mapping[str, Spec], ties: Mapping[str, str]) -> None:
    """What is outside the rules' base must be what the stock model has there for the config as it is now.

    ``rest: same`` is for the stock model's own parameters, and would take in whatever was added since.
    """
    base = before.rules.base
    if base is None or before.rules.rest is None:
        return

    def outside(names: Iterable[str], tied: Mapping[str, str]) -> dict[str, str]:
        return {name: tied.get(name, "") for name in names if not is_below(name, base)}

    now = outside((*targets, *ties), ties)
    specs, stock_ties = stock()
    wanted = outside((*specs, *stock_ties), stock_ties)
    if now == wanted:
        return
    problems = list(_changes(before.relation, {**dict.fromkeys(ties, Spec((), "")), **targets}))
    problems += [
        Problem(
            where="model",
            what=f"{name} is {'tied to ' + now[name] if now[name] else 'a parameter of its own'} in the model",
            expected=f"tied to {wanted[name]}, by the config"
            if wanted[name]
            else "a parameter of its own, by the config",
            fix="change model.config together with the parameters (tie_word_embeddings)",
        )
        for name in now.keys() & wanted.keys()
        if now[name] != wanted[name]
    ]
    raise PlanError(problems or [_unlike(before.model_class)], heading=_CHANGED)


def _unlike(cls: type) -> Problem:
    fix = "change model.config together with the parameters"
    return Problem(where="model", what=f"its parameters are not those that {cls.__name__} has for this config", fix=fix)


def _is_patched(wrapper: object, path: str) -> bool:
    inner: object = wrapper
    for name in path.split("."):
        inner = getattr(inner, name, None)
    return isinstance(getattr(inner, "__dict__", {}).get("tepatch"), Report)


def _check_shapes(relation: Plan, stock: Stock, plan: Plan) -> None:
    """What has another shape than when it was loaded must have the one that the config says now.

    Shapes follow from the parameters, so a model that was cut without its config would be saved, and not load.
    """
    before = relation.sources
    resized = {
        name: spec.shape for name, spec in plan.sources.items() if name in before and spec.shape != before[name].shape
    }
    if not resized:
        return
    wanted, _ = stock()
    if problems := [
        Problem(
            where=name,
            what="has another shape than the config gives it, so nobody could load it",
            expected=str(list(wanted[name].shape)),
            found=str(list(shape)),
            fix="change model.config together with the parameters",
        )
        for name, shape in resized.items()
        if name in wanted and wanted[name].shape != shape
    ]:
        raise PlanError(problems, heading=_CHANGED)
