"""Transformer Engine's mask types, windows and diagonals as one boolean mask.

True means masked out, the opposite of Hugging Face's boolean masks. A query row i may look at key j where

    i + offset - left <= j <= i + offset + right

with the window (left, right), both ends included and -1 for no limit. ``offset`` is 0 for "causal" and
"padding_causal", whose diagonal starts at the top left corner; for every other type the diagonal ends at the
bottom right corner of the scores, and for padding types at that of each sequence's own, unpadded scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tepatch.errors import Problem, UnsupportedError

MASK_TYPES = (
    "no_mask",
    "padding",
    "causal",
    "padding_causal",
    "causal_bottom_right",
    "padding_causal_bottom_right",
    "arbitrary",
)
Window = tuple[int, int]
AttentionMask = Tensor | tuple[Tensor, Tensor] | None


def check_mask_type(mask_type: str) -> str:
    """Give the mask type back, or raise UnsupportedError for one that does not exist."""
    if mask_type in MASK_TYPES:
        return mask_type
    raise UnsupportedError(
        Problem(
            where="attn_mask_type",
            what="there is no such mask type",
            expected=f"one of {', '.join(MASK_TYPES)}",
            found=repr(mask_type),
        )
    )


def effective_window(mask_type: str, window: Window | None) -> Window:
    """Give the window that Transformer Engine applies: (left, right), inclusive, -1 for no limit.

    A causal type never looks right of the diagonal. For the other types (-1, 0) means no window, since that
    is what a module made for causal attention holds when it is called with another type.

    Raises:
        UnsupportedError: a window that Transformer Engine refuses, such as (-1, 5).
    """
    left, right = (-1, -1) if window is None else window
    causal = "causal" in mask_type
    if (left, right) in ((-1, -1), (-1, 0)):
        return (-1, 0) if causal else (-1, -1)
    if left >= 0 and causal:
        return (left, 0)
    if left >= 0 and right >= 0:
        return (left, right)
    raise UnsupportedError(
        Problem(
            where="window_size",
            what=f"no such window with mask type {mask_type!r}",
            expected="(-1, 0) or (n, 0) with n >= 0" if causal else "(-1, -1) or (m, n) with m, n >= 0",
            found=repr((left, right)),
        )
    )


def full_mask(
    mask_type: str,
    window: Window,
    *,
    num_queries: int,
    num_keys: int,
    attention_mask: AttentionMask,
    attention_type: str,
    device: torch.device,
) -> Tensor:
    """Build the mask that a mask type and a window stand for; True = masked out.

    ``window`` is what ``effective_window`` gives. The result is broadcastable to
    [batch, heads, num_queries, num_keys].

    Raises:
        UnsupportedError: the type needs a mask and has none, or has one of the wrong kind or shape, or would
            ignore it; or padding is not on the right.
    """
    if "padding" in mask_type:
        queries, keys = _padding_pair(mask_type, attention_mask, attention_type, num_queries, num_keys)
        offset: int | Tensor = 0
        if mask_type != "padding_causal":
            offset = (_lengths(keys) - _lengths(queries)).view(-1, 1, 1, 1)
        hidden = queries.transpose(-1, -2) | keys
    elif mask_type == "arbitrary":
        offset, hidden = num_keys - num_queries, _checked(attention_mask, "a mask for type 'arbitrary'")
    else:
        if attention_mask is not None:
            raise UnsupportedError(
                Problem(
                    where="attention_mask",
                    what=f"mask type {mask_type!r} ignores it",
                    fix="pass None, or use a padding type or 'arbitrary'",
                )
            )
        offset = 0 if mask_type == "causal" else num_keys - num_queries
        hidden = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device)
    # [1 or batch, 1, num_queries, num_keys]: how far key j lies right of the diagonal of row i.
    rows = torch.arange(num_queries, device=device).view(1, 1, -1, 1)
    columns = torch.arange(num_keys, device=device).view(1, 1, 1, -1)
    ahead = columns - rows - offset
    left, right = window
    if left >= 0:
        hidden = hidden | (ahead < -left)
    if right >= 0:
        hidden = hidden | (ahead > right)
    return hidden


def _padding_pair(
    mask_type: str, mask: AttentionMask, attention_type: str, num_queries: int, num_keys: int
) -> tuple[Tensor, Tensor]:
    """Give the padding of queries [b, 1, 1, num_queries] and keys [b, 1, 1, num_keys]."""
    if attention_type == "cross" and isinstance(mask, tuple):
        pair = mask
    elif attention_type == "self" and isinstance(mask, Tensor):
        pair = (mask, mask)
    else:
        needed = "a pair of masks (queries, keys)" if attention_type == "cross" else "one mask, for queries and keys"
        found = f"a {type(mask).__name__}"
        raise UnsupportedError(
            Problem(
                where="attention_mask",
                what=f"mask type {mask_type!r} with attention_type {attention_type!r} needs {needed}",
                found="no mask" if mask is None else found,
            )
        )
    for side, part, size in zip(("queries", "keys"), pair, (num_queries, num_keys), strict=True):
        _checked(part, f"a padding mask for {side}")
        if part.dim() != 4 or part.shape[1:] != (1, 1, size):
            raise UnsupportedError(
                Problem(
                    where="attention_mask",
                    what=f"the padding mask for {side} has the wrong shape",
                    expected=f"[batch, 1, 1, {size}]",
                    found=str(list(part.shape)),
                )
            )
        _require_right_padding(part)
    return pair


def _checked(mask: AttentionMask, what: str) -> Tensor:
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return mask
    found = str(mask.dtype) if isinstance(mask, Tensor) else type(mask).__name__
    raise UnsupportedError(
        Problem(where="attention_mask", what=f"{what} must be a bool tensor, True = masked out", found=found)
    )


def _lengths(padding: Tensor) -> Tensor:
    return padding.logical_not().sum(dim=-1)


def _require_right_padding(padding: Tensor) -> None:
    # Transformer Engine's fused kernels see only how many tokens a sequence has, and take them from the left.
    # A graph being traced and a meta tensor have no values to look at.
    if padding.is_meta or torch.compiler.is_compiling():
        return
    if bool((padding[..., :-1] & ~padding[..., 1:]).any()):
        raise UnsupportedError(
            Problem(
                where="attention_mask",
                what="a padding mask type takes padding on the right only",
                found="a masked position before one that is not",
                fix="pad on the right, or use mask type 'arbitrary'",
            )
        )
