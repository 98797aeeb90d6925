"""Rotary positions in float32, whatever dtype the model runs in.

A position of some thousands times a frequency that was rounded to bfloat16 is wrong by whole turns, and
casting a Hugging Face model (``model.bfloat16()``) does round its rotary module's frequencies.
``Float32Rotary`` keeps them, and hands out cos and sin in float32; ``apply_rotary`` turns a tensor by them
and rounds once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tepatch.errors import Problem, UnsupportedError


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys by their positions; computed in float32, rounded once to ``x.dtype``.

    Shapes: x [b, s, h, d]; cos and sin [b or 1, s, rot] with an even rot <= d, as Hugging Face's rotary
    modules give them. Dimension i turns with dimension i + rot/2 (Hugging Face's ``rotate_half`` order);
    dimensions from rot on are left alone (partial rotary).

    y = x * cos + (-x[second half], x[first half]) * sin   (Su et al. 2021, arXiv:2104.09864)

    Raises:
        UnsupportedError: the shapes do not fit.
    """
    rot = cos.shape[-1]
    fits = x.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape and cos.shape[1] == x.shape[1]
    if not fits or cos.shape[0] not in (1, x.shape[0]) or rot % 2 or rot > x.shape[-1]:
        raise UnsupportedError(
            Problem(
                where="apply_rotary",
                what="cos and sin do not fit the tensor to rotate",
                expected="x [b, s, h, d]; cos and sin [b or 1, s, rot], rot even and at most d",
                found=f"x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}",
            )
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(wide).unsqueeze(2) for table in (cos, sin))
    turning = x[..., :rot].to(wide)
    first, second = turning.chunk(2, dim=-1)
    turned = (turning * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
    return turned if rot == x.shape[-1] else torch.cat((turned, x[..., rot:]), dim=-1)


class Float32Rotary(nn.Module):
    """A mixin that makes a Hugging Face rotary module give float32 cos and sin, and keep its buffers' dtype.

    Put it first: ``class TERotaryEmbedding(Float32Rotary, LlamaRotaryEmbedding)``. "RotaryEmbedding" has to
    stay in the name of the class, since that is how Hugging Face knows whose buffers to fill after a build on
    meta.

    The buffers follow ``model.to(device)``, but no cast of the model (``bfloat16()``, ``half()``,
    ``to(dtype)``) changes them. Types that change their frequencies while running ("dynamic", "longrope")
    work as they do in Hugging Face's class, which still computes everything.
    """

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # Of x, Hugging Face's modules use the device and the dtype of the result, nothing else.
        stand_in = torch.empty(0, dtype=torch.float32, device=x.device)
        cos, sin = super().forward(stand_in, position_ids, *args, **kwargs)
        return cos, sin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Rotary:
        def keep_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            # The original is moved, rather than the cast one cast back: rounding cannot be undone.
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self
