"""A patched model speaks Hugging Face's names: ``state_dict``, ``load_state_dict`` and ``save_pretrained``.

A patched model's parameters have names and shapes of their own, and what surrounds a model (Trainer, accelerate,
whoever opens its checkpoint) knows Hugging Face's. So the root of the model translates, by the plan that loaded it:
the views in which sources lie are handed out as tensors, and tensors are copied into these views. Nothing is held
twice. What has the same name on both sides is left to torch, and so is what the plan does not know.

What is attached are functions of a module, and a method that Python copies and pickles together with the model that it
is of. So a copy of a model translates for itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tepatch.dtypes import torch_dtype
from tepatch.errors import TepatchError
from tepatch.hf.model import EXTRA_STATE
from tepatch.hf.model_plan import plan_of
from tepatch.hf.named import named_tensors, without_wrappers
from tepatch.hf.names import Renaming
from tepatch.hf.save_pretrained import refuse_to_save_a_part, save_pretrained
from tepatch.hf.translate import (
    gives_own_names,
    is_extra_state,
    own_names,
    patched_names,
    readable,
    translate,
)
from tepatch.planning.groups import Group, Names, is_whole
from tepatch.planning.plan import Copy
from tepatch.te.layer import AcceleratedLayer
from tepatch.te.optimizers import watch
from tepatch.te.weak import Method
from tepatch.transfer.steps import put

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["attach", "expect_no_extra_state", "give_their_names", "patched_names", "take_their_names"]


def attach(model: PreTrainedModel) -> None:
    """Make ``model`` give, take and save Hugging Face's names, once it carries its ``ModelPlan``.

    ``model.state_dict()`` hands out tensors that share memory with the parameters wherever a source lies in one
    strided view, and restored copies elsewhere. ``model.load_state_dict()`` takes a dict of either language, or
    a part of one with ``strict=False``. ``model.save_pretrained`` and ``push_to_hub`` write a checkpoint for any
    transformers; those of the models inside raise ``UnsupportedError``.
    """
    from transformers import PreTrainedModel

    model.register_state_dict_post_hook(give_their_names)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(take_their_names)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(expect_no_extra_state)  # type: ignore[no-untyped-call]
    model.save_pretrained = Method(save_pretrained, model)  # type: ignore[method-assign]
    for module in model.modules():
        if isinstance(module, AcceleratedLayer):
            watch(module)
        if module is not model and isinstance(module, PreTrainedModel):
            module.save_pretrained = module.push_to_hub = refuse_to_save_a_part  # type: ignore[assignment]


def give_their_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Hook of ``state_dict``: what the plan can translate appears under Hugging Face's names, where it stood.

    What it can not (a parameter that is gone, wrapped, resized or sharded) stays under its own name: to be strict
    about that is for whoever saves. Raises ``PlanError`` if a name would stand for two tensors.
    """
    for key in [key for key in state_dict if is_extra_state(key, prefix)]:
        del state_dict[key]
    if not gives_own_names():
        translate(plan_of(module).memory_names, state_dict, prefix)


