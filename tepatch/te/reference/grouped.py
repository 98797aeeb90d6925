"""The reference for products with many experts' matrices, and for the order of tokens that they need.

Transformer Engine sorts the tokens by expert (``moe_permute``), multiplies each run of rows with its own matrix in one
grouped product, and adds up each token's results (``moe_unpermute``). Here the same is a sort, a loop and an addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tepatch.te.reference.mlp import activate

if TYPE_CHECKING:
    from tepatch.te.experts import Experts


def permute(hidden_states: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Sort tokens by expert: ``[tokens, n]`` and each token's experts ``[tokens, k]`` to rows ``[tokens * k, n]``.

    The second result is the order, for ``unpermute``.
    """
    order = index.flatten().argsort(stable=True)
    return hidden_states.index_select(0, order // index.shape[1]), order


def unpermute(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Add up each token's rows, weighted by ``weights`` ``[tokens, k]``: ``[tokens * k, n]`` to ``[tokens, n]``.

    The sum is made in float32 or wider, and rounded once.
    """
    tokens, k = weights.shape
    wide = torch.promote_types(rows.dtype, torch.float32)
    weighted = rows.to(wide) * weights.to(wide).flatten().index_select(0, order)[:, None]
    out = weighted.new_zeros(tokens, rows.shape[-1]).index_add_(0, order // k, weighted)
    return out.to(rows.dtype)


def grouped_mlp(experts: Experts, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Each expert's MLP of its rows ``[sum(counts), hidden_size]``, which lie one expert behind the other."""
    firsts, seconds = experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0)
    parts = [
        F.linear(activate(F.linear(part, first), experts.activation), second)
        for part, first, second in zip(torch.split(rows, list(counts)), firsts, seconds, strict=True)
        if len(part)
    ]
    return torch.cat(parts) if parts else rows
