"""The two languages of a patched model: names of the checkpoint's tensors, and of the model's own parameters.

A plan is the dictionary. For some architectures the stock model has other names in memory than in its checkpoints
(experts lie apart on disk, and are one parameter in memory): a state dict then has those in memory, as the stock
model's has.

What is translated are groups of tensors that share elements (``tepatch.planning.groups``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, reduce
from types import FrameType
from typing import Any

import torch
from torch import nn

from tepatch.errors import PlanError, Problem, UnsupportedError
from tepatch.hf.model import EXTRA_STATE
from tepatch.mapping.names import fold
from tepatch.planning.bind import IDENTITY
from tepatch.planning.groups import Group, Names
from tepatch.planning.plan import Plan
from tepatch.te.nvidia.quantized import is_quantized
from tepatch.transfer.steps import put
from tepatch.views import Pair, source_strides

own_names: ContextVar[bool] = ContextVar("own_names", default=False)
"""Whether state dicts are given and taken in the parameters' own names."""
_LOOK_UP = (
    "accelerate.big_modeling",
    "accelerate.utils.fsdp_utils",
    "accelerate.utils.modeling.check_device_map",
    "torch.distributed.checkpoint.state_dict",
)
"""Modules and functions that ask for a state dict to find the model's parameters by the names in it."""
_FILLS_BY_NAME = "accelerate.utils.modeling.load_checkpoint_in_model"
"""The function that asks for a state dict first, and then sets what its names lead to."""
_INSIDE_STATE_DICT = ("tepatch.hf.", "torch.nn.modules.module")


@contextmanager
def patched_names() -> Iterator[None]:
    """Inside the block, of this context only, state dicts have the parameters' own names, given and taken.

    For tools that match a state dict with ``named_parameters`` (``torch.distributed.checkpoint``). Transformer
    Engine's extra state stays out of it as always.
    """
    token = own_names.set(True)
    try:
        yield
    finally:
        own_names.reset(token)


def gives_own_names() -> bool:
    """Whether the state dict that is being made is to have the parameters' own names.

    Beside ``patched_names``, that is for accelerate's ``dispatch_model``, ``cpu_offload`` and ``disk_offload``, whose
    hooks look in it for the parameters of their modules, and for what accelerate does for FSDP and
    ``torch.distributed.checkpoint.state_dict``, which look up each name in the model. Nothing but the caller tells
    them from those who save.
    """
    if own_names.get():
        return True
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _module_of(frame).startswith(_INSIDE_STATE_DICT):
        frame = frame.f_back
    if frame is None:
        return False
    module = _module_of(frame)
    if f"{module}.{frame.f_code.co_name}" == _FILLS_BY_NAME and frame.f_locals.get("device_map") is not None:
        raise UnsupportedError(
            Problem(
                where="device_map",
                what="accelerate fills a model with a device map parameter by parameter, and parts of fused parameters "
                "are none",
                fix="tepatch.load(..., device_map=...) reads each tensor to its place; without a device map, "
                "accelerate.load_checkpoint_in_model(model, folder) fills a model where it is",
            )
        )
    return module in _LOOK_UP or f"{module}.{frame.f_code.co_name}" in _LOOK_UP


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def is_extra_state(key: str, prefix: str) -> bool:
    """Whether ``key`` is Transformer Engine's state of a module below ``prefix``."""
    return key.startswith(prefix) and key.rpartition(".")[2] == EXTRA_STATE


def readable(tensor: torch.Tensor) -> torch.Tensor | None:
    """``tensor`` with strides over plain numbers: itself, or the numbers of a quantized one. None if it has none."""
    kind = type(tensor)
    if kind is torch.Tensor or kind is nn.Parameter:
        return tensor
    if not is_quantized(tensor):
        return None  # such as a sharded tensor (DTensor): what is here is a part, views of the whole mean nothing in it
    plain: torch.Tensor = tensor.dequantize()
    return plain


def translate(names: Names, state_dict: dict[str, Any], prefix: str) -> None:
    """Put the checkpoint's tensors in the place of the parameters that hold them, in ``state_dict`` itself.

    A group with a parameter that is absent, of another shape or sharded stays as it is. Keys that are not the
    plan's stay. Raises ``PlanError`` if a name would stand for two tensors.
    """
    given: dict[str, dict[str, torch.Tensor]] = {}
    gone = set[str]()
    for group in names.groups:
        values = _values(names.plan, group, state_dict, prefix)
        if values is not None:
            first = prefix + group.targets[0]
            given[first] = {prefix + name: _source(names.plan, name, group, values) for name in group.sources}
            gone.update(prefix + name for name in group.targets)
    before = dict(state_dict)
    state_dict.clear()  # the dict itself: whoever called a hook keeps the one that it gave
    for key, value in before.items():
        new = given.get(key, {} if key in gone else {key: value})
        if twice := sorted(new.keys() & state_dict.keys()):
            raise PlanError(
                Problem(
                    where="state_dict",
                    what="two tensors of the model have the name of one tensor of the checkpoint",
                    details=tuple(fold(twice)),
                    fix="rename the module that was added, or use tepatch.hf.state.patched_names()",
                )
            )
        state_dict.update(new)


def _values(plan: Plan, group: Group, state_dict: Mapping[str, Any], prefix: str) -> dict[str, torch.Tensor] | None:
    """The parameters of a group, if all are there as the plan knows them."""
    out: dict[str, torch.Tensor] = {}
    for name in group.targets:
        value = state_dict.get(prefix + name)
        if not isinstance(value, torch.Tensor) or tuple(value.shape) != plan.targets[name].shape:
            return None
        plain = readable(value)
        if plain is None:
            return None
        out[name] = plain
    return out


def _source(plan: Plan, name: str, group: Group, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One tensor of the checkpoint, in its parameter's dtype and on its device."""
    copies = [copy for copy in group.copies if copy.source == name]
    shape, held = plan.sources[name].shape, values[copies[0].target]
    if len(copies) == 1 and copies[0].affine == IDENTITY and held.is_contiguous() and not held.is_meta:
        strides = _strides(copies[0].pair, shape)
        if strides is not None:
            return _shared(held, copies[0].pair.target_offset, shape, strides)
    dtype = reduce(torch.promote_types, (values[copy.target].dtype for copy in copies))
    out = torch.empty(shape, dtype=dtype, device=held.device)
    for copy in copies if not held.is_meta else ():
        put(copy.step(is_reversed=True), values[copy.target], out)
    return out


def _shared(held: torch.Tensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """A view of ``held``, on a storage of its own over the same memory.

    Views of one tensor have its storage in common, and savers take such tensors for tied: they copy or refuse them.
    """
    start = held.storage_offset() + offset
    if isinstance(held, nn.Parameter):  # keep_vars=True asks for what autograd knows
        return held.as_strided(shape, strides, start)
    size = held.element_size()
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    memory = held.untyped_storage()[start * size : (start + extent) * size]  # keeps all of it alive
    return torch.empty(0, dtype=held.dtype, device=held.device).set_(memory, 0, shape, strides)


@lru_cache(maxsize=4096)  # layers share their layouts
def _strides(pair: Pair, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    return source_strides(pair, shape)