def take_their_names(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Hook of ``load_state_dict``: copy each tensor of the checkpoint into its view of the parameter.

    What is copied leaves the dict, and the parameter itself stands in for it: the modules below neither miss it nor
    change it. What is missing or does not fit is accounted for here, in torch's words and Hugging Face's names (or
    those of another layout of the patch, if the dict has these). A dict in the parameters' own names is left to torch.
    Extra state is dropped unread: it is a pickle.
    """
    for key in [key for key in state_dict if is_extra_state(key, prefix)]:
        del state_dict[key]
    if not own_names.get():
        _rename_as_in_memory(cast("PreTrainedModel", module), state_dict, prefix)
        given = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
        _Taking(
            names=plan_of(module).names_for(given),
            held=named_tensors(module),
            state_dict=state_dict,
            prefix=prefix,
            assign=bool(local_metadata.get("assign_to_params_buffers", False)),
            missing=missing_keys,
            errors=error_msgs,
        ).run()


def _rename_as_in_memory(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str) -> None:
    """Give tensors that have their names on disk those in memory, as far as the model knows no other for them.

    ``save_pretrained`` writes names on disk, and Trainer hands what is on disk to ``load_state_dict`` as it is.
    """
    plan = plan_of(model).relation
    known = plan.sources.keys() | plan.targets.keys()
    given = {key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)}
    if not (unknown := given - known):
        return
    for name, new in Renaming(model).changed(unknown).items():
        if new in known and prefix + new not in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + name)


def expect_no_extra_state(module: nn.Module, incompatible: Any) -> None:
    """Hook after ``load_state_dict``: extra state is never taken, and so never missing."""
    paths = (without_wrappers(path) for path, child in module.named_modules() if _has_extra_state(child))
    names = tuple(f"{path}.{EXTRA_STATE}" if path else EXTRA_STATE for path in paths)
    ends = tuple(f".{name}" for name in names)  # below a wrapper, whose prefix is not told here
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if key not in names and not key.endswith(ends)]


@dataclass(kw_only=True)
class _Taking:
    """One call of ``load_state_dict``."""

    names: Names
    held: Mapping[str, torch.Tensor]
    """The model's parameters and buffers."""
    state_dict: dict[str, Any]
    prefix: str
    assign: bool
    missing: list[str]
    errors: list[str]
    handed: dict[str, torch.Tensor] = field(default_factory=dict)
    """What the modules below get, under the parameters' own names."""

    def run(self) -> None:
        given = {key.removeprefix(self.prefix) for key in self.state_dict if key.startswith(self.prefix)}
        ours, theirs = bool(given & self.names.ours), bool(given & self.names.theirs)
        if ours and not theirs:
            return  # torch's own way
        for group in self.names.groups:
            sources, targets = given.intersection(group.sources), given.intersection(group.targets)
            if sources and targets:
                targets -= self._as_they_are(targets)
            # A name may be that of a parameter and of a tensor of the checkpoint with other values (a norm stored as
            # w and used as 1 + w). It means what the rest of the dict means; alone, it is Hugging Face's.
            unclear = (sources | targets) - self.names.ours - self.names.theirs
            targets -= unclear
            if ours and unclear:
                self._refuse(group, given, f"{_quoted(unclear)} may be meant either way")
            elif sources and targets:
                self._refuse(group, given, f"{_quoted(sources)} and {_quoted(targets)} hold the same numbers")
            elif not targets and self._is_as_planned(group):
                self._load(group, given)
            # else torch's own way too: copied, missing or unexpected, by the names that they have
        self.state_dict.update({self.prefix + name: tensor for name, tensor in self.handed.items()})

    def _as_they_are(self, targets: set[str]) -> set[str]:
        """Which of these are given as the model's own memory, and taken out: they say nothing.

        ``torch.distributed.checkpoint.state_dict`` adds the model's own tensors to a dict of other names.
        """
        out = set()
        for name in targets - self.names.theirs:
            given, held = self.state_dict.get(self.prefix + name), self.held.get(name)
            if held is not None and isinstance(given, torch.Tensor) and _is_same_memory(given, held):
                out.add(name)
                del self.state_dict[self.prefix + name]
        return out

    def _is_as_planned(self, group: Group) -> bool:
        shapes = self.names.plan.targets
        return all(name in self.held and self.held[name].shape == shapes[name].shape for name in group.targets)

    def _refuse(self, group: Group, given: set[str], why: str) -> None:
        self.errors.append(f"names of the checkpoint and of the model's own parameters in one state dict: {why}.")
        for name in given.intersection((*group.sources, *group.targets)):
            del self.state_dict[self.prefix + name]
        self.handed.update({name: self.held[name] for name in group.targets if name in self.held})

    def _load(self, group: Group, given: set[str]) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for name in group.sources:
            if name not in given:
                self.missing.append(self.prefix + name)
                continue
            tensor = self._checked(name, self.state_dict.pop(self.prefix + name))
            if tensor is not None:
                tensors[name] = tensor
        for target in group.targets:
            copies = [copy for copy in group.copies if copy.target == target]
            self.handed[target] = self._filled(target, copies, tensors)

    def _checked(self, name: str, tensor: Any) -> torch.Tensor | None:
        """``tensor`` if it can be what ``name`` is in the plan; else an error in torch's own words."""
        key, shape = self.prefix + name, torch.Size(self.names.plan.sources[name].shape)
        if not isinstance(tensor, torch.Tensor):
            self.errors.append(
                f'While copying the parameter named "{key}", expected torch.Tensor or Tensor-like object from '
                f"checkpoint but received {type(tensor)}"
            )
        elif tensor.shape != shape:
            self.errors.append(
                f"size mismatch for {key}: copying a param with shape {tensor.shape} from checkpoint, "
                f"the shape in current model is {shape}."
            )
        elif (plain := readable(tensor)) is None:
            self.errors.append(f"{key} is a {type(tensor).__name__}: only whole tensors can be copied into the model.")
        else:
            return plain.detach()
        return None

    def _filled(self, target: str, copies: Sequence[Copy], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The parameter after its sources were copied into it, or what the module below has to make it of."""
        held = self.held[target]
        ready = [copy for copy in copies if copy.source in tensors]
        if self.assign and len(ready) == len(copies) and (copies or held.is_meta):
            return self._assembled(target, copies, tensors)
        if not ready:
            return held
        if held.is_meta:
            self._tell_no_memory(target, ready, tensors)
            return held
        plain = readable(held)
        if plain is None:
            self.errors.append(
                f"{self.prefix}{target} is a {type(held).__name__}: it can not be filled from "
                f"{_quoted(copy.source for copy in ready)}, but only under its own name."
            )
            return held
        place = plain.detach().contiguous()
        for copy in ready:
            self._write(copy, tensors[copy.source], place)
        is_in_place = plain is held and held.is_contiguous()
        return held if is_in_place else place

    def _assembled(self, target: str, copies: Sequence[Copy], tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """For ``assign=True``: a new tensor of the sources' dtype on their device, or the only source itself."""
        plan, parts = self.names.plan, [tensors[copy.source] for copy in copies]
        if len(parts) == 1 and is_whole(plan, copies[0]):
            return parts[0]
        entry, given = plan.targets[target], [t for t in self.state_dict.values() if isinstance(t, torch.Tensor)]
        dtype = reduce(torch.promote_types, (part.dtype for part in parts)) if parts else torch_dtype(entry.dtype)
        device = next((each.device for each in (*parts, *given)), torch.device("cpu"))
        out = torch.empty(entry.shape, dtype=dtype, device=device)
        for fill in plan.constants.get(target, ()):
            out.as_strided(fill.pair.sizes, fill.pair.target_strides, fill.pair.target_offset).fill_(fill.value)
        for copy, part in zip(copies, parts, strict=True):
            self._write(copy, part, out)
        return out

    def _tell_no_memory(self, target: str, ready: Sequence[Copy], tensors: Mapping[str, torch.Tensor]) -> None:
        if self.assign:
            some = _quoted(copy.source for copy in ready)
            self.errors.append(f"{self.prefix}{target} is on the meta device: {some} are only a part of its tensors.")
            return
        for copy in ready:
            if not tensors[copy.source].is_meta:
                warnings.warn(
                    f"for {self.prefix}{copy.source}: copying from a non-meta parameter in the checkpoint to a meta "
                    "parameter in the current model, which is a no-op. (Did you mean to pass `assign=True`?)",
                    stacklevel=2,
                )

    def _write(self, copy: Copy, source: torch.Tensor, target: torch.Tensor) -> None:
        try:
            put(copy.step(), source, target)
        except TepatchError as error:
            self.errors.append(str(error))
        except Exception as error:  # as torch does: told with all else that is wrong
            self.errors.append(
                f'While copying the parameter named "{self.prefix}{copy.source}", an exception occurred : {error.args}.'
            )


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).set_extra_state is not nn.Module.set_extra_state


def _is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_meta or other.is_meta or readable(one) is None or readable(other) is None:
        return one is other
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in sorted(names))
