"""Self-attention as a Hugging Face decoder layer needs it, composed of the backend's modules.

Names inside are those of ``te.TransformerLayer`` (``layernorm_qkv``, ``core_attention``, ``proj``), so that
checkpoints of other Transformer Engine tools are recognisable. Q, K and V are one parameter, ``[Q; K; V]`` by
rows: one GEMM, and one tensor that can be quantized whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tepatch.errors import Problem, UnsupportedError
from tepatch.te.backend import modules
from tepatch.te.rope import apply_rotary

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
        normalization: str = "RMSNorm",
        zero_centered_gamma: bool = False,
        qkv_bias: bool = False,
        proj_bias: bool = False,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        te = modules()
        init_method = normal_init(init_std)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.layer_idx = layer_idx
        self.layernorm_qkv = te.LayerNormLinear(
            hidden_size,
            (num_heads + 2 * num_kv_heads) * head_dim,
            eps=norm_eps,
            bias=qkv_bias,
            normalization=normalization,
            zero_centered_gamma=zero_centered_gamma,
            init_method=init_method,
        )
        self.core_attention = te.DotProductAttention(
            num_heads,
            head_dim,
            num_gqa_groups=num_kv_heads,
            attention_dropout=dropout,
            qkv_format="bshd",
            attn_mask_type="causal",
            softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
            layer_number=layer_idx + 1,  # Transformer Engine counts layers from 1
        )
        self.proj = te.Linear(num_heads * head_dim, hidden_size, bias=proj_bias, init_method=init_method)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Attend causally. ``attention_mask`` is None or boolean ``[b, 1 or h, q, kv]``, True where to attend.

        ``position_embeddings`` are cos and sin of Hugging Face's rotary module (None: no positions). Raises
        ``UnsupportedError`` for masks of another form.
        """
        batch, tokens, _ = hidden_states.shape
        qkv = self.layernorm_qkv(hidden_states).view(batch, tokens, -1, self.head_dim)
        query, key, value = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        if position_embeddings is not None:
            cos, sin = position_embeddings
            query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        if past_key_values is not None:
            # Without a mask the queries are the last of the keys so far; a static cache gives its empty slots too.
            seen = None
            if attention_mask is None and tokens > 1:
                seen = int(past_key_values.get_seq_length(self.layer_idx)) + tokens
            # A cache holds [batch, heads, tokens, head_dim], after rotation.
            cached = past_key_values.update(key.transpose(1, 2), value.transpose(1, 2), self.layer_idx)
            key, value = (states.transpose(1, 2)[:, :seen] for states in cached)
        context = self.core_attention(query, key, value, **causal_arguments(attention_mask, tokens, key.shape[1]))
        out: Tensor = self.proj(context)
        return out


def causal_arguments(attention_mask: Tensor | None, num_queries: int, num_keys: int) -> dict[str, Any]:
    """A Hugging Face mask (None, or boolean with True where to attend) as arguments of ``DotProductAttention``.

    Without a mask, the queries are the last of the keys: attention is causal, aligned at the bottom right.
    """
    if attention_mask is None:
        if num_queries == 1:
            return {"attn_mask_type": "no_mask", "window_size": NO_WINDOW}
        return {"attn_mask_type": "causal" if num_queries == num_keys else "causal_bottom_right"}
    is_known = isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.bool
    if not is_known or attention_mask.dim() != 4 or attention_mask.shape[-1] not in (1, num_keys):
        raise UnsupportedError(
            Problem(
                where="attention_mask",
                what="the layer does not know this form of mask",
                expected=f"a boolean mask [batch, 1 or heads, queries, {num_keys} keys], True where to attend",
                found=f"{getattr(attention_mask, 'dtype', type(attention_mask).__name__)} {list(attention_mask.shape)}",
                fix="leave attn_implementation at 'sdpa' (as tepatch sets it), and pass masks as booleans",
            )
        )
    return {
        "attn_mask_type": "arbitrary",
        "attention_mask": ~attention_mask,
        "window_size": NO_WINDOW,
    }
