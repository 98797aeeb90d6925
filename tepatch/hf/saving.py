"""``save_pretrained`` of a patched model: a folder in the stock model's layout, or an error and nothing written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tepatch.assembly import check_constants
from tepatch.checkpoint.manifest import MANIFEST
from tepatch.errors import PlanError, Problem, SaveError, UnsupportedError
from tepatch.hf.exporting import check_present, export_plan
from tepatch.hf.languages import Names, is_extra_state, named_tensors, names_in, patched_names, readable, translate
from tepatch.mapping.names import fold

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
    if not getattr(model, "_hf_peft_config_loaded", False):  # else only adapters are saved
        _refuse_converted_folder(save_directory)
        plan = export_plan(model)
        check_present(named_tensors(model), plan)
        check_constants(plan, partial(_numbers, named_tensors(model)))
        names = names_in(plan.reverse())
        if state_dict is None:
            with patched_names():
                state_dict = model.state_dict()
        state_dict = translated(names, state_dict)
        check_translated(names, state_dict)
    # Our names are a checkpoint's. Transformers takes the names of a state dict for those of its own class in
    # memory, and would turn them into a checkpoint's once more where the two differ (fused experts, prefixes).
    kwargs["save_original_format"] = False
    type(model).save_pretrained(model, save_directory, is_main_process, state_dict, *args, **kwargs)  # type: ignore[arg-type]


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
                details=tuple(fold(left)),
                expected="all parameters that share a tensor of the checkpoint, whole and in the model's shapes",
                found=", ".join(kinds[:4]),
                fix="gather sharded parameters before saving, and leave state_dict out or pass all of it",
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


def _numbers(held: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    plain = readable(held[name].detach())
    return held[name] if plain is None else plain


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else ""
