"""Parameters that accelerate's hooks keep away from a model: where they are, so that it can still be saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tepatch.hf.named import named_tensors

Readers = Mapping[str, Callable[[], torch.Tensor]]
"""From a parameter's name to what gives its tensor."""


def offloaded(model: nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
    """Readers of the parameters that are on the meta device because accelerate keeps them elsewhere, by name.

    A reader gives the tensor from the CPU's memory as it is there, or reads it from the disk.
    """
    return dict(_away(model))


def _away(model: nn.Module) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    for name, tensor in named_tensors(model).items():
        if not tensor.is_meta:
            continue
        parts = name.split(".")
        for end in range(len(parts) - 1, -1, -1):  # the innermost hook that has it
            kept = _weights_of(model.get_submodule(".".join(parts[:end])))
            rest = ".".join(parts[end:])
            if kept is not None and _has(kept, rest):
                yield name, lambda kept=kept, rest=rest: kept[rest]  # type: ignore[misc]
                break


def _weights_of(module: nn.Module) -> Mapping[str, torch.Tensor] | None:
    """What accelerate's hook of a module takes its parameters from, by their names in the module."""
    for each in hooks_of(module):
        kept: Mapping[str, torch.Tensor] | None = getattr(each, "weights_map", None)
        if kept is not None and getattr(each, "offload", False):
            return kept
    return None


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's hooks of a module: one, or several in a sequence."""
    hook: Any = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _has(kept: Any, name: str) -> bool:
    """Whether ``kept`` has ``name``, without reading a tensor from the disk to find out."""
    prefix, whole = getattr(kept, "prefix", ""), getattr(kept, "dataset", kept)
    keys = getattr(whole, "all_keys", whole)
    return f"{prefix}{name}" in keys
