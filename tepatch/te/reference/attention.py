"""The reference for ``te.DotProductAttention``: attention with Transformer Engine's masks and windows."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tepatch.errors import Problem, UnsupportedError
from tepatch.te.reference.masks import AttentionMask, Window, check_mask_type, effective_window, full_mask

FORMATS = ("sbhd", "bshd", "thd")
PACKED_MASKS = {
    "padding": "no_mask",
    "padding_causal": "causal",
    "padding_causal_bottom_right": "causal_bottom_right",
}
"""With format "thd": mask type -> what it means within each sequence."""


class DotProductAttention(nn.Module):
    """Attention without projections, as ``te.DotProductAttention``; it has no parameters.

    Heads may be grouped: key and value head j serves query heads j*r to j*r + r - 1, r being heads per group.
    Masks follow ``tepatch.te.reference.masks``. A query row that may look at no key gives zeros, and zero gradients.
    Dropout acts on the attention weights, in training mode only.

    Raises:
        UnsupportedError: a format, mask type, attention type or window that it cannot compute.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        *,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: Window | None = None,
        softcap: float = 0.0,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        _require(qkv_format, FORMATS, where="qkv_format")
        _require(attention_type, ("self", "cross"), where="attention_type")
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups = num_attention_heads if num_gqa_groups is None else num_gqa_groups
        if num_attention_heads % self.num_gqa_groups:
            raise UnsupportedError(
                Problem(
                    where="num_gqa_groups",
                    what="the heads do not divide into the groups",
                    found=f"{num_attention_heads} heads, {self.num_gqa_groups} groups",
                )
            )
        self.key_channels, self.value_channels = (
            (kv_channels, kv_channels) if isinstance(kv_channels, int) else kv_channels
        )
        self.attention_dropout = attention_dropout
        self.qkv_format = qkv_format
        self.attn_mask_type = check_mask_type(attn_mask_type)
        self.window_size = effective_window(attn_mask_type, window_size)
        self.softcap = softcap
        self.layer_number = layer_number
        self.attention_type = attention_type
        self.softmax_scale = 1 / math.sqrt(self.key_channels) if softmax_scale is None else softmax_scale
        self.name = name

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: AttentionMask = None,
        *,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: Window | None = None,
    ) -> Tensor:
        """Attend, with this call's format, mask type and window where given, else the constructor's.

        Shapes, with "bshd" ("sbhd" has the first two dimensions swapped): query [b, s_q, heads, d_k], key
        [b, s_kv, groups, d_k], value [b, s_kv, groups, d_v]; the result is [b, s_q, heads * d_v]. With "thd"
        sequences lie one behind the other, [tokens, heads, d], sequence i from ``cu_seqlens[i]`` to
        ``cu_seqlens[i + 1]`` (int32 [n + 1]), with one of the padding mask types and no mask; the longest lengths
        are taken and not needed.

        ``attention_mask`` is boolean, True = masked out: [b, 1, 1, s] for the padding types (a pair of them,
        for queries and keys, with attention_type "cross"), broadcastable to [b, heads, s_q, s_kv] for
        "arbitrary", and None for the others.

        Raises:
            UnsupportedError: what the mask types of ``tepatch.te.reference.masks`` refuse, or tensors of other shapes.
        """
        mask_type = self.attn_mask_type if attn_mask_type is None else check_mask_type(attn_mask_type)
        window = effective_window(mask_type, self.window_size if window_size is None else window_size)
        form = self.qkv_format if qkv_format is None else _require(qkv_format, FORMATS, where="qkv_format")
        self._check_shapes(query_layer, key_layer, value_layer, form)
        if form == "thd":
            _require(mask_type, PACKED_MASKS, where="attn_mask_type")
            if cu_seqlens_q is None or cu_seqlens_kv is None or attention_mask is not None:
                raise UnsupportedError(
                    Problem(where="cu_seqlens_q", what="format 'thd' needs cu_seqlens_q and cu_seqlens_kv, and no mask")
                )
            packed = (query_layer, key_layer, value_layer)
            return self._attend_packed(packed, cu_seqlens_q, cu_seqlens_kv, PACKED_MASKS[mask_type], window)
        # [b, s, h, d] or [s, b, h, d] -> [b, h, s, d]
        to_heads = (0, 2, 1, 3) if form == "bshd" else (1, 2, 0, 3)
        query, key, value = (x.permute(to_heads) for x in (query_layer, key_layer, value_layer))

        context = self._attend(query, key, value, attention_mask, mask_type, window)

        to_tokens = (0, 2, 1, 3) if form == "bshd" else (2, 0, 1, 3)
        return context.permute(to_tokens).flatten(2)

    def _attend_packed(
        self, packed: tuple[Tensor, Tensor, Tensor], cu_queries: Tensor, cu_keys: Tensor, mask_type: str, window: Window
    ) -> Tensor:
        """Attend within each sequence as if it were alone, [tokens, heads, d] to [tokens, heads * d]."""
        lengths: list[list[int]] = [ends.diff().tolist() for ends in (cu_queries, cu_keys, cu_keys)]
        # [tokens, h, d] -> [1, h, tokens, d] for each sequence
        heads_first = [tensor.transpose(0, 1).unsqueeze(0) for tensor in packed]
        sequences = [torch.split(tensor, sizes, dim=2) for tensor, sizes in zip(heads_first, lengths, strict=True)]
        contexts = [
            self._attend(query, key, value, None, mask_type, window)
            for query, key, value in zip(*sequences, strict=True)
        ]
        return torch.cat(contexts, dim=2).squeeze(0).transpose(0, 1).flatten(1)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: AttentionMask,
        mask_type: str,
        window: Window,
    ) -> Tensor:
        num_queries, num_keys = query.shape[2], key.shape[2]
        repeats = self.num_attention_heads // self.num_gqa_groups
        if repeats > 1:
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        if attention_mask is None and not self.softcap and window[0] == -1:
            # These need no mask in memory. torch's is_causal starts its diagonal at the top left.
            if mask_type == "no_mask" or (mask_type == "causal_bottom_right" and num_queries == 1):
                return self._sdpa(query, key, value)
            if mask_type == "causal" or (mask_type == "causal_bottom_right" and num_queries == num_keys):
                return self._sdpa(query, key, value, is_causal=True)
        hidden = full_mask(
            mask_type,
            window,
            num_queries=num_queries,
            num_keys=num_keys,
            attention_mask=attention_mask,
            attention_type=self.attention_type,
            device=query.device,
        )
        # A softmax over nothing is NaN, and so is its gradient: such a row looks at everything and is then
        # replaced by zeros, which also stops its gradient.
        empty = hidden.all(dim=-1, keepdim=True)
        visible = ~hidden | empty
        if self.softcap:
            context = self._capped(query, key, value, visible)
        else:
            context = self._sdpa(query, key, value, visible=visible)
        return context.masked_fill(empty, 0)

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        visible: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            dropout_p=self.attention_dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.softmax_scale,
        )

    def _capped(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32))
        scores = self.softcap * torch.tanh(scores * self.softmax_scale / self.softcap)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1).to(query.dtype)
        return F.dropout(weights, self.attention_dropout, self.training) @ value

    def _check_shapes(self, query: Tensor, key: Tensor, value: Tensor, form: str) -> None:
        expected = {
            "query": (query, self.num_attention_heads, self.key_channels),
            "key": (key, self.num_gqa_groups, self.key_channels),
            "value": (value, self.num_gqa_groups, self.value_channels),
        }
        problems = [
            Problem(
                where=name,
                what="wrong shape for this attention module",
                expected=f"{form} with h = {heads}, d = {channels}",
                found=str(list(tensor.shape)),
            )
            for name, (tensor, heads, channels) in expected.items()
            if tensor.dim() != len(form) or tensor.shape[-2:] != (heads, channels)
        ]
        if problems:
            raise UnsupportedError(problems)

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_attention_heads}, groups={self.num_gqa_groups}, {self.qkv_format}, "
            f"{self.attn_mask_type}, window={self.window_size}, scale={self.softmax_scale:.4g}"
        )


def _require(value: str, known: Iterable[str], *, where: str) -> str:
    if value not in known:
        raise UnsupportedError(
            Problem(
                where=where,
                what="the reference attention cannot compute this",
                expected=" or ".join(known),
                found=repr(value),
            )
        )
    return value
