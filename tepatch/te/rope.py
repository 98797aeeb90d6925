"""Rotary positions in float32, whatever dtype the model runs in.

A position of some thousands times a frequency that was rounded to bfloat16 is wrong by whole turns, and
casting a Hugging Face model (``model.bfloat16()``) does round its rotary module's frequencies.
``Float32Rotary`` keeps them, and hands out cos and sin in float32; ``apply_rotary`` turns a tensor by them
and rounds once. On a GPU Transformer Engine's kernel does that (``fused_rotary``), from the same angles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tepatch.contract import passes_on
from tepatch.errors import Problem, UnsupportedError
from tepatch.te.tracing import outside_graphs


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


Turn = Callable[..., Tensor]
"""Transformer Engine's ``apply_rotary_pos_emb``."""

_angles: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By the tensor of cosines of ``Float32Rotary``: the angles, or None until a layer asks for them."""
_taken: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By a tensor of cosines: rows, and the cosines and sines of these."""
_UNKNOWN = "unknown"


def fused_rotary(turn: Turn, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``apply_rotary`` by Transformer Engine's kernel, one launch instead of ten; contiguous ``[b, s, h, d]``.

    The kernel takes angles. They are known where cos and sin come from ``Float32Rotary`` and have no scale on them
    (as "yarn" and "longrope" have); other tables go through ``apply_rotary``.
    """
    angles = _angles_of(cos, sin)
    if angles is None:
        return apply_rotary(x, cos, sin)
    if cos.shape[0] == 1:  # all rows have the same positions
        return turn(x, angles, tensor_format="bshd", fused=True)
    # One long row, in which every token has angles of its own.
    tokens = x.reshape(-1, 1, *x.shape[2:])
    return turn(tokens, angles, tensor_format="sbhd", fused=True).view(x.shape)


@outside_graphs
def take_rows(cos: Tensor, sin: Tensor, rows: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The tables ``[b or 1, s, rot]`` for these of the ``batch * s`` tokens (int64), as ``[1, tokens, rot]``.

    All layers ask for the same rows of the same tables: they are taken once.
    """
    taken = _taken.get(cos)  # type: ignore[no-untyped-call]
    if taken is None or taken[0] is not rows:
        picked = [table.expand(batch, -1, -1).flatten(0, 1).index_select(0, rows)[None] for table in (cos, sin)]
        same_angles(picked[0], cos)
        taken = _taken[cos] = (rows, picked[0], picked[1])
    return taken[1], taken[2]


def same_angles(copy: Tensor, cos: Tensor) -> None:
    """Know of a copy of cosines what is known of them."""
    if cos in _angles:
        _angles[copy] = None


@outside_graphs
def _angles_of(cos: Tensor, sin: Tensor) -> Tensor | None:
    """float32 ``[tokens, 1, 1, rot]``, up to whole turns; None if they are not known."""
    angles: Tensor | str | None = _angles.get(cos, _UNKNOWN)  # type: ignore[no-untyped-call]
    if angles is None:
        angles = _angles[cos] = torch.atan2(sin, cos).reshape(-1, 1, 1, cos.shape[-1])
    return None if isinstance(angles, str) else angles


class Float32Rotary(nn.Module):
    """A mixin that makes a Hugging Face rotary module give float32 cos and sin, and keep its buffers' dtype.

    Put it first: ``class TERotaryEmbedding(Float32Rotary, LlamaRotaryEmbedding)``. "RotaryEmbedding" has to
    stay in the name of the class, since that is how Hugging Face knows whose buffers to fill after a build on
    meta.

    The buffers follow ``model.to(device)``, but no cast of the model (``bfloat16()``, ``half()``,
    ``to(dtype)``) changes them. Types that change their frequencies while running ("dynamic", "longrope")
    work as they do in Hugging Face's class, which still computes everything.
    """

    @passes_on
    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # Of x, Hugging Face's modules use the device and the dtype of the result, nothing else.
        stand_in = torch.empty(0, dtype=torch.float32, device=x.device)
        cos, sin = super().forward(stand_in, position_ids, *args, **kwargs)
        if cos.is_cuda and not torch.compiler.is_compiling() and self._scale_of(*args, **kwargs) == 1:
            _angles[cos] = None
        return cos, sin

    def _scale_of(self, layer_type: str = "", *_: Any, **__: Any) -> Any:
        """What cos and sin were multiplied with; models with a rope for each type of layer have as many scales."""
        return getattr(self, f"{layer_type}_attention_scaling" if layer_type else "attention_scaling", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Rotary:
        def keep_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            # The original is moved, rather than the cast one cast back: rounding cannot be undone.
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self
