"""Llama's decoder layer, made of Transformer Engine's modules (or of the reference ones).

The class is a real ``LlamaDecoderLayer`` by name and by inheritance: output recording, gradient checkpointing,
device maps and FSDP wrapping look for exactly that. Its parameters are its own.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.cache_utils import Cache
from transformers.models.llama import modeling_llama as hf

from tepatch.errors import Problem, UnsupportedError
from tepatch.te import modules
from tepatch.te.attention import SelfAttention, gated_activation, normal_init
from tepatch.te.layer import AcceleratedLayer
from tepatch.te.rope import Float32Rotary

standalone: ContextVar[bool] = ContextVar("standalone", default=False)
"""Whether layers are built outside tepatch's loader, by ``replace_decoder``."""


class LlamaDecoderLayer(AcceleratedLayer, hf.LlamaDecoderLayer):  # type: ignore[no-untyped-call]
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, with norms fused into the matrix products."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        if standalone.get() and torch.get_default_device().type == "meta":
            raise UnsupportedError(
                Problem(
                    where="replace_decoder",
                    what="from_pretrained can not fill these layers: it would leave them without values",
                    fix="use TELlamaForCausalLM.from_pretrained_local(path), or tepatch.load('llama', path)",
                )
            )
        nn.Module.__init__(self)  # not Hugging Face's: its parameters would only be in the way
        self.hidden_size = config.hidden_size
        self.self_attn = SelfAttention(  # type: ignore[assignment]
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
            layer_idx=layer_idx,
            norm_eps=config.rms_norm_eps,
            qkv_bias=config.attention_bias,
            proj_bias=config.attention_bias,
            dropout=config.attention_dropout or 0.0,
            init_std=config.initializer_range,
        )
        self.mlp = modules().LayerNormMLP(  # type: ignore[assignment]
            config.hidden_size,
            config.intermediate_size,
            eps=config.rms_norm_eps,
            bias=config.mlp_bias,
            normalization="RMSNorm",
            activation=gated_activation(config.hidden_act),
            init_method=normal_init(config.initializer_range),
            output_layer_init_method=normal_init(config.initializer_range),
        )
        self.mark_as_initialized()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        hidden_states = hidden_states + self.self_attn(
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        out: Tensor = hidden_states + self.mlp(hidden_states)
        return out


class LlamaRotaryEmbedding(Float32Rotary, hf.LlamaRotaryEmbedding):
    """Hugging Face's own rotary module, its angles kept in float32: one table a model, shared by all layers."""
