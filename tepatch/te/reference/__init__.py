"""Plain PyTorch modules that stand in for Transformer Engine's.

They take Transformer Engine's constructor arguments, have its parameter names and shapes, and compute the
same functions by ordinary differentiable operations, on any device and in any dtype. So a laptop runs the
real layer, mapping, loader and generation; and on a GPU they are what Transformer Engine is held against.

What Transformer Engine computes inside one kernel in float32 (a norm, an activation) is computed in float32
here too and rounded once. They hold no ``_extra_state``, and a bias that is switched off is None. What they
cannot compute they refuse with ``UnsupportedError``; an argument they do not have is Python's own
``TypeError``.
"""

from __future__ import annotations

from tepatch.te.norms import LayerNorm, RMSNorm
from tepatch.te.reference.attention import DotProductAttention
from tepatch.te.reference.grouped import grouped_mlp, permute, unpermute
from tepatch.te.reference.linear import LayerNormLinear, Linear
from tepatch.te.reference.mlp import ACTIVATIONS, LayerNormMLP

__all__ = [
    "ACTIVATIONS",
    "DotProductAttention",
    "LayerNorm",
    "LayerNormLinear",
    "LayerNormMLP",
    "Linear",
    "RMSNorm",
    "grouped_mlp",
    "permute",
    "unpermute",
]
