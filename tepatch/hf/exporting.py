"""What a patched model can be saved as, now: the plan is made again for the model as it is.

So what has been resized or pruned together with its config is saved as what it has become, and what no longer fits
the config is an error that names it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from tepatch.assembly import same_bits
from tepatch.errors import PlanError, Problem, SaveError
from tepatch.hf.config import ConfigFields
from tepatch.hf.model import build_on_meta, target_specs
from tepatch.hf.placement import offloaded
from tepatch.mapping import Plan, Spec, make_export_plan
from tepatch.mapping.names import fold
from tepatch.report import Report

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHANGED = "the model has changed since it was loaded, and can not be saved in the checkpoint's layout"
_INSIDE = ("module", "_orig_mod", "module._orig_mod", "_orig_mod.module", "base_model.model")
"""Where wrappers keep the model: DDP and FSDP, ``torch.compile``, both of them, PEFT."""


def export_plan(model: PreTrainedModel, *, dtype: str = "") -> Plan:
    """The reversed plan for a patched model as it is now. ``dtype`` is a code, or empty for the parameters' own.

    Raises ``PlanError`` for a model that is not patched, and naming every parameter that the mapping does not know
    or does not find, or that has another shape than the config says.
    """
    report = report_of(model)
    targets, ties = target_specs(model, None)
    _tie_again(model, report.plan, targets, ties)
    try:
        plan = make_export_plan(
            report.rules,
            config=ConfigFields(model.config),
            targets=targets,
            ties=ties,
            like={name: spec for name, spec in report.plan.sources.items() if spec.state != "ignored"},
            dtype=dtype,
            patch=report.patch,
            location=report.plan.location,
        )
    except PlanError as error:
        raise PlanError(list(_changes(report.plan, targets)) or error.problems, heading=_CHANGED) from error
    _check_shapes(model, report, plan)
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


def _is_patched(wrapper: object, path: str) -> bool:
    inner: object = wrapper
    for name in path.split("."):
        inner = getattr(inner, name, None)
    return isinstance(getattr(inner, "__dict__", {}).get("tepatch"), Report)


def _check_shapes(model: PreTrainedModel, report: Report, plan: Plan) -> None:
    """What has another shape than when it was loaded must have the one that the config says now.

    Shapes follow from the parameters, so a model that was cut without its config would be saved, and not load.
    """
    before = report.plan.sources
    resized = {
        name: spec.shape for name, spec in plan.sources.items() if name in before and spec.shape != before[name].shape
    }
    if not resized:
        return
    stock, _ = build_on_meta(type(model), model.config, dtype=torch.float32)
    wanted, _ = target_specs(stock, None)
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
