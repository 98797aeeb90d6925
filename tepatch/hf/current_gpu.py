"""Layers on several GPUs: each is computed with its own as torch's current one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tepatch.hf.offloaded import hooks_of
from tepatch.te.devices import brought

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def follow_weights(model: PreTrainedModel) -> None:
    """Make every layer compute on its own GPU, whichever is torch's current one.

    Transformer Engine launches its kernels on the current GPU, not on that of its tensors (2.20.2). Masks and tables of
    positions are brought along, once for all layers of a GPU. Hooks are put on the layers only where there is more
    than one GPU to confuse.
    """
    if torch.cuda.device_count() < 2:
        return
    layers = set(model._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            current = _CurrentGpu()
            module.register_forward_pre_hook(current.enter, with_kwargs=True)
            module.register_forward_hook(current.leave, always_call=True)


_COMMON = ("attention_mask", "position_embeddings", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k")
"""Arguments that are the same for many layers."""


class _CurrentGpu:
    """The hooks around one layer. Its GPU is looked up at each call: models are moved, and offloaded."""

    def __init__(self) -> None:
        # By thread: DataParallel calls copies of a layer, which share its hooks, in a thread for each GPU.
        self.before: dict[int, list[int]] = {}

    def enter(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        current = torch.cuda.current_device()
        self.before.setdefault(threading.get_ident(), []).append(current)
        wanted = _gpu_of(module)
        if wanted is None:  # those copies have no parameters that can be listed
            wanted = next((each.device.index for each in args if isinstance(each, torch.Tensor) and each.is_cuda), None)
        if wanted is None:
            return None
        if wanted != current:
            torch.cuda.set_device(wanted)
        device = torch.device("cuda", wanted)
        common = {name: brought(kwargs[name], device) for name in _COMMON if name in kwargs}
        return args, {**kwargs, **common}

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        entered = self.before.get(threading.get_ident())
        if not entered:
            return  # another hook before ours has failed
        before = entered.pop()
        if torch.cuda.current_device() != before:
            torch.cuda.set_device(before)


def _gpu_of(layer: nn.Module) -> int | None:
    """The GPU on which a layer computes: where its weights are, or where accelerate's hooks will bring them."""
    for parameter in layer.parameters():
        if parameter.is_cuda:
            return parameter.device.index
    for module in layer.modules():
        for hook in hooks_of(module):
            device = getattr(hook, "execution_device", None)
            if device is None:
                continue
            found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
            if found.type == "cuda":
                return found.index
    return None
