"""Optimizers of patched models: a state that was saved for the stock model's parameters is refused by name.

An optimizer knows its parameters by their place in a list. A fused parameter has one place where the stock model has
three, so a state of a stock run has another length, or moments of other shapes. torch says the one in its own words,
and takes the other without a word. It has no hook for all optimizers at this point, so its method is wrapped.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from tepatch.errors import Problem, UnsupportedError

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What optimizers keep in a parameter's own shape."""
_layers: WeakSet[nn.Module] = WeakSet()
"""Patched layers whose parameters an optimizer may have."""


def watch(layer: nn.Module) -> None:
    """Have the states of optimizers looked at that have parameters of ``layer``."""
    _layers.add(layer)
    _wrap_once()


@functools.cache
def _wrap_once() -> None:
    method = torch.optim.Optimizer.load_state_dict
    torch.optim.Optimizer.load_state_dict = _checking(method)  # type: ignore[method-assign]


def _checking(original: Any) -> Any:
    @functools.wraps(original)
    def load_state_dict(self: torch.optim.Optimizer, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(state_dict, Mapping) and (found := _difference(self, state_dict)):
            raise UnsupportedError(
                Problem(
                    where=f"{type(self).__name__}.load_state_dict",
                    what="this state is of other parameters than those of the patched model, as a stock model's are",
                    expected=found[0],
                    found=found[1],
                    fix="end this run with the model that it was begun with; or begin a new one with its weights: "
                    "tepatch.load(patch, checkpoint), and train() without resume_from_checkpoint",
                )
            )
        return original(self, state_dict, *args, **kwargs)

    return load_state_dict


def _difference(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> tuple[str, str] | None:
    """What an optimizer of a patched model has and what a state has, as text; None if they belong together."""
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    held = [list(group["params"]) for group in optimizer.param_groups]
    if not isinstance(groups, list) or not isinstance(state, Mapping) or not _are_patched(held):
        return None  # whatever it is, torch knows
    saved = [list(group["params"]) for group in groups]
    sizes = [[len(each) for each in side] for side in (held, saved)]
    if sizes[0] != sizes[1]:
        return (f"groups of {sizes[0]} parameters", f"groups of {sizes[1]}")
    for parameter, key in zip((p for each in held for p in each), (k for each in saved for k in each), strict=True):
        for name in _MOMENTS:
            moment = state.get(key, {}).get(name)
            if isinstance(moment, torch.Tensor) and moment.numel() != parameter.numel():
                return (f"{name} {list(parameter.shape)} for parameter {key}", str(list(moment.shape)))
    return None


def _are_patched(groups: list[list[torch.Tensor]]) -> bool:
    given = {id(parameter) for group in groups for parameter in group}
    return any(id(parameter) in given for layer in list(_layers) for parameter in layer.parameters())
