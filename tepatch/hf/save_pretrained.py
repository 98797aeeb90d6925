"""``save_pretrained`` of a patched model: a folder in the stock model's layout, or an error and nothing written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tepatch.checkpoint.manifest import MANIFEST
from tepatch.errors import PlanError, Problem, SaveError, UnsupportedError
from tepatch.hf.export import check_present, export_plan, report_of
from tepatch.hf.model_plan import plan_of
from tepatch.hf.named import named_tensors
from tepatch.hf.offloaded import Readers, offloaded
from tepatch.hf.translate import is_extra_state, patched_names, readable, translate
from tepatch.mapping.names import fold
from tepatch.planning.groups import Names, names_in
from tepatch.planning.plan import Plan
from tepatch.transfer.steps import check_constants

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Save as the class's own ``save_pretrained`` does (same arguments), in the layout of the stock model.

    ``state_dict`` may have Hugging Face's names or the parameters' own. Raises ``PlanError`` naming what has been
    removed from the model or added to it, and ``SaveError`` if the plan's constants are none any more.
    """
    is_fresh = report_of(model).config_folder is None
    if not getattr(model, "_hf_peft_config_loaded", False):  # else only adapters are saved
        _refuse_converted_folder(save_directory)
        plan, away = _plan_for(model, state_dict), offloaded(model)
        held = named_tensors(model)
        if state_dict is None:
            check_present(held, plan.reverse(), away)
            with patched_names():
                state_dict = model.state_dict()
        state_dict = _brought_back(state_dict, away, plan)
        check_constants(plan.reverse(), partial(_numbers, {**held, **state_dict}, away))
        names = names_in(plan)
        state_dict = translated(names, state_dict)
        check_translated(names, state_dict)
    # Our tensors are a checkpoint's. Transformers takes what a state dict has for its own class's in memory, and would
    # convert it once more where the two differ (fused experts). So of what it does only names are turned round, those
    # that it would have renamed on loading. Fresh weights come from such a class, and are saved as it would save them.
    if not is_fresh:
        kwargs.setdefault("save_original_format", bool(model._weight_conversions))
    type(model).save_pretrained(model, save_directory, is_main_process, state_dict, *args, **kwargs)  # type: ignore[arg-type]


def _plan_for(model: PreTrainedModel, state_dict: Mapping[str, Any] | None) -> Plan:
    """The plan for what is saved: for the model as it is now, or by which it was loaded if all of that is given.

    The parameters of a model that is wrapped by ``FullyShardedDataParallel`` say nothing of what is gathered from them.
    """
    try:
        return export_plan(model).reverse()
    except PlanError:
        plan, memory = plan_of(model).relation, plan_of(model).memory_names.plan
        if state_dict is None or not _is_all_of((plan.targets, plan.sources, memory.sources), state_dict):
            raise
        return plan


def _is_all_of(sides: tuple[Mapping[str, Any], ...], state_dict: Mapping[str, Any]) -> bool:
    """Whether these are all tensors that a plan knows on one of its sides, in its shapes, and nothing else.

    The parameters come first.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items() if isinstance(tensor, torch.Tensor)}
    for side in sides:
        needed = {
            name: entry.shape for name, entry in side.items() if entry.state not in ("tied", "redundant", "ignored")
        }
        extra = {name: shape for name, shape in shapes.items() if name not in needed}
        if needed.items() <= shapes.items() and all(name in sides[0] for name in extra):
            return True
    return False


def _refuse_converted_folder(folder: str | os.PathLike[str]) -> None:
    """Beside the parameters that tepatch has converted, nothing else may be saved: the older would be loaded."""
    if os.path.lexists(os.path.join(folder, MANIFEST)):
        raise SaveError(
            Problem(
                where=os.fspath(folder),
                what=f"this folder holds a checkpoint that tepatch has converted ({MANIFEST}), and can not hold two",
                fix="save to another folder, or replace this one with tepatch.save(model, folder, overwrite=True)",
            )
        )


def translated(names: Names, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of a model (not of a wrapper) in Hugging Face's names, whichever names it has."""
    out = {key: value for key, value in state_dict.items() if not is_extra_state(key, "")}
    if names.ours & out.keys():  # else names that are in both languages are Hugging Face's already
        translate(names, out, "")
    return out


def check_translated(names: Names, state_dict: Mapping[str, Any]) -> None:
    """Raise ``PlanError`` if names of patched parameters are left in a state dict: nobody could load them."""
    left = [name for name in state_dict if name in names.ours]
    if left:
        kinds = sorted({f"{type(state_dict[name]).__name__} {_shape(state_dict[name])}" for name in left})
        raise PlanError(
            Problem(
                where="save_pretrained",
                what="parameters that can not be translated into the checkpoint's tensors",
                details=tuple(fold(left, 12)),
                expected="all parameters that share a tensor of the checkpoint, whole and in the model's shapes",
                found=", ".join(kinds[:4]),
                fix="leave state_dict out or pass all of it; sharded parameters are gathered first, by all processes: "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True, cpu_offload=True))",
            )
        )


def refuse_to_save_a_part(*args: Any, **kwargs: Any) -> None:
    """In place of ``save_pretrained`` of a model within a patched model. Not a method, so that copies keep it."""
    raise UnsupportedError(
        Problem(
            where="save_pretrained",
            what="only the whole patched model knows the names under which its tensors are saved",
            fix="save the whole model: save_pretrained or push_to_hub of what tepatch returned",
        )
    )


def _brought_back(state_dict: Mapping[str, Any], away: Readers, plan: Plan) -> dict[str, Any]:
    """``state_dict`` with what is offloaded in the place of tensors on the meta device; tied names share one tensor.

    Raises ``SaveError`` for a tensor on the meta device whose name is not a parameter's.
    """
    out = dict(state_dict)
    absent = [name for name, tensor in state_dict.items() if isinstance(tensor, torch.Tensor) and tensor.is_meta]
    if unknown := [name for name in absent if name not in away]:
        raise SaveError(
            Problem(
                where="state_dict",
                what=f"tensors are on the meta device ({len(unknown)}): they have no values",
                details=tuple(fold(unknown, 12)),
                fix="leave state_dict out: offloaded parameters are then read from where they are",
            )
        )
    for name in absent:
        first = plan.targets[name].tied_to or name
        out[name] = out[first] if first != name and first in out and not out[first].is_meta else away[name]()
    return out


def _numbers(held: Mapping[str, torch.Tensor], away: Readers, name: str) -> torch.Tensor:
    if name in away and held[name].is_meta:
        return away[name]()
    plain = readable(held[name].detach())
    return held[name] if plain is None else plain


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else ""
