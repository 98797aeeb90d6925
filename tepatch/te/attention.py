"""Self-attention as a Hugging Face decoder layer needs it, composed of the backend's modules.

Names inside are those of ``te.TransformerLayer`` (``core_attention``, ``proj``), but ``qkv`` for its
``layernorm_qkv``: Hugging Face's Trainer gives no weight decay to what has "layernorm" in its name. Q, K and V are
one parameter, ``[Q; K; V]`` by rows: one GEMM, and one tensor that can be quantized whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tepatch.errors import Problem, UnsupportedError
from tepatch.te.backend import modules
from tepatch.te.rope import take_rows
from tepatch.te.sequences import Dense, Layout, Masked, Varlen, direction, layout_of, layout_of_positions, packed_layout

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu_pytorch_tanh": "geglu",
    "gelu_python_tanh": "geglu",
    "gelu_new": "geglu",
    "quick_gelu": "qgeglu",
    "relu": "reglu",
    "relu2": "sreglu",
}
"""Hugging Face's ``hidden_act`` -> Transformer Engine's gated activation of the same function.

Not among them: ``gelu``. Transformer Engine's GELU is the tanh approximation, Hugging Face's is exact.
"""


NO_WINDOW = (-1, -1)
"""Said with every type that is not causal: a module made for causal attention has a causal window of its own."""


def gated_activation(hidden_act: str) -> str:
    """Transformer Engine's name for a gated MLP with this activation.

    Raises ``UnsupportedError`` for an activation that Transformer Engine does not have.
    """
    if hidden_act in ACTIVATIONS:
        return ACTIVATIONS[hidden_act]
    raise UnsupportedError(
        Problem(
            where="config.hidden_act",
            what="Transformer Engine has no gated activation for this function",
            expected="one of " + ", ".join(ACTIVATIONS),
            found=repr(hidden_act),
            fix="load this model with transformers",
        )
    )


def normal_init(std: float) -> Callable[[Tensor], Tensor]:
    """An ``init_method`` for the backend's modules: normal with this standard deviation, as Hugging Face's."""
    return partial(nn.init.normal_, std=std)


class SelfAttention(nn.Module):
    """Norm, fused QKV, rotary positions, cache, attention and output projection.

    ``layer_idx`` counts from 0, as in Hugging Face (it is the layer's place in the cache). Tensors are
    ``[batch, tokens, hidden]``.

    - ``normalization`` is ``"RMSNorm"``, ``"LayerNorm"``, or None for no norm before QKV;
    - ``qk_norm``: an RMSNorm over each head of queries and keys (``q_norm``, ``k_norm``), before they are rotated;
    - ``softcap``: scores are ``softcap * tanh(scores / softcap)`` (Gemma 2, arXiv:2408.00118, section 2);
    - ``window``: how many keys a query sees, itself counted;
    - ``is_causal`` False: every token sees all of its sequence (no cache, no window).

    Raises ``UnsupportedError`` for a combination that the backend does not compute.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer_idx: int,
        norm_eps: float,
        normalization: str | None = "RMSNorm",
        zero_centered_gamma: bool = False,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        window: int | None = None,
        qk_norm: bool = False,
        softcap: float | None = None,
        is_causal: bool = True,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if window is not None and not is_causal:
            raise UnsupportedError(Problem(where="window", what="only causal attention has a window here"))
        te = modules()
        init_method = normal_init(init_std)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.layer_idx = layer_idx
        self.window, self.is_causal, self.proj_bias = window, is_causal, proj_bias
        self.apply_rotary = te.apply_rotary
        rows = (num_heads + 2 * num_kv_heads) * head_dim
        norm = {"eps": norm_eps, "zero_centered_gamma": zero_centered_gamma}
        if normalization is None:
            self.qkv = te.Linear(hidden_size, rows, bias=qkv_bias, init_method=init_method)
        else:
            self.qkv = te.LayerNormLinear(
                hidden_size, rows, bias=qkv_bias, normalization=normalization, init_method=init_method, **norm
            )
        self.q_norm = self.k_norm = None
        if qk_norm:
            self.q_norm, self.k_norm = te.RMSNorm(head_dim, **norm), te.RMSNorm(head_dim, **norm)
        self.core_attention = te.DotProductAttention(
            num_heads,
            head_dim,
            num_gqa_groups=num_kv_heads,
            attention_dropout=dropout,
            qkv_format="bshd",
            attn_mask_type="causal" if is_causal else "no_mask",
            # Or, where nothing is fused, Transformer Engine takes the lengths of packed queries for those of the keys.
            attention_type="cross",
            softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
            layer_number=layer_idx + 1,  # Transformer Engine counts layers from 1
            **({} if softcap is None else {"softcap": softcap}),
        )
        self.proj = te.Linear(num_heads * head_dim, hidden_size, bias=proj_bias, init_method=init_method)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend within the sequences that the mask tells.

        ``attention_mask`` is one of the forms of ``tepatch.te.sequences.layout_of``. ``position_embeddings`` are cos
        and sin of Hugging Face's rotary module (None: no positions). ``position_ids`` ``[b or 1, tokens]`` that begin
        again at 0 where there is no mask are packed sequences, also with a new dynamic cache. ``cache`` was called
        ``past_key_values`` before transformers 5.24. Of ``kwargs``, ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (with
        ``max_length_q`` and ``max_length_k``) tell where packed sequences begin, and the rest does not concern
        attention. What comes out for padding means nothing, but where a token follows (``tepatch.te.sequences``).

        Raises ``UnsupportedError`` for a mask of another form, for packed sequences that do not fit the tokens, and for
        what is not a ``transformers.Cache`` (the paged cache of continuous batching).
        """
        cache = _one_cache(cache, past_key_values)
        if cache is None:
            layout = self._layout(attention_mask, position_ids, hidden_states.shape, None, kwargs)
            fused: Any = (self.qkv, self.proj)
            is_plain = all(module.places.are_plain for module in fused)  # adapters expect rows of the batch
            if isinstance(layout, Varlen) and layout.can_be_packed and is_plain:
                return self._attend_packed(hidden_states, position_embeddings, layout, attention_mask)
            query, key, value = self._project(hidden_states, position_embeddings)
        else:
            query, key, value = self._project(hidden_states, position_embeddings)
            tokens, num_keys = query.shape[1], None
            if attention_mask is None and tokens > 1 and cache.is_compileable:
                # Other attention implementations than ours say nothing of the empty slots of a static cache.
                num_keys = int(cache.get_seq_length(self.layer_idx)) + tokens
            _order_copies(cache, key.device)
            # A cache holds [batch, heads, tokens, head_dim], after rotation.
            cached = cache.update(key.transpose(1, 2), value.transpose(1, 2), self.layer_idx)
            key, value = (states.transpose(1, 2) for states in cached)
            num_keys = num_keys or key.shape[1]
            layout = self._layout(attention_mask, position_ids, hidden_states.shape, num_keys, kwargs)
        context = self._attend(query, key, value, layout, attention_mask)
        out: Tensor = self.proj(context)
        return out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, mask: Tensor | None) -> Tensor:
        told = direction(mask)
        is_causal = self.is_causal if told is None else told
        return attend(self.core_attention, query, key, value, layout, self.window, is_causal=is_causal)

    def _project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[b, s, heads, d]``, keys and values ``[b, s, kv heads, d]``, rotated."""
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = self.qkv(hidden_states).view(*hidden_states.shape[:2], heads, self.head_dim)
        query, key, value = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if position_embeddings is not None:
            cos, sin = position_embeddings
            query, key = self.apply_rotary(query, cos, sin), self.apply_rotary(key, cos, sin)
        return query, key, value

    def _attend_packed(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        layout: Varlen,
        mask: Tensor | None,
    ) -> Tensor:
        """The same without a row for padding anywhere: tokens are taken out before, and put back behind."""
        batch, tokens, _ = hidden_states.shape
        rows = layout.queries
        assert rows is not None
        if position_embeddings is not None:
            position_embeddings = take_rows(*position_embeddings, rows, batch)
        packed = hidden_states.flatten(0, 1).index_select(0, rows)[None]
        query, key, value = self._project(packed, position_embeddings)
        context = self._attend(query, key, value, replace(layout, queries=None, keys=None), mask)

        def put_back(packed: Tensor) -> Tensor:
            whole = packed.new_zeros(batch * tokens, packed.shape[-1])
            return whole.index_copy_(0, rows, packed[0]).view(batch, tokens, -1)

        if self.proj_bias and self.is_causal:
            # Padding that sees nothing has the bias, and a token may be predicted from it.
            biased: Tensor = self.proj(put_back(context))
            return biased
        return put_back(self.proj(context))

    def _layout(
        self,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        shape: torch.Size,
        num_keys: int | None,
        kwargs: Mapping[str, Any],
    ) -> Layout:
        """What the mask or the positions say; ``num_keys`` is None without a cache."""
        batch, tokens, _ = shape
        layout: Layout
        if kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None:
            layout = self._packed(kwargs, attention_mask, batch * tokens, batch * (num_keys or tokens))
        elif self.is_causal and num_keys == tokens > 1 and attention_mask is None and position_ids is not None:
            layout = layout_of_positions(position_ids, batch, tokens)
        else:
            layout = layout_of(attention_mask, tokens, num_keys or tokens, window=self.window)
        return layout

    def _packed(self, kwargs: Mapping[str, Any], mask: Tensor | None, num_queries: int, num_keys: int) -> Layout:
        if num_queries != num_keys:
            raise UnsupportedError(
                Problem(
                    where="cache",
                    what="packed sequences (cu_seq_lens_q) can not continue from a cache",
                    fix="pass no cache, and use_cache=False; or pass a batch of padded rows",
                )
            )
        starts, key_starts = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
        lengths = (kwargs.get("max_length_q"), kwargs.get("max_length_k"))
        layout: Layout = packed_layout(starts, starts if key_starts is None else key_starts, num_queries, lengths, mask)
        return layout


def _one_cache(cache: Any, past_key_values: Any) -> Cache | None:
    """The cache, under the name that this version of transformers has for it."""
    from transformers.cache_utils import Cache

    if cache is None:
        cache = past_key_values
    elif past_key_values is not None and past_key_values is not cache:
        raise UnsupportedError(
            Problem(where="cache, past_key_values", what="two different caches were given", fix="pass one, as cache")
        )
    if cache is not None and not isinstance(cache, Cache):
        raise UnsupportedError(
            Problem(
                where="cache",
                what="the layers can not write keys and values to this",
                expected="a transformers.Cache, such as DynamicCache or StaticCache",
                found=type(cache).__name__,
                fix="use generate instead of generate_batch: continuous batching has a cache of another kind",
            )
        )
    return cache


def _order_copies(cache: Cache, device: torch.device) -> None:
    """Let an offloaded cache fetch the next layer's keys only after what was computed so far.

    Hugging Face's has a stream for fetching, for which the computing one waits, but not the other way round: where the
    host is ahead, it fetches keys that are not yet stored, into memory that attention still reads.
    """
    if getattr(cache, "offloading", False) and device.type == "cuda":
        cache.prefetch_stream.wait_stream(torch.cuda.current_stream(device))


def attend(
    core: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    window: int | None = None,
    *,
    is_causal: bool = True,
) -> Tensor:
    """Attention by a backend's ``DotProductAttention``, in the fastest form that computes the layout exactly.

    Shapes: query ``[b, q, heads, d]``, key and value ``[b, k, kv heads, d]``; out ``[b, q, heads * d]``. ``window`` is
    how many keys a query sees, itself counted. Rows that are in no sequence of a ``Varlen`` come out as
    zeros, but for those that are read (``holes``).
    """
    if window is not None and not is_causal and not isinstance(layout, Masked):
        raise UnsupportedError(
            Problem(where="attention_mask", what="the mask is for attention both ways, in a layer with a causal window")
        )
    batch, num_queries = query.shape[:2]
    size = {} if window is None else {"window_size": (window - 1, 0)}
    if isinstance(layout, Masked):
        heads = query.shape[2]
        if layout.visible.shape[0] not in (1, batch) or layout.visible.shape[1] not in (1, heads):
            raise UnsupportedError(
                Problem(
                    where="attention_mask",
                    what="the mask is for another batch or another number of heads",
                    expected=f"[1 or {batch}, 1 or {heads}, ...]",
                    found=str(list(layout.visible.shape)),
                )
            )
        mask = {"attn_mask_type": "arbitrary", "attention_mask": ~layout.visible, "window_size": NO_WINDOW}
        masked: Tensor = core(query, key, value, **mask)
        # Transformer Engine's softmax over nothing is one over everything; torch's attention gives zeros.
        blind = ~layout.visible.any(dim=-1, keepdim=True).transpose(1, 2)
        return masked.view(batch, num_queries, heads, -1).masked_fill(blind, 0).flatten(2)
    if isinstance(layout, Dense):
        num_keys = layout.num_keys
        if num_keys < key.shape[1]:
            key, value = key[:, :num_keys], value[:, :num_keys]
        if not is_causal or (num_queries == 1 and (window is None or num_keys <= window)):
            kind, size = "no_mask", {"window_size": NO_WINDOW}
        else:
            kind = "causal" if num_queries == num_keys else "causal_bottom_right"
        dense: Tensor = core(query, key, value, attn_mask_type=kind, **size)
        return dense
    if not layout.max_queries:  # nothing but padding; the product keeps what came before in the backward pass
        return query.flatten(2) * 0
    if is_causal:
        kind = "padding_causal" if layout.cu_queries is layout.cu_keys else "padding_causal_bottom_right"
    else:
        kind, size = "padding", {"window_size": NO_WINDOW}
    packed: Tensor = core(
        _rows(query, layout.queries),
        _rows(key, layout.keys),
        _rows(value, layout.keys),
        qkv_format="thd",
        attn_mask_type=kind,
        cu_seqlens_q=layout.cu_queries,
        cu_seqlens_kv=layout.cu_keys,
        max_seqlen_q=layout.max_queries,
        max_seqlen_kv=layout.max_keys,
        **size,
    )
    if layout.queries is not None:
        packed = packed.new_zeros(batch * num_queries, packed.shape[-1]).index_copy_(0, layout.queries, packed)
    if (holes := layout.holes) is not None:
        row = torch.arange(batch, device=query.device)[:, None]
        read = attend(core, query[row, holes.queries], key, value, Masked(holes.visible), is_causal=is_causal)
        packed = packed.index_copy(0, holes.rows, read.flatten(0, 1)[holes.kept])
    return packed.view(batch, num_queries, -1)


def _rows(tensor: Tensor, rows: Tensor | None) -> Tensor:
    """``[b, s, h, d]`` -> ``[tokens, h, d]``: these of its ``b * s`` tokens, one behind the other."""
    if rows is None:
        return tensor.flatten(0, 1)
    _, size, *_ = tensor.shape
    if tensor.stride(0) == size * tensor.stride(1):
        return tensor.flatten(0, 1).index_select(0, rows)
    # A cache's tensors lie otherwise: to flatten them would copy them whole.
    return tensor[rows // size, rows % size]
