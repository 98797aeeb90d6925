"""A model's tensors by the names that they have in it, whatever is wrapped around its modules."""

from __future__ import annotations

import torch
from torch import nn


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by every name that they have, wrappers around modules left out of it."""
    found = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {without_wrappers(name): tensor for name, tensor in found}


def without_wrappers(name: str) -> str:
    """The name of a module or tensor as if FSDP and checkpointing had put nothing around the modules on its path.

    State dicts leave these parts out too, and wrappers give the attributes of what they wrap.
    """
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")
