"""Transformer Engine's own modules as the factories of a ``Modules`` value.

They differ from Transformer Engine's classes in two defaults only. Its classes create parameters on "cuda"
whatever torch's default device is, and defer them only when given the *string* "meta" (a
``torch.device("meta")`` compares unequal to it and is then filled from the GPU); so inside a meta context,
where Hugging Face builds a model, the factories pass that string. And the parameter dtype is torch's default,
as everywhere in torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tepatch.te.backend import Modules


def load() -> Modules:
    """Give the factories of the installed Transformer Engine; ``probe()`` must have found it usable."""
    te = importlib.import_module("transformer_engine.pytorch")
    return Modules(
        name="te",
        default_device="cuda",
        Linear=_factory(te.Linear, dtype_argument="params_dtype"),
        LayerNormLinear=_factory(te.LayerNormLinear, dtype_argument="params_dtype"),
        LayerNormMLP=_factory(te.LayerNormMLP, dtype_argument="params_dtype"),
        RMSNorm=_factory(te.RMSNorm, dtype_argument="dtype"),
        LayerNorm=_factory(te.LayerNorm, dtype_argument="dtype"),
        DotProductAttention=_exact_attention(te.DotProductAttention),
    )


def placement(device: str | torch.device | None) -> str | torch.device:
    """Give the device to ask Transformer Engine for: "meta" in a meta context, else as given, else a GPU."""
    default = torch.get_default_device()
    if default.type == "meta":
        return "meta"
    if device is None:
        return default if default.type == "cuda" else "cuda"
    return "meta" if torch.device(device).type == "meta" else device


def _exact_attention(cls: type[nn.Module]) -> type[nn.Module]:
    class DotProductAttention(cls):  # type: ignore[misc,valid-type]
        """Transformer Engine's attention, given tensors that lie in memory as their format says.

        Transformer Engine guesses the layout from strides, and takes keys and values that are both transposed
        (as those from a Hugging Face cache are) for contiguous ones: it then attends to the wrong numbers
        without a word (2.20.2, ``get_qkv_layout``).
        """

        def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            tensors = (tensor.contiguous() for tensor in (query, key, value))
            out: Tensor = super().forward(*tensors, *args, **kwargs)
            return out

    return DotProductAttention


def _factory(cls: Callable[..., nn.Module], *, dtype_argument: str) -> Callable[..., nn.Module]:
    def build(*args: Any, device: str | torch.device | None = None, **kwargs: Any) -> nn.Module:
        if kwargs.get(dtype_argument) is None:
            kwargs[dtype_argument] = torch.get_default_dtype()
        return cls(*args, device=placement(device), **kwargs)

    return build
